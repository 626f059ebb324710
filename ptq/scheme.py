"""How a linear is quantized: bits, grid and grouping of its weight, and the grids of its inputs and of the KV cache
(`ptq.activations`). Plain values that round-trip through text and JSON."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from calibration.errors import ToolkitError, nearest
from calibration.model.typed import built
from ptq.activations import PRESETS, ActivationQuant, CacheQuant, take_activations, with_activations
from ptq.float_formats import E2M1, E4M3FN, FloatFormat, float_formats
from ptq.scheme_names import GGUF_BLOCKS, plain_name

IntegerQuantizer = Literal["asym_minmax", "asym_zero_in", "sym_full", "sym_restricted", "sym_gptq", "sym_signed"]
"""Integer grids in common use, see `ptq.numerics.integers`."""

Quantizer = IntegerQuantizer | Literal["asym_float", "float", "binary", "sym_super", "asym_super"]
ScaleFormat = Literal["half", "bf16", "e8m0", "e4m3", "k4", "k6", "k8"]
"""How scales are stored: exact in bf16 and in fp16; in bf16; a power of two (MX formats); E4M3 beside one float32 for
the whole tensor (NVFP4); integers of 4, 6 or 8 bits beside a float16 for every 256 weights (GGUF's K-quants)."""

Axis = Literal["in", "out"]
Kind = Literal["sym", "asym"]
QUANTIZERS: tuple[str, ...] = get_args(IntegerQuantizer)
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
SCALE_BITS: dict[ScaleFormat, int] = {"half": 16, "bf16": 16, "e8m0": 8, "e4m3": 8, "k4": 4, "k6": 6, "k8": 8}
BLOCK = 128
"""Rows, and columns, of a block of weights that share a step."""
SUPER_WIDTH = 256
"""Weights of a row that share a float16 scale (and minimum) over their groups' integer ones, in K-quants."""
NARROW_SCALES: tuple[ScaleFormat, ...] = ("e8m0", "e4m3")
"""Scales of one byte, of formats that hardware defines: their group sizes and axis are fixed."""


def integer_quantizer(bits: int, kind: Kind) -> IntegerQuantizer:
    """The grid that ``-sym`` and ``-asym`` stand for. Below eight bits a symmetric one has steps of either sign, so
    that its longer side lies where the largest weight is; of 256 levels one more is worth nothing."""
    if kind == "asym":
        return "asym_zero_in"
    return "sym_signed" if bits < 8 else "sym_gptq"


@dataclass(frozen=True)
class Grouping:
    """Which weights of ``W [out, in]`` share a step: a whole line of W (``channel``) or runs of ``size`` in it.

    Along ``axis`` "in", as usual, a line is a row and a group is a run of input columns. Along "out" a line is an
    input column and a group is a run of output rows (per-IC grouping, Heo et al. 2023, arXiv 2309.15531): a column
    with large inputs then has steps of its own. Scales are ``[lines, groups per line]`` either way. A step of the whole
    tensor (``tensor``) is stored once per row, all of them equal, so that every reader of rows reads it. ``block`` is
    a group that ``size`` rows share (DeepSeek's FP8); their scales are equal here and stored once.
    """

    kind: Literal["tensor", "channel", "group", "block"]
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
        size = self.kind if self.size is None or self.kind == "block" else str(self.size)
        return ("g" if self.axis == "in" else "ic") + size


@dataclass(frozen=True)
class TensorQuant:
    """A grid for one tensor: integer, integer with zero points that are not ("asym_float", for HQQ), the values of a
    small float format (``quantizer`` is then "float"), one bit a weight with 4 bits in ``salient_percent`` of the
    columns ("binary", see `ptq.numerics.binary`)."""

    bits: int
    grouping: Grouping
    quantizer: Quantizer = "sym_gptq"
    float_format: FloatFormat | None = None
    scale_format: ScaleFormat = "half"
    salient_percent: int | None = None

    def salient_count(self, in_features: int) -> int:
        """Salient columns of a row of this length: int(ratio * in) + 1, as published."""
        percent = self.salient_percent or 0
        return min(in_features, percent * in_features // 100 + 1) if percent else 0

    @staticmethod
    def of_floats(number: FloatFormat, grouping: Grouping, scale_format: ScaleFormat = "bf16") -> TensorQuant:
        return TensorQuant(number.bits, grouping, "float", number, scale_format)

    @property
    def symmetric(self) -> bool:
        """Symmetric integer grids have the fixed zero point 2^(bits-1), which no file stores; floats have none."""
        return self.quantizer.startswith("sym") or self.quantizer == "float"

    @property
    def float_zeros(self) -> bool:
        """Zero points are float16 numbers, levels code - zero no integers."""
        return self.quantizer == "asym_float"

    @property
    def superblocks(self) -> bool:
        """Groups have integer scales under float16 ones of super-blocks, see `ptq.numerics.superblocks`."""
        return self.quantizer in ("sym_super", "asym_super")

    @property
    def levels(self) -> int:
        """The top unsigned code, N = 2^bits - 1."""
        return 2**self.bits - 1


@dataclass(frozen=True)
class QuantScheme:
    """What happens to one linear.

    Attributes:
        inputs: grid of its input; None leaves it in the model's dtype (``a16``).
        cache: grid of keys and values, which counts where the linear makes them.
    """

    weights: TensorQuant
    inputs: ActivationQuant | None = None
    cache: CacheQuant | None = None

    def __str__(self) -> str:
        return with_activations(self.weights_text, self.inputs, self.cache)

    @property
    def weights_text(self) -> str:
        """The scheme without its activations: ``w4a16-g128-sym``."""
        w = self.weights
        preset = next((name for name, quant in (FLOAT_PRESETS | K_QUANTS).items() if quant == w), None)
        if preset is not None:
            return preset
        if w.float_format is not None:
            return f"fp{w.bits}-{w.float_format}-{w.grouping}"
        if w.salient_percent is not None:
            return f"w1a16-salient{w.salient_percent}"
        usual = next((kind for kind in get_args(Kind) if integer_quantizer(w.bits, kind) == w.quantizer), None)
        return f"w{w.bits}a16-{w.grouping}-{usual or w.quantizer}"

    def bits_per_weight(self, out_features: int, in_features: int, reordered: bool = False) -> float:
        """Stored bits over weights: codes, scales, zero points (``bits`` wide, or floats of 16 bits), the scale of the
        whole tensor where there is one, and an int32 group index per input column where groups follow an activation
        order (``reordered``)."""
        w = self.weights
        if w.salient_percent is not None:  # rows of both kinds of codes fill whole words; a 4-bit grid per row
            salient = w.salient_count(in_features)
            words = -(-(in_features - salient) // 32) + -(-4 * salient // 32)
            return (32 * words + SCALE_BITS["half"] + 4) / in_features
        if w.superblocks:
            count = 1 if w.symmetric else 2  # scales, and minima beside them
            return w.bits + count * (SCALE_BITS[w.scale_format] / w.grouping.width(SUPER_WIDTH) + 16 / SUPER_WIDTH)
        per_group = SCALE_BITS[w.scale_format] + (0 if w.symmetric else 16 if w.float_zeros else w.bits)
        index = 32.0 / out_features if reordered else 0.0
        index += 32.0 / (out_features * in_features) if w.scale_format == "e4m3" else 0.0
        rows = out_features / -(-out_features // BLOCK) if w.grouping.kind == "block" else 1.0
        return w.bits + per_group / (rows * w.grouping.width(w.grouping.length((out_features, in_features)))) + index

    def to_json(self) -> dict[str, Any]:
        w = self.weights
        data = {"bits": w.bits, "group_size": w.grouping.size, "axis": w.grouping.axis, "quantizer": w.quantizer}
        told = w.grouping.kind in ("channel", "group") and w.salient_percent is None and not w.superblocks
        if str(self) != self.weights_text or not told:
            return {**data, "scheme": str(self)}
        if w.float_format is None:
            return data
        return {**data, "float_format": dataclasses.asdict(w.float_format), "scale_format": w.scale_format}

    @staticmethod
    def from_json(data: dict[str, Any]) -> QuantScheme:
        """The inverse of `to_json`.

        Raises:
            ToolkitError, TypeError, KeyError: the data describes no scheme.
        """
        if "scheme" in data:  # quantized activations, or one step for a tensor, which the other keys do not tell
            return parse_scheme(str(data["scheme"]))
        size = data["group_size"]
        kind = "channel" if size is None else "group"
        grouping = built(Grouping, {"kind": kind, "size": size, "axis": data.get("axis", "in")})
        if not (size is None or size > 0) or not (type(data["bits"]) is int and 1 <= data["bits"] <= 8):
            raise TypeError(f"{data['bits']} bits in groups of {size}")
        if data["quantizer"] == "float":
            number = built(FloatFormat, data["float_format"])
            weights = TensorQuant.of_floats(number, grouping, data["scale_format"])
        else:
            weights = TensorQuant(data["bits"], grouping, data["quantizer"])
        built(TensorQuant, dict(vars(weights)))
        return QuantScheme(weights)


FLOAT_PRESETS: dict[str, TensorQuant] = {
    "mxfp4": TensorQuant.of_floats(E2M1, Grouping("group", 32), "e8m0"),
    "nvfp4": TensorQuant.of_floats(E2M1, Grouping("group", 16), "e4m3"),
    "mxfp8": TensorQuant.of_floats(E4M3FN, Grouping("group", 32), "e8m0"),
}
FLOAT_BITS = (4, 5, 6, 7, 8)
K_QUANTS: dict[str, TensorQuant] = {
    "q2_k": TensorQuant(2, Grouping("group", 16), "asym_super", scale_format="k4"),
    "q3_k": TensorQuant(3, Grouping("group", 16), "sym_super", scale_format="k6"),
    "q4_k": TensorQuant(4, Grouping("group", 32), "asym_super", scale_format="k6"),
    "q5_k": TensorQuant(5, Grouping("group", 32), "asym_super", scale_format="k6"),
    "q6_k": TensorQuant(6, Grouping("group", 16), "sym_super", scale_format="k8"),
}
"""GGUF's K-quants (llama.cpp, ``ggml-quants.c``)."""

_KINDS = ("", "-sym", "-asym")
_FLOAT_SCHEME = re.compile(r"fp(\d)-e(\d)m(\d)(fn)?(?:-((?:g|ic)\w+))?")
_SCHEME = re.compile(r"w(\d+)a16(?:-((?:g|ic)\w+?))?(?:-(sym|asym|asym_float|" + "|".join(QUANTIZERS) + r"))?")


def parse_scheme(text: str, default: Kind = "sym") -> QuantScheme:
    """``w4a16-g128-sym``, ``w8a8``, ``w4a4kv4-atoken``, ``mxfp4``, ``nvfp4``, ``fp4-e2m1-g128`` and their relatives.

    Suffixes may come in any order; those of activations are described in `ptq.activations`. The group part defaults to
    ``g128`` (``gchannel`` where inputs are quantized); without ``-sym`` or ``-asym`` the grid is ``default``.
    The full quantizer names are accepted in place of the suffix (recipes use them), ``-asym_float`` for zero points
    that are floats, and names of other tools, see `ptq.scheme_names`. Case does not count.

    Raises:
        ToolkitError: the text is no scheme, or the bits or the group size are not on offer.
    """
    choices = f"w{{{','.join(map(str, BITS))}}}a16-{{{','.join(f'g{g}' for g in GROUP_SIZES)},gchannel}}[-sym|-asym]"
    choices += f", {', '.join(FLOAT_PRESETS)}, fp4-e2m1-g128 or w1a16-salient20"
    choices += f"; for GGUF {', '.join([*GGUF_BLOCKS, *K_QUANTS])}; ic instead of g groups along the outputs"
    choices += f"; with quantized activations {', '.join(PRESETS)}; or int4, int8"
    weights_text, inputs, cache = take_activations(plain_name(text))
    plain = _grouping_first(weights_text.strip().lower())
    if plain in K_QUANTS:
        return QuantScheme(K_QUANTS[plain], inputs, cache)
    if plain in FLOAT_PRESETS:
        return QuantScheme(FLOAT_PRESETS[plain], inputs, cache)
    if plain.startswith("w1a16-salient") and plain.removeprefix("w1a16-salient").isdigit():
        percent = int(plain.removeprefix("w1a16-salient"))
        if percent > 100:
            raise ToolkitError(f"scheme: '{text}' has {percent} % salient columns", "use w1a16-salient20")
        return QuantScheme(TensorQuant(1, Grouping("channel"), "binary", salient_percent=percent), inputs, cache)
    if plain.startswith("fp"):
        return QuantScheme(_parse_floats(text, plain, choices), inputs, cache)
    match = _SCHEME.fullmatch(plain)
    if match is None:
        known = [f"w{b}a16-{g}{k}" for b in BITS for g in (*(f"g{n}" for n in GROUP_SIZES), "gchannel") for k in _KINDS]
        closest = nearest(plain, [*known, *FLOAT_PRESETS, *GGUF_BLOCKS, *K_QUANTS]) or "for example w4a16-g128-sym: "
        raise ToolkitError(f"scheme: '{text}' is not a weight scheme", f"{closest}write it as {choices}")
    bits, kind = int(match[1]), match[3]
    if bits not in BITS:
        raise ToolkitError(f"scheme: '{text}' asks for {bits}-bit weights", f"use one of {choices}")
    kinds: dict[str, Quantizer] = {"sym": integer_quantizer(bits, "sym"), "asym": integer_quantizer(bits, "asym")}
    kinds |= {name: name for name in (*get_args(IntegerQuantizer), "asym_float")}
    weights = TensorQuant(bits, _parse_grouping(text, match[2], choices), kinds[kind or default])
    return QuantScheme(weights, inputs, cache)


def _parse_grouping(text: str, group: str | None, choices: str) -> Grouping:
    """``g128``, ``gchannel``, ``ic64`` and so on; None is ``g128``."""
    group = group or "g128"
    axis: Axis = "out" if group.startswith("ic") else "in"
    size = group.removeprefix("ic" if axis == "out" else "g")
    if size == "channel":
        return Grouping("channel", None, axis)
    if size == "tensor" and axis == "in":
        return Grouping("tensor")
    if size.isdigit() and int(size) in GROUP_SIZES:
        return Grouping("group", int(size), axis)
    raise ToolkitError(f"scheme: '{text}' asks for group '{group}'", f"use one of {choices}")


def _parse_floats(text: str, plain: str, choices: str) -> TensorQuant:
    """``fp4-e2m1-g128`` and its relatives, with bf16 scales."""
    if plain == f"fp8-{E4M3FN}-gblock":
        return TensorQuant.of_floats(E4M3FN, Grouping("block", BLOCK))
    known = [f"fp{bits}-{number}" for bits in FLOAT_BITS for number in float_formats(bits)] + [f"fp8-{E4M3FN}"]
    match = _FLOAT_SCHEME.fullmatch(plain)
    if match is None or f"fp{match[1]}-e{match[2]}m{match[3]}{match[4] or ''}" not in known:
        reason = "is not a float scheme (1 + E + M bits, E from 1 to 5)"
        raise ToolkitError(f"scheme: '{text}' {reason}", f"{nearest(plain, known)}use one of {', '.join(known)}")
    grouping = _parse_grouping(text, match[5], choices)
    return TensorQuant.of_floats(FloatFormat(int(match[2]), int(match[3]), bool(match[4])), grouping)


def _grouping_first(text: str) -> str:
    """The suffixes of a weight in the order in which they are printed."""
    head, *suffixes = text.split("-")
    return "-".join([head, *sorted(suffixes, key=lambda word: not word.startswith(("e", "g", "ic")))])
