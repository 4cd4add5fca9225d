"""Signals are deferred to the end of a block; a second one ends the process."""

import signal

import pytest

from lit_fast.utils.signals import SIGNALS, defer_signals


@pytest.fixture(autouse=True)
def handlers():
    """Handlers of this test, restored afterwards."""
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_defer_signals_raises_the_signal_at_the_end_of_the_block(number):
    handled = []
    signal.signal(number, lambda number, frame: handled.append(number))
    with defer_signals() as received:
        signal.raise_signal(number)
        assert received == [number]
        assert not handled
    assert handled == [number]


def test_defer_signals_with_second_signal_ends_the_process():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the handler at the end of the block
    with defer_signals():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(SystemExit, match=str(128 + signal.SIGINT)):
            signal.raise_signal(signal.SIGINT)


def test_defer_signals_restores_the_handlers():
    previous = [signal.getsignal(number) for number in SIGNALS]
    with defer_signals():
        assert [signal.getsignal(number) for number in SIGNALS] != previous
    assert [signal.getsignal(number) for number in SIGNALS] == previous
