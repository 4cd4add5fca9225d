"""Gather the processes of a job before they depend on each other, and notice when one of them dies.

JAX's own start of a job waits silently for processes that never come, and then ends the process from C++. Here
process 0 listens first at the coordinator's address. Every other process connects and sends `lit-fast RANK COUNT`.
When all are there, process 0 answers `start`, and frees the port for JAX. Otherwise it answers `missing RANKS` at the
deadline, so that every process ends with a line.

The connections stay open. A process that ends its work says `bye`; where a connection ends without it, the process
died, and the others end too instead of waiting for it in a collective operation. Process 0 passes it on: `lost RANK`.
"""

from __future__ import annotations

import os
import selectors
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress

from lit_fast.errors import MachineError
from lit_fast.utils.output import failure

_RETRY = 0.5  # seconds between two attempts to connect
_GRACE = 2.0  # seconds in which a process may end with an error of its own after another one has died
_MAX_LINE = 1 << 20  # bytes; a list of missing ranks


class Rendezvous:
    """One process's connections to the others of its job.

    Args:
      rank, count: of this process.
      address: HOST:PORT of process 0.
      bind: HOST:PORT that process 0 listens at; "": at all interfaces, at the port of `address`.
      timeout: seconds to wait for all processes.

    Raises:
      MachineError: not all processes came in time, or the port of process 0 cannot be used.
    """

    def __init__(self, rank: int, count: int, address: str, bind: str = "", timeout: float = 50.0) -> None:
        self._rank, self._count, self._address = rank, count, address
        self._deadline, self._timeout = time.monotonic() + timeout, timeout
        self._peers: dict[int, socket.socket] = {}  # rank -> connection
        self._closed = threading.Event()
        if rank == 0:
            self._gather(bind)
        else:
            self._join()
        for connection in self._peers.values():
            _keep_alive(connection)
        self._watcher = threading.Thread(target=self._watch, name="rendezvous", daemon=True)
        self._watcher.start()

    def close(self) -> None:
        """Leave the job in order: the others go on without this process."""
        self._closed.set()
        for connection in self._peers.values():
            _send(connection, "bye")

    def abandon(self) -> None:
        """Let this process end with an error of its own. The others notice it when the process has ended."""
        self._closed.set()

    def wait_for_loss(self) -> None:
        """Give the watcher time to find a dead process, which ends this one with a line.

        For errors of collective operations, of which that death is the usual cause.
        """
        self._watcher.join(2 * _GRACE)

    # --- process 0

    def _gather(self, bind: str) -> None:
        host, _, port = (bind or f":{self._address.rpartition(':')[2]}").rpartition(":")
        try:
            dual = not host and socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual or ":" in host else socket.AF_INET
            listener = socket.create_server((host.strip("[]"), int(port)), family=family, dualstack_ipv6=dual)
        except OSError as error:
            raise MachineError(
                f"port {port}, at which process 0 of {self._count} waits for the others, cannot be used: "
                f"{error.strerror}; end the program that uses it, or choose another port"
            ) from None
        with listener:
            while len(self._peers) < self._count - 1:
                listener.settimeout(max(0.01, self._deadline - time.monotonic()))
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    break
                self._admit(connection)
        missing = sorted(set(range(1, self._count)) - set(self._peers))
        for connection in self._peers.values():
            _send(connection, f"missing {','.join(map(str, missing))}" if missing else "start")
        if missing:
            raise MachineError(self._missing_text(missing))

    def _admit(self, connection: socket.socket) -> None:
        connection.settimeout(5.0)
        try:
            match _receive(connection).split():
                case ["lit-fast", rank, count] if int(count) == self._count and 0 < int(rank) < self._count:
                    if int(rank) in self._peers:
                        reason = f"process {rank} of {count} was started twice"
                    else:
                        self._peers[int(rank)] = connection
                        return
                case ["lit-fast", rank, count]:
                    reason = (
                        f"process {rank} of {count} belongs to another job than process 0 of {self._count}"
                    )
                case _:  # a port scanner
                    reason = ""
        except (OSError, ValueError):
            reason = ""
        if reason:
            _send(connection, f"refused {reason}")
        connection.close()

    # --- all others

    def _join(self) -> None:
        host, _, port = self._address.rpartition(":")
        problem = ""
        while time.monotonic() < self._deadline:
            try:
                connection = socket.create_connection((host.strip("[]"), int(port)), timeout=5.0)
                break
            except OSError as error:  # process 0 may start later; its name may not be known yet
                problem = error.strerror or str(error)
                time.sleep(_RETRY)
        else:
            raise MachineError(self._missing_text([0], problem))
        _send(connection, f"lit-fast {self._rank} {self._count}")
        connection.settimeout(max(0.0, self._deadline - time.monotonic()) + 5.0)
        try:
            word, _, rest = _receive(connection).partition(" ")
        except (OSError, ValueError):
            word, rest = "", ""
        if word == "missing":
            raise MachineError(self._missing_text([int(rank) for rank in rest.split(",")]))
        if word == "refused":
            raise MachineError(
                f"{self._address} refused this process: {rest}; number the processes of a job from 0"
            )
        if word != "start":
            raise MachineError(
                f"process {self._rank} of {self._count} got no answer from process 0 at {self._address}; see the "
                "output of process 0, and start all processes with the same version"
            )
        self._peers[0] = connection

    def _missing_text(self, missing: list[int], problem: str = "") -> str:
        problem = f" ({problem})" if problem else ""
        return (
            f"process {self._rank} of {self._count} waited {self._timeout:.0f} s at {self._address} for "
            f"{_processes(missing)}, which did not come{problem}"
        )

    # --- after the start

    def _watch(self) -> None:
        """End this process when another has died."""
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._peers.items():
                connection.settimeout(5.0)
                selector.register(connection, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    connection = self._peers[key.data]
                    try:
                        word, _, rest = _receive(connection).partition(" ")
                    except (OSError, ValueError):
                        word, rest = "lost", str(key.data)
                    selector.unregister(connection)
                    if word == "lost":
                        self._lose(int(rest))
                        return

    def _lose(self, rank: int) -> None:
        if self._closed.wait(_GRACE):
            return
        for connection in self._peers.values():
            _send(connection, f"lost {rank}")
        failure(
            f"lit-fast: error: process {rank} of {self._count} ended before its work was done; see its output, then "
            "rerun the same command in all processes"
        )
        os._exit(MachineError.exit_status)  # the main thread may wait in a collective operation for ever


def _processes(ranks: Iterable[int]) -> str:
    """Return "process 1" or "processes 1, 2, 3 and 60 others"."""
    names = [str(rank) for rank in ranks]
    if len(names) == 1:
        return f"process {names[0]}"
    if len(names) > 9:
        names[8:] = [f"{len(names) - 8} others"]
    return f"processes {', '.join(names[:-1])} and {names[-1]}"


def _send(connection: socket.socket, line: str) -> None:
    """Send a line; a process that is gone does not receive it."""
    with suppress(OSError):
        connection.sendall(f"{line}\n".encode())


def _receive(connection: socket.socket) -> str:
    """Return the next line; raises OSError or ValueError where none comes."""
    line = b""
    while not line.endswith(b"\n"):  # byte by byte, so that the next line stays in the socket
        byte = connection.recv(1)
        if not byte or len(line) > _MAX_LINE:
            raise ValueError("no line")
        line += byte
    return line.decode().strip()


def _keep_alive(connection: socket.socket) -> None:
    """Have the operating system notice a host that is gone, within 40 s."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):  # macOS has not all
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
