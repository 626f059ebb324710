"""Budgets as people write them: ``--size 6GB``, ``--bpw 3.25``, ``--max-ppl-increase 2%``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from calibration.errors import ToolkitError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Budget:
    """What a fit may spend; exactly one is set.

    Attributes:
        size: bytes of all safetensors files together.
        bpw: stored bits per quantized weight, everything beside the codes counted.
        ppl_increase: relative increase of perplexity, 0.02 for 2 %.
    """

    size: int | None = None
    bpw: float | None = None
    ppl_increase: float | None = None

    def __str__(self) -> str:
        if self.size is not None:
            return f"--size {self.size / 1e6:.2f}MB"
        if self.bpw is not None:
            return f"--bpw {self.bpw:g}"
        return f"--max-ppl-increase {100 * (self.ppl_increase or 0):g}%"


def parse_budget(size: str | None, bpw: float | None, ppl_increase: str | None) -> Budget:
    """The one budget among the three options.

    Raises:
        ToolkitError: none or several, or a value that is no size, no share or not positive.
    """
    if sum(value is not None for value in (size, bpw, ppl_increase)) != 1:
        raise ToolkitError(
            "needs exactly one of --size, --bpw and --max-ppl-increase", "pass for example --bpw 3.25, or --size 6GB"
        )
    if size is not None:
        match = re.fullmatch(r"([\d.]+)\s*([kmg]?i?b)?", size.strip(), re.IGNORECASE)
        number = _number(match[1]) if match else None
        if match is None or number is None:
            raise ToolkitError(f"--size {size}: not a size", "write it as 6GB, 950MB or 5.5GiB")
        return Budget(size=math.floor(number * _UNITS[(match[2] or "").upper()]))
    if bpw is not None:
        if not (math.isfinite(bpw) and bpw > 0):
            raise ToolkitError(f"--bpw {bpw}: not a positive number", "pass for example --bpw 3.25")
        return Budget(bpw=bpw)
    text = (ppl_increase or "").strip()
    share = _number(text.removesuffix("%"))
    if share is None or share <= 0:
        raise ToolkitError(f"--max-ppl-increase {ppl_increase}: not a positive share", "write it as 2% or 0.02")
    return Budget(ppl_increase=share / 100 if text.endswith("%") else share)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
