"""How a weight is stored: bits, grid and grouping. Plain values that round-trip through text and JSON."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from calibration.errors import ToolkitError, nearest

Quantizer = Literal["asym_minmax", "asym_zero_in", "sym_full", "sym_restricted", "sym_gptq"]
"""The five integer grids in common use (A to E of the literature's vocabulary; see `ptq.numerics.integers`)."""

Axis = Literal["in", "out"]
QUANTIZERS: tuple[str, ...] = get_args(Quantizer)
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
SCALE_BITS = 16  # scales are exact in bf16 and in fp16, and stored in one of them


@dataclass(frozen=True)
class Grouping:
    """Which weights of ``W [out, in]`` share a step: a whole line of W (``channel``) or runs of ``size`` in it.

    Along ``axis`` "in", as usual, a line is a row and a group is a run of input columns. Along "out" a line is an
    input column and a group is a run of output rows (per-IC grouping, Heo et al. 2023, arXiv 2309.15531): a column
    with large inputs then has steps of its own. Scales are ``[lines, groups per line]`` either way.
    """

    kind: Literal["channel", "group"]
    size: int | None = None
    axis: Axis = "in"

    def length(self, shape: tuple[int, int]) -> int:
        """Weights per line of a ``W [out, in]`` of this shape."""
        return shape[1] if self.axis == "in" else shape[0]

    def width(self, length: int) -> int:
        """Weights per group, for lines of this length."""
        return length if self.size is None else self.size

    def count(self, length: int) -> int:
        """Groups per line of this length; the plan has checked that the width divides."""
        return length // self.width(length)

    def scales(self, shape: tuple[int, int]) -> tuple[int, int]:
        """``(lines, groups per line)``: the shape of the scales of a ``W [out, in]`` of this shape."""
        length = self.length(shape)
        return shape[0] * shape[1] // length, self.count(length)

    def __str__(self) -> str:
        return ("g" if self.axis == "in" else "ic") + ("channel" if self.size is None else str(self.size))


@dataclass(frozen=True)
class TensorQuant:
    """An integer grid for one tensor."""

    bits: int
    grouping: Grouping
    quantizer: Quantizer = "sym_gptq"

    @property
    def symmetric(self) -> bool:
        """Symmetric grids have the fixed zero point 2^(bits-1), which no file stores."""
        return self.quantizer.startswith("sym")

    @property
    def levels(self) -> int:
        """The top unsigned code, N = 2^bits - 1."""
        return 2**self.bits - 1


@dataclass(frozen=True)
class QuantScheme:
    """What happens to one linear. Activations stay in the model's dtype (``a16``)."""

    weights: TensorQuant

    def __str__(self) -> str:
        w = self.weights
        suffix = {"sym_gptq": "sym", "asym_zero_in": "asym"}.get(w.quantizer, w.quantizer)
        return f"w{w.bits}a16-{w.grouping}-{suffix}"

    def bits_per_weight(self, out_features: int, in_features: int, reordered: bool = False) -> float:
        """Stored bits over weights: codes, 16-bit scales, ``bits``-wide zero points, and an int32 group index per
        input column where groups follow an activation order (``reordered``)."""
        w = self.weights
        per_group = SCALE_BITS + (0 if w.symmetric else w.bits)
        index = 32.0 / out_features if reordered else 0.0
        return w.bits + per_group / w.grouping.width(w.grouping.length((out_features, in_features))) + index

    def to_json(self) -> dict[str, Any]:
        w = self.weights
        return {"bits": w.bits, "group_size": w.grouping.size, "axis": w.grouping.axis, "quantizer": w.quantizer}

    @staticmethod
    def from_json(data: dict[str, Any]) -> QuantScheme:
        size, axis = data["group_size"], data.get("axis", "in")
        grouping = Grouping("channel", None, axis) if size is None else Grouping("group", int(size), axis)
        return QuantScheme(TensorQuant(int(data["bits"]), grouping, data["quantizer"]))


_KINDS = ("", "-sym", "-asym")
_SCHEME = re.compile(r"w(\d+)a16(?:-((?:g|ic)\w+?))?(?:-(sym|asym|" + "|".join(QUANTIZERS) + r"))?")


def parse_scheme(text: str, default_quantizer: Quantizer = "sym_gptq") -> QuantScheme:
    """``w4a16-g128-sym`` and its relatives to a scheme.

    The group part defaults to ``g128``; without ``-sym`` or ``-asym`` the grid is ``default_quantizer``. The full
    quantizer names are accepted in place of the suffix (recipes use them).

    Raises:
        ToolkitError: the text is no scheme, or the bits or the group size are not on offer.
    """
    choices = f"w{{{','.join(map(str, BITS))}}}a16-{{{','.join(f'g{g}' for g in GROUP_SIZES)},gchannel}}[-sym|-asym]"
    choices += "; ic instead of g groups along the outputs"
    match = _SCHEME.fullmatch(text.strip().lower())
    if match is None:
        known = [f"w{b}a16-{g}{k}" for b in BITS for g in (*(f"g{n}" for n in GROUP_SIZES), "gchannel") for k in _KINDS]
        closest = nearest(text.strip().lower(), known) or "for example w4a16-g128-sym: "
        raise ToolkitError(f"scheme: '{text}' is not a weight scheme", f"{closest}write it as {choices}")
    bits, group, kind = int(match[1]), match[2] or "g128", match[3]
    if bits not in BITS:
        raise ToolkitError(f"scheme: '{text}' asks for {bits}-bit weights", f"use one of {choices}")
    axis: Axis = "out" if group.startswith("ic") else "in"
    size = group.removeprefix("ic" if axis == "out" else "g")
    if size == "channel":
        grouping = Grouping("channel", None, axis)
    elif size.isdigit() and int(size) in GROUP_SIZES:
        grouping = Grouping("group", int(size), axis)
    else:
        raise ToolkitError(f"scheme: '{text}' asks for group '{group}'", f"use one of {choices}")
    aliases: dict[str, Quantizer] = {"sym": "sym_gptq", "asym": "asym_zero_in"}
    aliases |= {name: name for name in get_args(Quantizer)}
    quantizer = default_quantizer if kind is None else aliases[kind]
    return QuantScheme(TensorQuant(bits, grouping, quantizer))
