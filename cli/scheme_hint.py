"""``--bits 3 --group-size 64`` of other tools: here both are parts of ``--scheme``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand

from calibration.errors import ToolkitError

BITS = ("--bits", "--wbits", "--w-bit", "--w_bit", "--nbits")
GROUPS = ("--group-size", "--group_size", "--groupsize", "--q-group-size", "--q_group_size")


class Command(TyperCommand):
    """A command that points from options of other tools to its own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options = {name for parameter in self.params for name in parameter.opts}
        own = next((name for name in ("--scheme", "--schemes") if name in options), None)
        if own is not None:
            point_to_scheme(own, args)
        return super().parse_args(ctx, args)


def point_to_scheme(own: str, words: Sequence[str]) -> None:
    """Refuse widths and group sizes as options, with the scheme that they mean.

    Args:
        own: the option that takes schemes.

    Raises:
        ToolkitError: one of them is there.
    """
    words = [part for word in words for part in word.split("=", 1)]
    first = next((word for word in words if word in (*BITS, *GROUPS)), None)
    if first is None:
        return
    bits, group = _number(words, BITS) or 4, _number(words, GROUPS)
    grouping = {None: "", -1: "-gchannel"}.get(group, f"-g{group}")
    raise ToolkitError(
        f"{first}: no option of this command; bits and group size are parts of a scheme",
        f"write {own} w{bits}a16{grouping} (-sym or -asym behind it; w{bits}a8 with 8-bit inputs)",
    )


def _number(words: Sequence[str], names: Sequence[str]) -> int | None:
    found = (words[i + 1] for i, word in enumerate(words[:-1]) if word in names)
    text = next(found, "")
    return int(text) if text.removeprefix("-").isdecimal() else None
