"""The reference kernel: plain torch, every scheme, every device, and the oracle of all other kernels.

It dequantizes the layer on every call, a block of rows at a time, so it saves memory but no time. Its weights are bit
for bit those of ``q.dequantize(x.dtype)``; its sums differ from one product with that weight in their order at most.
"""

from __future__ import annotations

import torch

from ptq.numerics.binary import mixed_values, unpack_mask
from ptq.numerics.floats import levels_of
from ptq.quantized import BINARY, QuantizedTensor
from ptq.runtime.kernels.kernel import Kernel, KernelQuery, Packed

BLOCK_ELEMENTS = 2**19
"""Weights dequantized at a time on a CPU: 2 MiB of float32 stay in a core's cache and in reused memory. A whole
layer's temporary is fresh pages on every call: several times as long for one token and a large layer."""


def _supports(query: KernelQuery) -> str | None:
    return None


def _pack(q: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """codes uint8 ``[out, in]``, step float32 ``[lines, G]``; where present zero uint8 ``[lines, G]``, group_index.

    Codes stay one byte each below 8 bits too: unpacking a dense bit stream takes more passes over the weight than
    dequantizing it does.
    """
    named = {"codes": q.codes, "step": q.step, "zero": q.zero, "group_index": q.group_index}
    if q.scheme.weights.salient_percent is not None:
        named |= {name: q.parts[name] for name in BINARY}
    return {name: tensor.to(device).contiguous() for name, tensor in named.items() if tensor is not None}


def dequantize_rows(packed: Packed, rows: slice, query: KernelQuery, dtype: torch.dtype) -> torch.Tensor:
    """Rows of level times step as ``[rows, in]`` in ``dtype``; float32 inside.

    The same products in the same order as `QuantizedTensor.dequantize`, so the same bits.
    """
    codes, step, zero = packed["codes"][rows], packed["step"], packed.get("zero")
    if query.binary:
        assert zero is not None
        mask = unpack_mask(packed["salient"], query.in_features)
        scale, mean = packed["binary_scale"][rows], packed["binary_mean"][rows]
        return mixed_values(codes, step[rows], zero[rows], mask, scale, mean, packed["column_scale"]).to(dtype)
    index = packed.get("group_index")
    w = codes.float() if query.float_format is None else levels_of(codes, query.float_format)
    if query.axis == "out":  # line j belongs to column j, and a row takes the group it lies in
        group = torch.arange(rows.start, rows.start + len(codes), device=codes.device) // query.group_width
        s, z = step[:, group].T, None if zero is None else zero[:, group].T
    elif index is not None:
        s, z = step[rows][:, index], None if zero is None else zero[rows][:, index]
    else:
        w, s = w.view(len(codes), step.shape[1], -1), step[rows].unsqueeze(-1)
        z = None if zero is None else zero[rows].unsqueeze(-1)
    if query.float_format is None:
        w = w.sub_(2 ** (query.bits - 1)) if z is None else w.sub_(z)
    return w.mul_(s).view(codes.shape).to(dtype)


def _run(x: torch.Tensor, packed: Packed, query: KernelQuery) -> torch.Tensor:
    out, width = query.out_features, query.in_features
    bias = packed.get("bias")
    bias = None if bias is None else bias.to(x.dtype)
    height = max(16, BLOCK_ELEMENTS // width) if x.device.type == "cpu" else out
    products = []
    for start in range(0, out, height):
        rows = slice(start, start + height)
        weight = dequantize_rows(packed, rows, query, x.dtype)
        products.append(torch.nn.functional.linear(x, weight, None if bias is None else bias[rows]))
    return products[0] if len(products) == 1 else torch.cat(products, dim=1)


REFERENCE = Kernel("reference", _supports, _pack, _run, any_device=True, any_dtype=True, float_zeros=True)
