"""Schemes by the names that other tools give them, and which texts leave the group size open."""

from __future__ import annotations

import re

GGUF_BLOCKS = {
    "q4_0": "w4a16-g32-sym",
    "q4_1": "w4a16-g32-asym",
    "q5_0": "w5a16-g32-sym",
    "q5_1": "w5a16-g32-asym",
    "q8_0": "w8a16-g32-sym",
}
"""GGUF's plain types, with blocks of 32 weights, are grids that have names here already."""

NAMES = {
    **GGUF_BLOCKS,
    "int4": "w4a16",
    "int8": "w8a8",
    "w4a16_asym": "w4a16-asym",
    "w4afp8": "w4afp8",
    "fp8_dynamic": "fp8",
    "fp8-dynamic": "fp8",
    "nvfp4a16": "nvfp4",
    "mxfp4a16": "mxfp4",
    "mxfp8a16": "mxfp8",
    "fp8_block": "fp8-gblock-ag128",
    "o1": "w8a8-wtensor-atoken",
    "o2": "w8a8-wtensor-atensor",
    "o3": "w8a8-wtensor-astatic",
}
"""Names that llm-compressor (presets, there in capitals), llama.cpp (the block size and the kind of grid of its plain
types) and SmoothQuant (the efficiency levels of Xiao et al. 2022) use. Case does not count. W4A16, W8A8, FP8, NVFP4,
MXFP4 and MXFP8 need no entry: they are schemes here. The last three quantize weights alone, like llm-compressor's
NVFP4A16; FP8 has a step per row and per token, like its FP8_DYNAMIC."""

_GROUP = re.compile(r"(g|ic)(\d+|channel|tensor|block)|w(tensor|channel)|salient\d+")
_FIXED = ("mxfp4", "nvfp4", "mxfp8", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")


def plain_name(text: str) -> str:
    """The scheme that a name stands for; other texts in lower case."""
    lower = text.strip().lower()
    return NAMES.get(lower, lower)


def names_group(text: str) -> bool:
    """Whether the text of a scheme says which weights share a step. Where it does not, the group size may be fitted to
    the matrix."""
    words = plain_name(text).split("-")
    return words[0] in _FIXED or any(_GROUP.fullmatch(word) for word in words)
