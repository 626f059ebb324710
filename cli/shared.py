"""Commands that ``torchrun`` or ``accelerate launch`` has started several times."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from types import ModuleType

from calibration.errors import ToolkitError
from calibration.launcher import launched, local_number
from cli.interrupts import how_to_go_on

COMMANDS = ("quantize", "sparsify", "analyze", "eval", "fit", "study sensitivity")


def first() -> bool:
    """Whether this process is the one that writes and shows."""
    return launched()[0] == 0


def refuse_others(words: Sequence[str]) -> None:
    """Refuse a command whose work several processes cannot share.

    Raises:
        ToolkitError: names the command.
    """
    named = [word for word in words if not word.startswith("-")]
    command = " ".join(named[: 2 if named[:1] == ["study"] else 1])
    if launched()[1] > 1 and command and command not in COMMANDS:
        raise ToolkitError(
            f"ptq {command}: started as {launched()[1]} processes, which share the work of {', '.join(COMMANDS)} only",
            "run the command without torchrun or accelerate launch",
        )


@contextmanager
def shown_by_the_first() -> Iterator[None]:
    """What is printed to stdout inside is printed by the first process only."""
    if first():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


def prefix() -> str:
    """In front of a message, where several processes may print one."""
    rank, size = launched()
    return f"[process {rank + 1} of {size}] " if size > 1 else ""


def _presence() -> ModuleType | None:
    """`calibration.presence`, where the processes have met."""
    return sys.modules.get("calibration.presence") if launched()[1] > 1 else None


def may_speak() -> bool:
    """Whether this process is to say why it ends: where several share a run, one per machine does."""
    presence = _presence()
    if presence is not None:
        return bool(presence.may_speak())
    return launched()[1] == 1 or local_number() == 0


def tell_state(error: ToolkitError) -> None:
    """Where the end of another process has ended this one: what is kept, and the command that goes on."""
    presence = _presence()
    if presence is not None and isinstance(error, presence.OtherEnded):
        print(how_to_go_on(sys.argv[1:]) or "nothing is left of it; run the same command again", file=sys.stderr)


def stay() -> None:
    """The first process stays a little, until the others have asked who is to speak."""
    presence = _presence()
    if presence is not None:
        presence.end()
