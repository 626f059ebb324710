"""``ptq WORDS...`` in a fork of this process: a start takes milliseconds, because everything is imported already."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

POLL = 0.002  # seconds
TRACEBACK = 71  # exit code of a command that ended in an exception


def start(words: list[str], place: Path, log: Path, before: Callable[[], None] | None = None) -> int:
    """Run a command in the folder ``place`` and print to ``log``; its process. ``before`` runs in it first."""
    child = os.fork()
    if child:
        return child
    code = TRACEBACK - 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.chdir(place)
        if before is not None:
            before()
        code = _command(words)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _command(words: list[str]) -> int:
    from cli.main import main

    sys.argv = ["ptq", *words]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  (this is what is looked for)
        traceback.print_exc()
        return TRACEBACK
    return 0


def wait(child: int, seconds: float) -> int | None:
    """The exit code (negative: a signal), or None where it still runs after ``seconds``."""
    ends = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= ends:
            return None
        time.sleep(POLL)


def kill(child: int) -> None:
    """kill -9, and wait for the end."""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
