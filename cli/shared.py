"""Commands that ``torchrun`` or ``accelerate launch`` has started several times."""

from __future__ import annotations

from collections.abc import Sequence

from calibration.errors import ToolkitError
from calibration.launcher import launched

COMMANDS = ("quantize",)


def first() -> bool:
    """Whether this process is the one that writes and shows."""
    return launched()[0] == 0


def refuse_others(words: Sequence[str]) -> None:
    """Refuse a command whose work several processes cannot share.

    Raises:
        ToolkitError: names the command.
    """
    command = next((word for word in words if not word.startswith("-")), None)
    if launched()[1] > 1 and command is not None and command not in COMMANDS:
        raise ToolkitError(
            f"ptq {command}: started as {launched()[1]} processes, which share the work of {', '.join(COMMANDS)} only",
            "run the command without torchrun or accelerate launch",
        )


def prefix() -> str:
    """In front of a message, where several processes may print one."""
    rank, size = launched()
    return f"[process {rank + 1} of {size}] " if size > 1 else ""
