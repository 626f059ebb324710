"""How inputs of linears and the KV cache are quantized. Plain values that round-trip through the scheme's text.

The text of a scheme begins with the widths, ``w8a8``, ``w4a4kv4``, and goes on with suffixes in any order. Those of
this file are ``atoken``, ``atensor``, ``astatic``, ``achannel`` and ``ag128`` (what shares a step), ``azp`` (zero
points), ``rs128`` and its relatives (Runtime Smooth); the others describe the weight, see `ptq.scheme`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from calibration.errors import ToolkitError, nearest

Kind = Literal["int", "fp8-e4m3", "fp4-e2m1", "nvfp4", "mxfp4", "mxfp8"]
Granularity = Literal["tensor", "token", "channel", "group"]
BLOCK_FLOATS: dict[str, tuple[int, bool]] = {"nvfp4": (16, False), "mxfp4": (32, True), "mxfp8": (32, True)}
"""Channels of a token that share a step, and whether all of it follows from the live input, by kind of float."""
FLOAT_KINDS: dict[str, Kind] = {
    "fp8": "fp8-e4m3",
    "fp4": "fp4-e2m1",
    "nvfp4": "nvfp4",
    "mxfp4": "mxfp4",
    "mxfp8": "mxfp8",
}
"""Kinds of floats by what stands behind the a in a scheme."""
INPUT_BITS = (4, 6, 8)
CACHE_BITS = (4, 8)
FLOAT_INPUTS = 16  # "a16": inputs stay in the model's dtype


@dataclass(frozen=True)
class RuntimeSmooth:
    """Runtime Smooth (Yi et al. 2024, arXiv 2409.20361): inputs are divided by channel maxima of the live input.

    Attributes:
        group: channels that share a smoothing scale, adjacent after sorting; 1 smooths every channel by itself.
        reorder: sort channels by their maxima first; otherwise groups are runs of adjacent channels.
        block: tokens over which maxima are taken, so that no token depends on a later block; None takes the whole
            sequence, as published.
    """

    group: int = 128
    reorder: bool = True
    block: int | None = None

    def __str__(self) -> str:
        return f"rs{self.group}" + ("" if self.reorder else "n") + (f"b{self.block}" if self.block else "")


@dataclass(frozen=True)
class ActivationQuant:
    """A grid for the input ``X [tokens, in]`` of a linear.

    Attributes:
        bits: of a code.
        kind: integers, or the floats E4M3 (8 bits, largest value 448) or E2M1 (4 bits, 6). "nvfp4" is E2M1 in groups of
            16 channels with E4M3 steps under a calibrated one for the tensor, "mxfp4" in groups of 32 with powers of 2,
            "mxfp8" E4M3 in such groups.
        granularity: what shares a step: all of X, a token, an input channel, or ``group_size`` channels of a token.
        dynamic: ranges of the live input; otherwise calibrated ones, stored as the parts ``input_scale`` and
            ``input_zero``.
        symmetric: no zero points.
        smooth: Runtime Smooth before quantization.
    """

    bits: int = 8
    kind: Kind = "int"
    granularity: Granularity = "token"
    dynamic: bool = True
    symmetric: bool = True
    group_size: int | None = None
    smooth: RuntimeSmooth | None = None

    @property
    def bounds(self) -> tuple[int, int]:
        """Lowest and highest code; codes are signed."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    @property
    def number(self) -> str:
        """``a8``, ``afp8``, ``afp4``, ``anvfp4``, ``amxfp4`` or ``amxfp8``"""
        if self.kind in BLOCK_FLOATS:
            return f"a{self.kind}"
        return f"a{self.bits}" if self.kind == "int" else f"afp{self.bits}"

    @property
    def suffix(self) -> str:
        """``atoken``, ``ag128-azp``, ``astatic`` ...; nothing where the kind says it all."""
        if self.kind in BLOCK_FLOATS:
            return ""
        shared = f"g{self.group_size}" if self.granularity == "group" else self.granularity
        words = ["a" + ("static" if not self.dynamic and shared == "tensor" else shared)]
        words += [] if self.symmetric else ["azp"]
        return "-".join(words + ([] if self.smooth is None else [str(self.smooth)]))


@dataclass(frozen=True)
class CacheQuant:
    """A grid for keys and values, one per token and head: integers with zero points, or E4M3 (symmetric). A static one
    is symmetric and has one calibrated step for all keys of a layer and one for all its values."""

    bits: int
    kind: Kind = "int"
    static: bool = False

    @property
    def grid(self) -> ActivationQuant:
        """The same grid for ``[..., tokens, head width]``."""
        if self.static:
            return ActivationQuant(self.bits, self.kind, "tensor", dynamic=False)
        return ActivationQuant(self.bits, self.kind, symmetric=self.kind != "int")

    @property
    def suffix(self) -> str:
        """``kvstatic``, or nothing."""
        return STATIC_CACHE if self.static else ""

    def __str__(self) -> str:
        return "kvfp8" if self.kind == "fp8-e4m3" else f"kv{self.bits}"


SHARED: dict[str, tuple[Granularity, bool]] = {
    "atoken": ("token", True),
    "atensor": ("tensor", True),
    "astatic": ("tensor", False),
    "achannel": ("channel", False),
}
"""What shares a step, and whether its range is dynamic, by suffix."""

STATIC_CACHE = "kvstatic"
WEIGHT_SYNONYMS = {"wtensor": "gtensor", "wchannel": "gchannel"}
PRESETS = ("w8a8", "w6a6", "w4a8", "w4a4", "w4a4kv4", "fp8")
_INPUTS = r"a(\d+|fp8|fp4|nvfp4|mxfp4|mxfp8)"
_HEAD = re.compile(rf"(w\d+){_INPUTS}(?:kv(\d+|fp8))?")
_FLOAT = re.compile(r"e\dm\d")
_WIDTH = re.compile(rf"{_INPUTS}|kv(\d+|fp8)")
_GROUP = re.compile(r"ag(\d+)")
_SMOOTH = re.compile(r"rs(\d+)(n?)(?:b(\d+))?")
_OF_WEIGHTS = re.compile(r"(g|ic)\w+|a?sym\w*")


def with_activations(weights: str, inputs: ActivationQuant | None, cache: CacheQuant | None) -> str:
    """The text of a scheme, from that of its weights (``w8a16-gchannel-sym``)."""
    head, _, rest = weights.partition("-")
    number, kv, suffix = (inputs.number, str(cache or ""), inputs.suffix) if inputs else ("", str(cache or ""), "")
    static = cache.suffix if cache else ""
    if _HEAD.fullmatch(head):
        return "-".join(filter(None, [(head.replace("a16", number) if number else head) + kv, rest, suffix, static]))
    return "-".join(filter(None, [weights, number, kv, suffix, static]))


def take_activations(text: str) -> tuple[str, ActivationQuant | None, CacheQuant | None]:
    """Split the text of a scheme into that of its weights, the grid of the inputs, and the grid of the KV cache.

    Integer weights whose inputs are quantized too have one step per row (``gchannel``) unless the text says otherwise.
    Where the text begins with a float format, the widths of activations are suffixes: ``mxfp4-a8-kv8``. ``fp8`` is
    E4M3 on both sides, ``fp8-e4m3fn-gchannel-afp8-atoken``.

    Raises:
        ToolkitError: widths that are not on offer, or a suffix that is unknown or needs quantized inputs.
    """
    words = [WEIGHT_SYNONYMS.get(word, word) for word in text.strip().lower().split("-")]
    if words[0] == "fp8" and not any(_FLOAT.match(word) for word in words):
        words[1:1] = ["e4m3fn", *([] if any(_WIDTH.fullmatch(word) for word in words) else ["afp8"])]
        words += [] if any(word.startswith("g") for word in words) else ["gchannel"]
    head = _HEAD.fullmatch(words[0])
    widths = (head[2], head[3]) if head else _width_suffixes(words)
    cache = _cache(text, widths[1], STATIC_CACHE in words)
    words = [word for word in words if word != STATIC_CACHE]
    mine = [w for w in words[1:] if w in SHARED or w == "azp" or _GROUP.fullmatch(w) or _SMOOTH.fullmatch(w)]
    others = [w for w in words[1:] if w not in mine and (head or not _WIDTH.fullmatch(w))]
    if widths[0] == str(FLOAT_INPUTS):
        if mine:
            reason = f"'{mine[0]}' says how inputs are quantized, and a16 leaves them alone"
            fix = f"write {head[1]}a8 in front" if head else "add a8"
            raise ToolkitError(f"scheme: '{text}': {reason}", f"{fix}, or leave '{mine[0]}' out")
        return "-".join([f"{head[1]}a16" if head else words[0], *others]), None, cache
    if head is None:
        return "-".join([words[0], *others]), _inputs(text, widths[0], mine), cache
    for word in others:
        if not _OF_WEIGHTS.fullmatch(word):
            known = [*SHARED, *WEIGHT_SYNONYMS, "ag128", "azp", "rs128", "sym", "asym", "g128", "gchannel"]
            fix = f"{nearest(word, known)}suffixes are {', '.join(known)}"
            raise ToolkitError(f"scheme: '{text}' has the unknown suffix '{word}'", fix)
    if not any(word.startswith(("g", "ic")) for word in others):
        others.insert(0, "gchannel")
    return "-".join([f"{head[1]}a16", *others]), _inputs(text, head[2], mine), cache


def _width_suffixes(words: list[str]) -> tuple[str, str | None]:
    """Widths of inputs and cache that are suffixes."""
    found = [match for word in words[1:] if (match := _WIDTH.fullmatch(word))]
    inputs = next((m[1] for m in found if m[1]), str(FLOAT_INPUTS))
    return inputs, next((m[2] for m in found if m[2]), None)


def _inputs(text: str, number: str, suffixes: list[str]) -> ActivationQuant:
    if number in BLOCK_FLOATS:
        if suffixes:
            reason = f"'{suffixes[0]}' says what shares a step, and {number} inputs have fixed groups"
            raise ToolkitError(f"scheme: '{text}': {reason}", f"leave '{suffixes[0]}' out, or use afp4")
        kind = FLOAT_KINDS[number]
        width, live = BLOCK_FLOATS[kind]
        return ActivationQuant(int(number[-1]), kind, "group", live, True, width)
    floats = number.startswith("fp")
    if not floats and int(number) not in INPUT_BITS:
        choices = ", ".join(map(str, INPUT_BITS))
        fix = f"use {choices}, {', '.join(FLOAT_KINDS)}, or 16 for none"
        raise ToolkitError(f"scheme: '{text}' asks for {number}-bit inputs", fix)
    shared = [w for w in suffixes if w in SHARED or _GROUP.fullmatch(w)]
    smooth = [found for w in suffixes if (found := _SMOOTH.fullmatch(w))]
    if len(shared) > 1 or len(smooth) > 1:
        twice = shared[:2] if len(shared) > 1 else [found[0] for found in smooth[:2]]
        raise ToolkitError(f"scheme: '{text}': {' and '.join(twice)} exclude each other", "keep one of them")
    size = _GROUP.fullmatch(shared[0]) if shared else None
    group: tuple[Granularity, bool] = ("group", True)
    granularity, dynamic = group if size else SHARED[shared[0] if shared else "atoken"]
    widths = [
        int(n) for found in (size, smooth[0] if smooth else None) if found for n in found.groups() if n and n != "n"
    ]
    if 0 in widths:
        raise ToolkitError(f"scheme: '{text}' asks for groups of 0", "use a positive number, for example 128")
    quant = ActivationQuant(
        bits=int(number.removeprefix("fp")),
        kind=FLOAT_KINDS.get(number, "int"),
        granularity=granularity,
        dynamic=dynamic,
        symmetric="azp" not in suffixes,
        group_size=int(size[1]) if size else None,
        smooth=_smooth(smooth[0]) if smooth else None,
    )
    if floats and not quant.symmetric:
        raise ToolkitError(f"scheme: '{text}': floats have no zero points", "leave 'azp' out")
    if quant.smooth is not None and (granularity != "token" or floats or not quant.symmetric):
        reason = "Runtime Smooth goes with symmetric integers per token"
        raise ToolkitError(f"scheme: '{text}': {reason}", f"leave '{quant.smooth}' out, or use -atoken alone")
    return quant


def _smooth(found: re.Match[str]) -> RuntimeSmooth:
    return RuntimeSmooth(int(found[1]), not found[2], int(found[3]) if found[3] else None)


def _cache(text: str, number: str | None, static: bool) -> CacheQuant | None:
    if number is None or number == str(FLOAT_INPUTS):
        if static:
            fix = "write kvfp8 or kv8 behind the inputs, or leave it out"
            raise ToolkitError(f"scheme: '{text}': '{STATIC_CACHE}' says how a KV cache is quantized, and none is", fix)
        return None
    if number == "fp8":
        return CacheQuant(8, "fp8-e4m3", static)
    if int(number) not in CACHE_BITS:
        choices = ", ".join(map(str, CACHE_BITS))
        raise ToolkitError(f"scheme: '{text}' asks for a {number}-bit KV cache", f"use kv with {choices} or fp8")
    return CacheQuant(int(number), static=static)
