"""Codes of 4 or 8 bits by rows, for decoding on CPUs: one token reads each of them once, at the speed of memory.

The layout (``decoding/rows.h``): 32 bytes hold 64 consecutive columns of a row, byte i column i in its low half and
column 32 + i in its high one; 8-bit codes have a byte each. Activations enter as integers of 15 bits per group, so
that products are exact and little is lost: at most 2^-15 of the largest in a group, where bfloat16 activations lose
2^-9 of each. Prompts go the same way, some rows at a time for many tokens.
"""

from __future__ import annotations

import torch

from calibration.errors import ToolkitError
from ptq.quantized import QuantizedTensor
from ptq.runtime.decoding.native import PIECE, code_matrix, library, products
from ptq.runtime.kernels.kernel import Kernel, KernelQuery, Packed
from sparsity.kernels.pages import on_huge_pages


def _supports(query: KernelQuery) -> str | None:
    if query.binary or query.superblocks or query.float_format is not None:
        return "it multiplies integers with one scale per group"
    if query.device_type != "cpu":
        return f"it runs on the CPU, not on {query.device_type}"
    if query.inputs is not None:
        return "it takes inputs that are not quantized"
    if query.axis == "out" or query.group_index:
        return "its groups are consecutive columns of a row"
    if query.bits > 8:
        return f"it holds codes of at most 8 bits, not {query.bits}"
    if query.dtype not in (torch.float32, torch.bfloat16):
        return f"it is made for float32 and bfloat16, not {str(query.dtype).removeprefix('torch.')}"
    step = PIECE if query.bits <= 4 else PIECE // 2
    if not query.channelwise and query.group_width % step and query.group_width != PIECE // 2:
        return f"groups of {query.group_width} columns are neither 32 nor multiples of {step}"
    try:
        library()
    except ToolkitError as error:
        return error.message
    return None


def pack_rows(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes, uint8 ``[out, in]``, to uint8 ``[out, 32 * ceil(in / 64)]``."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % PIECE)).unflatten(1, (-1, 2, PIECE // 2))
    return on_huge_pages((padded[:, :, 0] | padded[:, :, 1] << 4).flatten(1))


def _pack(q: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """codes, see the module; scale ``[out, groups]``, bfloat16 where that is exact, else float32; zero uint8 alike,
    absent where all are in the middle."""
    bits = q.scheme.weights.bits
    wide = bits > 4
    codes, scale = q.codes, q.step.float().expand(q.shape[0], -1).contiguous()
    narrow = scale.to(torch.bfloat16)
    scale = narrow if torch.equal(narrow.float(), scale) else scale
    packed = {"scale": on_huge_pages(scale)}
    if q.zero is None:
        codes = codes + ((128 if wide else 8) - 2 ** (bits - 1))
    else:
        packed["zero"] = on_huge_pages(q.zero.to(torch.uint8).expand(q.shape[0], -1))
    padded = torch.nn.functional.pad(codes, (0, -q.shape[1] % PIECE))
    packed["codes"] = on_huge_pages(padded) if wide else pack_rows(codes)
    return packed


def _run(x: torch.Tensor, packed: Packed, query: KernelQuery) -> torch.Tensor:
    matrix = code_matrix(packed["codes"], packed["scale"], packed.get("zero"), query.in_features)
    y, bias = products(matrix, x.float()), packed.get("bias")
    return (y if bias is None else y.add_(bias)).to(x.dtype)


ROWS = Kernel("rows", _supports, _pack, _run, decoding=True)
