"""Codes times codes: quantized inputs and weights through torch's int8 product, ``torch._int_mm`` (CPU and CUDA),
or, on processors without instructions for it, through float32 products whose sums are exact.

With input codes q, step a and zero point z, and weight bytes c, step w and offset o per output row,

    y = a w Σ (q - z)(c - o) = a w (Σ q c - z Σ (c - o) - o Σ q),

all inside the bracket exact in int32. z is 0 for symmetric inputs, o for all weights but asymmetric ones of 8 bits. A
calibrated z makes ``z Σ (c - o)`` a constant per output: it is folded into an integer bias when the layer is packed.

Against the simulation, which multiplies ``x̂ = a (q - z)`` by ``ŵ = w (c - o)`` in float32 (u = 2^-24):
``|y_integer - y_simulated| <= (in + 6) u Σ |x̂| |ŵ|``. Both factors carry one rounding, their product one more, a sum of
``in`` terms in any order ``in - 1``; the integer sum has three: conversion to float32, the product with a, that with w.

Runtime Smooth divides x by S_g before quantizing; columns of x and c are gathered by group and the int32 sum of each
group is multiplied by its S_g on the way into a float32 sum: one rounding more for x̂, and one for each of the groups.
"""

from __future__ import annotations

import torch

from ptq.numerics.activations import quantize_inputs, quantize_smoothed
from ptq.quantized import INPUT_GRID, QuantizedTensor
from ptq.runtime.kernels.kernel import Kernel, KernelQuery, Packed

LONGEST_SUM = 2**17  # 2^7 * 2^7 * 2^17 = 2^31
EXACT = 2**10  # products of bytes whose sum float32 holds exactly: 2^7 * 2^7 * 2^10 = 2^24
FEW = 16  # tokens for which weights are not worth converting
CUDA_MULTIPLE, CUDA_ROWS = 8, 17  # of _int_mm: inputs and outputs in eights, more than 16 tokens


def _supports(query: KernelQuery) -> str | None:
    inputs = query.inputs
    if inputs is None:
        return "it multiplies quantized inputs, and these are not quantized"
    if inputs.kind != "int" or query.float_format is not None:
        return f"it multiplies integers, and the {'inputs' if inputs.kind != 'int' else 'weights'} are floats"
    if inputs.granularity in ("channel", "group"):
        return f"a step per {inputs.granularity} of inputs does not leave the integer sum"
    if inputs.smooth is not None and inputs.smooth.group == 1:
        return "a smoothing scale per channel does not leave the integer sum"
    if not query.channelwise:
        along = "" if query.axis == "in" else " along the outputs"
        return f"it takes one scale per output row, not groups of {query.group_width}{along}"
    if query.device_type not in ("cpu", "cuda"):
        return f"it runs on CPU and CUDA, not on {query.device_type}"
    if query.in_features >= LONGEST_SUM:
        return f"a sum over {query.in_features} inputs may leave int32"
    if query.device_type == "cuda" and (query.in_features % CUDA_MULTIPLE or query.out_features % CUDA_MULTIPLE):
        return f"shape {query.out_features} x {query.in_features} is no multiple of {CUDA_MULTIPLE}"
    return None


def _pack(q: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """codes int8 ``[out, in]`` (code minus zero where that fits), scale float32 ``[out]``; where needed offset int32
    ``[out]``, and integer_bias (static zero point) or row_sum (dynamic ones) int32 ``[out]``."""
    inputs, bits = q.scheme.inputs, q.scheme.weights.bits
    assert inputs is not None, "supports() refuses this scheme"
    codes = q.codes.to(torch.int32)
    offset = None
    if bits == 8 and q.zero is not None:
        codes, offset = codes - 128, q.zero.view(-1).to(torch.int32) - 128
    else:
        codes = codes - q.zero_point
    packed = {"codes": codes.to(torch.int8), "scale": q.scale.view(-1).float()}
    if offset is not None:
        packed["offset"] = offset
    if not inputs.symmetric:
        row_sum = codes.sum(dim=1, dtype=torch.int32) - (0 if offset is None else offset * codes.shape[1])
        zero = q.parts.get(INPUT_GRID[1])
        packed |= {"row_sum": row_sum} if zero is None else {"integer_bias": row_sum * zero.to(torch.int32)}
    return {name: tensor.to(device).contiguous() for name, tensor in packed.items()}


def _product(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int8 ``[tokens, in]`` times int8 ``[out, in]`` to int32 ``[tokens, out]``."""
    tokens = codes.shape[0]
    if codes.shape[1] == 1:  # a last group of one channel: the op takes its transposed weight for something else
        codes, weight = (torch.nn.functional.pad(t, (0, 1)) for t in (codes, weight))
    if not codes.is_cuda and tokens >= FEW and not _multiplies_bytes():
        return _float_product(codes, weight)
    if codes.is_cuda and tokens < CUDA_ROWS:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, CUDA_ROWS - tokens))
    return torch._int_mm(codes, weight.T)[:tokens]


def _multiplies_bytes() -> bool:
    """Whether ``torch._int_mm`` is more than a loop over elements here, 20 to 80 times as slow as a float32 product: it
    needs instructions for products of bytes."""
    asks = getattr(torch.cpu, "_is_vnni_supported", None)
    return asks is not None and bool(asks())


def _float_product(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same integers by products in float32, whose sums are exact over `EXACT` inputs."""
    total = torch.zeros(codes.shape[0], weight.shape[0], dtype=torch.int32)
    for start in range(0, codes.shape[1], EXACT):
        part = slice(start, start + EXACT)
        total += (codes[:, part].float() @ weight[:, part].float().T).to(torch.int32)
    return total


def _run(x: torch.Tensor, packed: Packed, query: KernelQuery) -> torch.Tensor:
    inputs, bias = query.inputs, packed.get("bias")
    assert inputs is not None
    if inputs.smooth is not None:
        parts = x.split(inputs.smooth.block) if inputs.smooth.block else (x,)
        y = (
            torch.cat([_smoothed(part, packed, query) for part in parts])
            if len(x)
            else x.new_zeros(0, query.out_features)
        )
    else:
        codes, step, zero = quantize_inputs(x, inputs, *(packed.get(name) for name in INPUT_GRID))
        bytes_ = codes.to(torch.int8)
        total = _product(bytes_, packed["codes"])
        if "integer_bias" in packed:
            total -= packed["integer_bias"]
        elif zero is not None:
            total -= zero.to(torch.int32) * packed["row_sum"]
        if "offset" in packed:
            total -= bytes_.sum(dim=1, keepdim=True, dtype=torch.int32) * packed["offset"]
        y = total.float().mul_(step).mul_(packed["scale"])
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _smoothed(x: torch.Tensor, packed: Packed, query: KernelQuery) -> torch.Tensor:
    """Runtime Smooth over the tokens of ``x``; float32 ``[tokens, out]`` without the bias."""
    assert query.inputs is not None and query.inputs.smooth is not None
    smooth = query.inputs.smooth
    codes, order, scales, step = quantize_smoothed(x, query.inputs)
    columns = codes.split(smooth.group, dim=1)
    weights = packed["codes"][:, order].split(smooth.group, dim=1)
    y = torch.zeros(x.shape[0], query.out_features, device=x.device)
    for q, c, scale in zip(columns, weights, scales, strict=True):
        y.addcmul_(_product(q.contiguous(), c.contiguous()).float(), scale)
    offset = packed.get("offset")
    if offset is not None:
        sums = torch.stack([q.sum(dim=1, dtype=torch.int32) for q in columns], dim=1).float() @ scales
        y -= sums[:, None] * offset
    return y.mul_(step).mul_(packed["scale"])


INTEGER = Kernel("integer", _supports, _pack, _run, any_dtype=True, integer=True)
