"""The side of `calibration.presence` that the first process has: the connections of all others."""

from __future__ import annotations

import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

LINGER = 2.0  # seconds that the first process, when it ends, waits for the others
IDLE, EVERY, TIMES = 8, 4, 3  # seconds and probes until a machine that went dark counts as gone


def keep_alive(connection: socket.socket) -> None:
    """Let the system notice a machine that is gone without a word."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", IDLE), ("TCP_KEEPINTVL", EVERY), ("TCP_KEEPCNT", TIMES)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


@dataclass
class _Other:
    """A connection; ``rank`` is -1 until it has said who it is."""

    connection: socket.socket
    rank: int = -1
    host: str = ""
    text: bytes = b""
    done: bool = False


class Hub:
    """Listens at `port` of this machine, in a thread.

    Args:
        size: of the run.
        local: whether all processes are on this machine.

    Attributes:
        key: what the processes of this run say first; a connection that does not is closed.
        lose: called in the thread with the rank of a process that has ended.
    """

    def __init__(self, size: int, local: bool) -> None:
        self.size, self.key = size, secrets.token_hex(16)
        self.lose: Callable[[int], None] = lambda rank: None
        self._server = socket.create_server(("127.0.0.1" if local else "", 0), backlog=size)
        self.port = int(self._server.getsockname()[1])
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._others: dict[int, _Other] = {}
        self._speakers: dict[str, int] = {}
        self._changed = threading.Condition()
        self._gone_early: set[int] = set()
        self._minding = self._closed = False
        threading.Thread(target=self._serve, daemon=True).start()

    def wait_for_all(self, seconds: float) -> list[int]:
        """Wait until all are here and tell them so, or who is missing; the ranks that are."""
        ends = time.monotonic() + seconds
        with self._changed:
            while self._missing() and not self._gone_early and time.monotonic() < ends:
                self._changed.wait(max(0.0, ends - time.monotonic()))
            missing = sorted(self._gone_early) or self._missing()
            self._tell(f"missing {' '.join(map(str, missing))}" if missing else "all")
            self._minding = not missing
        return missing

    def _missing(self) -> list[int]:
        return [rank for rank in range(1, self.size) if rank not in self._others]

    def _tell(self, line: str) -> None:
        for other in list(self._others.values()):
            self._send(other, line)

    def _send(self, other: _Other, line: str) -> None:
        with suppress(OSError):
            other.connection.sendall(f"{line}\n".encode("ascii"))

    def _serve(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select(timeout=0.5):
                if key.fileobj is self._server:
                    connection, _ = self._server.accept()
                    keep_alive(connection)
                    self._selector.register(connection, selectors.EVENT_READ, _Other(connection))
                else:
                    self._read(key.data)

    def _read(self, other: _Other) -> None:
        try:
            received = other.connection.recv(4096)
        except OSError:
            received = b""
        *lines, other.text = (other.text + received).split(b"\n")
        with self._changed:
            for line in lines:
                self._hear(other, line.decode("ascii", "replace").split())
            if not received or len(other.text) > 1024:
                self._forget(other)
            self._changed.notify_all()

    def _hear(self, other: _Other, words: list[str]) -> None:
        if other.rank < 0:
            if len(words) == 3 and secrets.compare_digest(words[0], self.key) and words[1].isdecimal():
                other.rank, other.host = int(words[1]), words[2]
                self._others[other.rank] = other
        elif words == ["ask"]:
            self._send(other, f"speak {int(self.may_speak(other.host, other.rank))}")
        elif words == ["failing"]:
            self.may_speak(other.host, other.rank)
            self._gone(other)
        elif words == ["done"]:
            other.done = True

    def _forget(self, other: _Other) -> None:
        self._selector.unregister(other.connection)
        other.connection.close()
        if self._others.get(other.rank) is other:
            del self._others[other.rank]
            self._gone(other)

    def _gone(self, other: _Other) -> None:
        """Name one that has ended to all."""
        if not self._minding:
            self._gone_early.add(other.rank)
        if other.done or not self._minding:
            return
        other.done = True
        for one in self._others.values():
            if one is not other:
                self._send(one, f"lost {other.rank}")
        self.lose(other.rank)

    def may_speak(self, host: str, rank: int) -> bool:
        """Whether a process is the first of its machine that asks; the others there hear at once that it speaks, as
        they may be stuck in a library until this process has gone."""
        with self._changed:
            if host not in self._speakers:
                self._speakers[host] = rank
                for other in self._others.values():
                    if other.host == host and other.rank != rank:
                        self._send(other, "speak 0")
            return self._speakers[host] == rank

    def stop_minding(self) -> None:
        """Those that end from here on are not named."""
        with self._changed:
            self._minding = False

    def fail(self) -> None:
        """The first process ends with an error, and has the word on this machine."""
        with self._changed:
            self.may_speak(socket.gethostname(), 0)
            self._minding = False
            self._tell("lost 0")

    def close(self) -> None:
        """Tell the others that the run is over, and wait a little until they have gone."""
        ends = time.monotonic() + LINGER
        with self._changed:
            self._minding = False
            self._tell("done")
            while self._others and time.monotonic() < ends:
                self._changed.wait(max(0.0, ends - time.monotonic()))
        self._closed = True
