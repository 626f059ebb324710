"""SIGINT and SIGTERM: commands end in order, and say what is kept and how to go on."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM: what cleans up behind a Ctrl-C does so here too."""


class Interrupted(BaseException):
    """A command was interrupted; carries the signal, and past the command-line library, which would swallow it."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number


@contextmanager
def terminable() -> Iterator[None]:
    """Raise `Terminated` where SIGTERM arrives inside, and leave the handler as it was."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def passed_on() -> Iterator[None]:
    """Turn an interrupt inside into `Interrupted`."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT) from error


def what_is_kept(words: Sequence[str]) -> str:
    """The message for an interrupted command line, and the command that goes on with it, where one can."""
    return f"interrupted: {how_to_go_on(words) or 'nothing is left of it; run the same command again'}"


def how_to_go_on(words: Sequence[str]) -> str:
    """Where the finished part of the command line that ends is kept, and the command that goes on; empty where nothing
    is kept."""
    module = sys.modules.get("ptq.session")
    kept = module.interrupted() if module else None
    if kept is None:
        return ""
    again = [word for word in words if word not in ("--overwrite", "--resume")]
    return f"{kept} keeps what is finished; continue with\n  {shlex.join(['ptq', *again, '--resume'])}"
