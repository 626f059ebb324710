"""K-quants of GGUF: codes, integers of groups and float16 scales of 256 weights as bytes, and back.

======  =====  ============================================================================================
type    bytes  layout of a super-block
======  =====  ============================================================================================
Q2_K    84     16 bytes, scale low and minimum high; 64 bytes of codes; d; dmin
Q3_K    110    32 bytes of third bits; 64 bytes of low two bits; 12 bytes of scales + 32, 6 bits each; d
Q4_K    144    d; dmin; 12 bytes of scales and minima, 6 bits each; 128 bytes of codes
Q5_K    176    d; dmin; 12 bytes of scales and minima; 32 bytes of fifth bits; 128 bytes of low four bits
Q6_K    210    128 bytes of low four bits; 64 bytes of high two bits; 16 signed scales; d
======  =====  ============================================================================================

Two-bit fields: byte l of half h holds elements 128 h + l + 32 k in bits 2k, 2k + 1. Four-bit fields of Q4_K and Q5_K:
byte l of quarter p holds elements 64 p + l (low) and 64 p + 32 + l (high); of Q6_K: byte l (of 64) of half h holds
128 h + l and 128 h + 64 + l. Single bits: bit k of byte l belongs to element 32 k + l. Source: ``ggml-common.h`` and
``dequantize_row_q*_K`` in llama.cpp.
"""

from __future__ import annotations

import torch

from ptq.quantized import QuantizedTensor
from ptq.scheme import SUPER_WIDTH, QuantScheme

SCALE_SHIFT = 32  # of Q3_K's unsigned six bits


def _fields(codes: torch.Tensor, bits: int, run: int) -> torch.Tensor:
    """Codes ``[..., 256]`` below 2^bits in bytes: 8 / bits elements that lie ``run`` apart share one."""
    per_byte = 8 // bits
    parts = codes.unflatten(-1, (-1, per_byte, run))
    octets = parts[..., 0, :]
    for k in range(1, per_byte):
        octets = octets | (parts[..., k, :] << (bits * k))
    return octets.flatten(-2)


def _from_fields(octets: torch.Tensor, bits: int, run: int) -> torch.Tensor:
    """The inverse of `_fields`."""
    parts = octets.unflatten(-1, (-1, run))
    fields = [parts >> (bits * k) & (2**bits - 1) for k in range(8 // bits)]
    return torch.stack(fields, dim=-2).flatten(-3)


def _pack_scales(scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    """8 scales and 8 minima of 6 bits ``[..., 8]`` as 12 bytes: the low 6 bits of bytes 0-7 are those of groups 0-3,
    bytes 8-11 the low 4 bits of groups 4-7, whose high 2 bits are on top of bytes 0-7."""
    first = scale[..., :4] | (scale[..., 4:] >> 4 << 6)
    second = minimum[..., :4] | (minimum[..., 4:] >> 4 << 6)
    return torch.cat((first, second, (scale[..., 4:] & 15) | ((minimum[..., 4:] & 15) << 4)), dim=-1)


def _unpack_scales(octets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `_pack_scales`."""
    first, second, third = octets.split(4, dim=-1)
    scale = torch.cat((first & 63, (third & 15) | (first >> 6 << 4)), dim=-1)
    return scale, torch.cat((second & 63, (third >> 4) | (second >> 6 << 4)), dim=-1)


def _pack_signed(scale: torch.Tensor) -> torch.Tensor:
    """16 scales of 6 bits ``[..., 16]`` as 12 bytes: 4 low bits of scales j and j + 8 in byte j, then 2 high bits of
    scales j, j + 4, j + 8, j + 12 in byte 8 + j."""
    low = (scale[..., :8] & 15) | ((scale[..., 8:] & 15) << 4)
    return torch.cat((low, _fields(scale >> 4, 2, 4)), dim=-1)


def _unpack_signed(octets: torch.Tensor) -> torch.Tensor:
    """The inverse of `_pack_signed`."""
    low, high = octets[..., :8], octets[..., 8:]
    return torch.cat((low & 15, low >> 4), dim=-1) | (_from_fields(high, 2, 4) << 4)


def _half_bytes(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.float16).contiguous().unsqueeze(-1).view(torch.uint8)


def encode(q: QuantizedTensor) -> torch.Tensor:
    """uint8 ``[out, bytes of a row]``."""
    assert q.super_scale is not None
    bits, codes = q.scheme.weights.bits, q.codes.unflatten(1, (-1, SUPER_WIDTH))
    blocks = codes.shape[1]
    signed = q.scale.unflatten(1, (blocks, -1)).to(torch.int16)
    scale, d = (signed & 255).to(torch.uint8), _half_bytes(q.super_scale)
    if q.zero is not None and q.super_min is not None:
        minimum, m = q.zero.unflatten(1, (blocks, -1)), _half_bytes(q.super_min)
        if bits == 2:
            parts = [scale | (minimum << 4), _fields(codes, 2, 32), d, m]
        else:
            parts = [d, m, _pack_scales(scale, minimum)]
            parts += [_fields(codes >> 4, 1, 32)] if bits == 5 else []
            parts.append(_fields(codes & 15, 4, 32))
    elif bits == 3:
        shifted = (signed + SCALE_SHIFT).to(torch.uint8)
        parts = [_fields(codes >> 2, 1, 32), _fields(codes & 3, 2, 32), _pack_signed(shifted), d]
    else:
        parts = [_fields(codes & 15, 4, 64), _fields(codes >> 4, 2, 32), scale, d]
    return torch.cat(parts, dim=-1).flatten(1)


SIZES: dict[int, tuple[int, ...]] = {
    2: (16, 64, 2, 2),
    3: (32, 64, 12, 2),
    4: (2, 2, 12, 128),
    5: (2, 2, 12, 32, 128),
    6: (128, 64, 16, 2),
}
"""Bytes of the parts of a super-block, by bits."""


def decode(octets: torch.Tensor, scheme: QuantScheme) -> QuantizedTensor:
    """The inverse of `encode`, bit for bit; bytes ``[out, bytes of a row]``."""
    bits = scheme.weights.bits
    parts = octets.unflatten(1, (-1, sum(SIZES[bits]))).split(SIZES[bits], dim=-1)
    minimum = m = None
    if bits == 2:
        scale, minimum, codes, d, m = parts[0] & 15, parts[0] >> 4, _from_fields(parts[1], 2, 32), parts[2], parts[3]
    elif bits == 3:
        codes = _from_fields(parts[1], 2, 32) | (_from_fields(parts[0], 1, 32) << 2)
        scale, d = _unpack_signed(parts[2]), parts[3]
    elif bits == 6:
        codes = _from_fields(parts[0], 4, 64) | (_from_fields(parts[1], 2, 32) << 4)
        scale, d = parts[2], parts[3]
    else:
        d, m, (scale, minimum), codes = parts[0], parts[1], _unpack_scales(parts[2]), _from_fields(parts[-1], 4, 32)
        codes = codes | (_from_fields(parts[3], 1, 32) << 4) if bits == 5 else codes
    values = scale.float() - SCALE_SHIFT if bits == 3 else scale.contiguous().view(torch.int8).float()
    halves = [None if t is None else t.contiguous().view(torch.float16).squeeze(-1).float() for t in (d, m)]
    return QuantizedTensor(
        codes.flatten(1),
        values.flatten(1),
        None if minimum is None else minimum.flatten(1),
        scheme,
        super_scale=halves[0],
        super_min=halves[1],
    )
