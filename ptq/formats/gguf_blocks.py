"""Blocks of GGUF: our codes as the bytes of ggml's types, and back.

A row of W is a run of blocks of 32 weights (``Q4_0`` and its relatives) or 256 (K-quants, see `gguf_superblocks`).
With d and m in float16, little-endian:

======  =====  ==============================================================  =============
type    bytes  layout                                                          value
======  =====  ==============================================================  =============
Q4_0    18     d; 16 bytes, element j in the low half, j + 16 in the high      (q - 8) d
Q4_1    20     d; m; as Q4_0                                                   q d + m
Q5_0    22     d; 32 fifth bits, element j is bit j; low four bits as Q4_0     (q - 16) d
Q5_1    24     d; m; fifth bits; low four bits                                 q d + m
Q8_0    34     d; 32 signed bytes                                              q d
MXFP4   17     one byte, exponent + 127; FP4 codes as Q4_0                     level 2^e
======  =====  ==============================================================  =============

Source: llama.cpp, ``ggml-common.h``. Groups that are a multiple of 32 repeat their scale in every block of 32.
"""

from __future__ import annotations

import torch

from calibration.errors import ToolkitError
from ptq.formats.narrow_scales import decode_scale, encode_scale
from ptq.quantized import QuantizedTensor
from ptq.scheme import FLOAT_PRESETS, QuantScheme

BLOCK = 32
INTEGERS = {(4, True): "Q4_0", (4, False): "Q4_1", (5, True): "Q5_0", (5, False): "Q5_1", (8, True): "Q8_0"}
"""Type by bits and symmetry."""
LARGEST_HALF = 65504.0


def type_of(scheme: QuantScheme) -> str | None:
    """ggml's name of the type that holds codes of this scheme as they are, or None."""
    w = scheme.weights
    if w.superblocks:
        return f"Q{w.bits}_K"
    if w == FLOAT_PRESETS["mxfp4"]:
        return "MXFP4"
    if w.float_format is not None or w.salient_percent is not None or w.float_zeros or w.grouping.axis == "out":
        return None
    if w.grouping.size is not None and w.grouping.size % BLOCK:
        return None
    return INTEGERS.get((w.bits, w.symmetric))


def _bytes_of_half(values: torch.Tensor) -> torch.Tensor:
    """float16 bytes ``[..., 2]`` of values ``[...]``."""
    return values.to(torch.float16).contiguous().unsqueeze(-1).view(torch.uint8)


def _halves(octets: torch.Tensor) -> torch.Tensor:
    """float32 values ``[...]`` of float16 bytes ``[..., 2]``."""
    return octets.contiguous().view(torch.float16).squeeze(-1).float()


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes ``[..., 32]`` below 16 as bytes ``[..., 16]``."""
    return codes[..., :16] | (codes[..., 16:] << 4)


def _from_nibbles(octets: torch.Tensor) -> torch.Tensor:
    return torch.cat((octets & 15, octets >> 4), dim=-1)


def encode(q: QuantizedTensor) -> torch.Tensor:
    """uint8 ``[out, bytes of a row]``.

    The minimum of Q4_1 and Q5_1 is -scale * zero in float16, whose rounding moves weights by at most 1/128 of a step
    (scales have 8 significant bits, float16 has 11).

    Raises:
        ToolkitError: a scale or minimum that float16 does not hold.
    """
    kind = type_of(q.scheme)
    assert kind is not None, f"{q.scheme} has no type in GGUF"
    codes = q.codes.unflatten(1, (-1, BLOCK))
    if kind == "MXFP4":
        return torch.cat((encode_scale(q.scale, "e8m0").unsqueeze(-1), _nibbles(codes)), dim=-1).flatten(1)
    repeat = codes.shape[1] // q.scale.shape[1]
    scale = q.scale.repeat_interleave(repeat, dim=1)
    if not torch.equal(scale.half().float(), scale):
        lost = scale[scale.half().float() != scale][0]
        raise ToolkitError(
            f"scale {lost.item()!r} is not exact in float16, as GGUF stores it", "quantize the float checkpoint anew"
        )
    parts = [_bytes_of_half(scale)]
    if kind == "Q8_0":
        return torch.cat([*parts, codes ^ 128], dim=-1).flatten(1)
    if q.zero is not None:
        minimum = -scale * q.zero.repeat_interleave(repeat, dim=1)
        if bool((minimum.abs() > LARGEST_HALF).any()):
            raise ToolkitError(
                f"minimum {minimum.abs().max().item()!r} is beyond float16, as GGUF stores it", "use a symmetric scheme"
            )
        parts.append(_bytes_of_half(minimum))
    if kind in ("Q5_0", "Q5_1"):
        place = torch.arange(8, dtype=torch.uint8, device=codes.device)
        fifth = (codes >> 4).unflatten(-1, (4, 8)) << place
        parts.append(fifth.sum(dim=-1, dtype=torch.uint8))
    return torch.cat([*parts, _nibbles(codes & 15)], dim=-1).flatten(1)


def decode(octets: torch.Tensor, scheme: QuantScheme, shape: tuple[int, int]) -> QuantizedTensor:
    """The inverse of `encode`, bit for bit, for the scheme that was encoded; bytes ``[out, bytes of a row]``."""
    kind = type_of(scheme)
    assert kind is not None
    blocks = octets.unflatten(1, (shape[1] // BLOCK, -1))
    if kind == "MXFP4":
        codes = _from_nibbles(blocks[..., 1:]).flatten(1)
        return QuantizedTensor(codes, decode_scale(blocks[..., 0].contiguous()), None, scheme)
    stride = scheme.weights.grouping.width(shape[1]) // BLOCK
    scale, zero = _halves(blocks[..., :2]), None
    if kind == "Q8_0":
        return QuantizedTensor((blocks[..., 2:] ^ 128).flatten(1), scale[:, ::stride].contiguous(), None, scheme)
    rest = blocks[..., 2:]
    if not scheme.weights.symmetric:
        zero = (-_halves(rest[..., :2]) / scale).round()[:, ::stride].to(torch.uint8)
        rest = rest[..., 2:]
    codes = _from_nibbles(rest[..., -16:])
    if kind in ("Q5_0", "Q5_1"):
        place = torch.arange(8, dtype=torch.uint8, device=octets.device)
        codes = codes | ((rest[..., :4].unsqueeze(-1) >> place & 1).flatten(-2) << 4)
    return QuantizedTensor(codes.flatten(1), scale[:, ::stride].contiguous(), zero, scheme)
