"""Who of the processes of a run is still there. One that ends, in whatever way, ends the others within seconds.

Every process keeps a connection to the first one, which sees one that closes (kill -9 closes it, too) and names it to
the rest. In the process that hears of it, the thread that works gets an `OtherEnded`; where that thread is stuck in a
library (a collective of nccl that waits for the dead), the process ends without it. One process per machine says why.

No torch in here: the connections come about by a key and a port that the caller hands round.
"""

from __future__ import annotations

import ctypes
import logging
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from calibration.errors import ToolkitError
from calibration.launcher import launched, local_number, on_one_machine
from calibration.presence_hub import Hub, keep_alive
from calibration.speaking import first_to_speak

STUCK = 12.0  # seconds that the working thread has to notice, before the process ends without it
NAMING = 4.0  # seconds that a failed collective waits for the name of the process that has ended
ANSWER = 4.0  # seconds that the hub has to say who is to speak
AGAIN = "start the command again, on any number of processes, with --resume where DIR.partial keeps finished blocks"


class OtherEnded(ToolkitError):
    """Another process of this run has ended. Without arguments it says which; see `Presence`."""

    def __init__(self, reason: str = "") -> None:
        lost = _current.lost[:1] if _current is not None else []  # the rest followed it
        who = f"{_names(lost)} of {launched()[1]}" if lost else "another process of this run"
        super().__init__(f"{who} has ended" + (f" or does not answer ({reason})" if reason and not lost else ""), AGAIN)


class Presence:
    """This process among those of a run, from `Presence` to `leave`. Of the first process it is the hub that all others
    connect to.

    Args:
        host, port, key: where the hub of the first process is, and what it knows its own by.
        patience: seconds until all must be there.
        hub: in the first process.

    Raises:
        ToolkitError: names those that have not come.
    """

    def __init__(self, host: str, port: int, key: str, patience: float, hub: Hub | None = None) -> None:
        global _current
        _current = self
        self.rank, self.size = launched()
        self.lost: list[int] = []
        self._key, self._hub = key, hub
        self._worker = threading.get_ident()
        self._lock = threading.Lock()
        self._left, self._named, self._answered = threading.Event(), threading.Event(), threading.Event()
        self._reply: bool | None = None
        self._over = self._hub_gone = False
        if hub is not None:
            hub.lose = self._lose
            missing: list[int] | None = hub.wait_for_all(patience)
        else:
            missing = self._connect(host, port, patience)
        if missing:
            raise ToolkitError(
                f"{_names(missing)} of {self.size} ended before the run, or did not come within {patience:.0f} seconds",
                "start all processes at once, and look at what these have printed; nothing was begun",
            )

    def _connect(self, host: str, port: int, patience: float) -> list[int] | None:
        """Say who this is, and wait for the others: numbers of those that have not come."""
        try:
            self._socket = socket.create_connection((host, port), timeout=patience)
            keep_alive(self._socket)
            self._socket.settimeout(patience + 2 * ANSWER)
            self._say(f"{self._key} {self.rank} {socket.gethostname()}")
            self._lines = self._socket.makefile("r", encoding="ascii")
            kind, *ranks = self._lines.readline().split() or ["lost", "0"]
            self._socket.settimeout(None)
        except OSError:
            kind, ranks = "lost", ["0"]
        numbers = [int(rank) for rank in ranks]
        if kind == "lost":
            self.lost += numbers
            raise OtherEnded
        threading.Thread(target=self._listen, daemon=True).start()
        return numbers if kind == "missing" else None

    def _say(self, line: str) -> None:
        self._socket.sendall(f"{line}\n".encode("ascii", "replace"))

    def _listen(self) -> None:
        """What the hub says, until it is gone."""
        with suppress(OSError, ValueError):
            for line in self._lines:
                kind, *rest = line.split()
                if kind == "lost":
                    self._lose(int(rest[0]))
                elif kind == "speak":
                    self._reply = rest[0] == "1"
                    self._answered.set()
                elif kind == "done":
                    self._over = True
        self._hub_gone = True
        self._answered.set()
        self._lose(0)

    def _lose(self, rank: int) -> None:
        """Another process has ended: see to it that this one does."""
        with self._lock:
            if self._over or self._left.is_set():
                return
            self.lost.append(rank)
            self._named.set()
            if len(self.lost) == 1:
                _raise_in(self._worker, OtherEnded)
                threading.Thread(target=self._end, daemon=True).start()

    def _end(self) -> None:
        if not self._left.wait(STUCK):
            error = OtherEnded()
            if self.may_speak():
                logging.getLogger("ptq").error("[process %d of %d] error: %s", self.rank + 1, self.size, error)
            os._exit(2)

    def await_name(self) -> None:
        """Wait a moment for the name of the process whose connection has just failed."""
        self._named.wait(NAMING)

    def stop_minding(self) -> None:
        """From here on the first process needs no other, and the others only the first: what is lost else is not
        missed."""
        if self._hub is not None:
            self._over = True
            self._hub.stop_minding()

    def fail(self) -> None:
        """This process is about to end with an error, which it will name unless another has spoken on this machine."""
        with self._lock:
            self._left.set()
            _raise_in(self._worker, None)
        if self._hub is not None:
            self._hub.fail()
        else:
            with suppress(OSError):
                self._say("failing")

    def may_speak(self) -> bool:
        """Whether this is the process of its machine that prints why the run ends."""
        if self._hub is not None:
            return self._hub.may_speak(socket.gethostname(), 0)
        with suppress(OSError, AttributeError):  # there may be no connection
            self._say("ask")
            self._answered.wait(ANSWER)
        if self._reply is not None:
            return self._reply
        local = os.environ.get("LOCAL_RANK")  # no hub answers: the lowest that is left of this machine
        gone = {*self.lost, *((0,) if self._hub_gone else ())} if on_one_machine() else set()
        return local is None or int(local) == min(set(range(self.size)) - gone)

    def leave(self) -> None:
        """The work is done."""
        with self._lock:
            self._over = True
            self._left.set()
            _raise_in(self._worker, None)
        if self._hub is not None:
            self._hub.close()
        else:
            with suppress(OSError):
                self._say("done")
                self._socket.shutdown(socket.SHUT_RDWR)


_current: Presence | None = None
_seeking = False


def seek() -> None:
    """This process is about to look for the others: until it has found them, it cannot ask who is to speak."""
    global _seeking
    _seeking = True


def may_speak() -> bool:
    """Whether this process is to print why it ends: where several share a run, one per machine does."""
    if _current is not None:
        return _current.may_speak()
    return first_to_speak() if _seeking else local_number() == 0


def end() -> None:
    """The process ends: the first one stays until the others are gone, which ask it who is to speak."""
    if _current is not None and _current._hub is not None:
        _current._hub.close()


def _names(ranks: list[int]) -> str:
    numbers = [str(rank + 1) for rank in sorted(set(ranks))]
    return "" if not numbers else f"process{'es' if numbers[1:] else ''} {', '.join(numbers)}"


def _raise_in(thread: int, error: Callable[[], Exception] | None) -> None:
    """Let a thread raise an exception of a class when it next runs Python; None: let go of one that is under way."""
    kind = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), kind)
