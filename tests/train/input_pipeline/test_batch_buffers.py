"""Buffers of batches are reused, but never while a view of them exists."""

import gc
import threading

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.data.features import BFLOAT16
from lit_fast.train.input_pipeline.buffers import BatchBuffers

SHAPE = (256, 64)


def address(array):
    return array.ctypes.data


def test_buffer_after_its_last_view_is_reused():
    buffers = BatchBuffers(SHAPE)
    first = buffers.empty()
    assert first.shape == SHAPE
    assert first.dtype == BFLOAT16
    assert first.flags.writeable
    first_address = address(first)
    second = buffers.empty()
    assert address(second) != first_address
    del first
    assert address(buffers.empty()) == first_address


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["take", "slice", "view", "drop"]), st.integers(0, 9)), max_size=60)
)
def test_buffer_with_a_view_is_never_reused(actions):
    """However an array is held: itself, or as a part or another view of it."""
    buffers, held = BatchBuffers(SHAPE), []
    for number, (action, which) in enumerate(actions):
        if action == "take" or not held:
            array = buffers.empty()
            array.view(np.uint16)[:] = number
            held.append((array, number))
        elif action == "drop":
            del held[which % len(held)]
        else:
            array, number_written = held.pop(which % len(held))
            array = array[len(array) // 2 :] if action == "slice" else array.view(np.uint16)[:, ::2]
            held.append((array, number_written))
        for array, number_written in held:
            assert (array.view(np.uint16) == number_written).all()


def test_buffer_that_jax_refers_to_is_never_reused():
    """JAX refers to an aligned array without copying it on CPU, and copies others later."""
    buffers = BatchBuffers(SHAPE)
    on_device = []
    for number in range(40):
        batch = buffers.empty()
        batch[:] = number
        # Rows of 128 bytes: some of these begin at a multiple of 64, which is what JAX needs, or none does.
        offset = -address(batch) % 64 // 2
        aligned = batch.reshape(-1)[offset : offset + 4096]
        on_device += [jax.device_put(batch), jax.device_put(aligned)]
        del batch, aligned
        if number % 3 == 2:
            del on_device[:2]
            gc.collect()
    numbers = [float(array.ravel()[0]) for array in on_device]
    assert numbers == sorted(numbers)
    assert numbers[-1] == 39
    for array, number in zip(on_device, numbers, strict=True):
        assert (np.asarray(array).astype(float) == number).all()


def test_free_buffers_are_limited():
    buffers = BatchBuffers(SHAPE)
    held = [buffers.empty() for _ in range(3 * BatchBuffers.KEEP)]
    held.clear()
    assert len(buffers._free) == BatchBuffers.KEEP


def test_threads_never_share_a_buffer():
    buffers, wrong = BatchBuffers((64, 64)), []

    def work(number):
        for _ in range(300):
            array = buffers.empty().view(np.uint16)
            array[:] = number
            if (array != number).any():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
