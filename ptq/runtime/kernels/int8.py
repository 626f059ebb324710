"""Codes in one signed byte with one scale per output row: torch's ``_weight_int8pack_mm``.

``y[m, n] = scale[n] * Σ_k x[m, k] * w[n, k]`` with w int8 ``[out, in]``, x and scale bfloat16, sums in float32. The
byte is ``code - zero``, so every product is exact and only the output is rounded: it is closer to the real product
than a bfloat16 weight is.

The op checks no sizes: it reads 16 columns at a time past the end of a row, and with any other number of columns it
returns garbage or kills the process (torch 2.13, AVX-512; found by trying shapes). Hence the rule on columns here.
"""

from __future__ import annotations

import torch

from ptq.quantized import QuantizedTensor
from ptq.runtime.kernels.kernel import Kernel, KernelQuery, Packed


def _supports(query: KernelQuery) -> str | None:
    if query.binary:
        return "it knows no one-bit weights with salient columns"
    if query.float_format is not None:
        return f"it multiplies integers, not {query.float_format} floats"
    if query.device_type != "cpu":
        return f"it runs on the CPU, not on {query.device_type}"
    if query.dtype != torch.bfloat16:
        name = str(query.dtype).removeprefix("torch.")
        return f"it is fast with bfloat16 activations only; with {name} a dequantized product is faster"
    if not query.channelwise:
        along = "" if query.axis == "in" else " along the outputs"
        return f"it takes one scale per output row, not groups of {query.group_width}{along}"
    if query.in_features % 16:
        return f"{query.in_features} input features are no multiple of 16"
    if query.bits > 6 and not query.symmetric:
        return f"{query.bits}-bit codes minus an arbitrary zero point do not fit a signed byte"
    return None


def _pack(q: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """codes int8 ``[out, in]`` (code minus zero), scale ``[out]`` in ``dtype`` (exact).

    An activation order says nothing where a row has one group, so a group index is not needed here.
    """
    shifted = q.codes.to(torch.int16) - q.zero_point
    scale = q.scale.view(-1).to(device=device, dtype=dtype)
    return {"codes": shifted.to(device=device, dtype=torch.int8), "scale": scale}


def _run(x: torch.Tensor, packed: Packed, query: KernelQuery) -> torch.Tensor:
    y = torch._weight_int8pack_mm(x, packed["codes"], packed["scale"])
    bias = packed.get("bias")
    return y if bias is None else y.add_(bias)


INT8 = Kernel("int8", _supports, _pack, _run)
