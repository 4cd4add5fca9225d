"""Processes of a job meet before they depend on each other."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from lit_fast.errors import MachineError
from lit_fast.utils.rendezvous import Rendezvous


@pytest.fixture
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def meet(address, *members, timeout=0.4):
    """Run the members (rank, count) of a job in threads; return their rendezvous or errors."""

    def join(member):
        try:
            return Rendezvous(*member, address, address, timeout=timeout)
        except MachineError as error:
            return str(error)

    with ThreadPoolExecutor(len(members)) as pool:
        return list(pool.map(join, members))


def test_rendezvous_of_all_processes_ends_when_all_are_there(address):
    found = meet(address, *((i, 4) for i in range(4)), timeout=30)
    assert all(isinstance(member, Rendezvous) for member in found)
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        pass  # the port is free for JAX, although the connections are open
    for member in found:
        member.close()


def test_rendezvous_names_the_processes_that_are_missing_in_all_others(address):
    first, third = meet(address, (0, 4), (2, 4), timeout=4)  # time for a second attempt to connect
    assert "process 0 of 4 waited 4 s" in first
    assert "process 2 of 4 waited 4 s" in third
    assert all("for processes 1 and 3, which did not come" in text for text in (first, third))


def test_rendezvous_without_process_0_names_it_and_the_reason(address):
    (text,) = meet(address, (3, 4))
    assert (
        f"process 3 of 4 waited 0 s at {address} for process 0, which did not come (Connection refused)"
        in text
    )


def test_rendezvous_with_an_unknown_host_is_a_line():
    (text,) = meet("no-such-host.invalid:1", (1, 2))
    assert "for process 0, which did not come (" in text


def test_rendezvous_lists_a_few_of_many_missing_processes(address):
    (text,) = meet(address, (0, 1000))
    assert "for processes 1, 2, 3, 4, 5, 6, 7, 8 and 991 others, which" in text


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([(0, 3), (1, 3), (1, 3)], "refused this process: process 1 of 3 was started twice"),
        ([(0, 3), (1, 2)], "refused this process: process 1 of 2 belongs to another job than process 0 of 3"),
    ],
)
def test_rendezvous_refuses_processes_that_do_not_belong_to_the_job(address, members, reason):
    found = meet(address, *members, timeout=4)
    assert any(reason in text for text in found)


def test_rendezvous_ignores_other_clients_of_its_port(address):
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, address, (0, 2), timeout=30)
        while True:
            try:
                with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as scanner:
                    scanner.sendall(b"GET / HTTP/1.1\r\n")
                break
            except ConnectionRefusedError:
                pass
        (second,) = meet(address, (1, 2), timeout=30)
        (first,) = first.result()
    first.close()
    second.close()


def test_rendezvous_at_a_used_port_is_a_line(address):
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        (text,) = meet(address, (0, 2))
    assert "at which process 0 of 2 waits for the others, cannot be used: Address already in use" in text


def test_rendezvous_with_another_program_is_a_line(address):
    with (
        socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        pool.submit(lambda: server.accept()[0].close())
        (text,) = meet(address, (1, 2))
    assert f"process 1 of 2 got no answer from process 0 at {address}" in text
