"""Runtime Smooth on CUDA: one Triton program for the product of 4-bit codes, with S_g applied as each group ends.

Weights stay packed, two outputs per byte along W's rows, so that columns in any order can be gathered as they are
loaded. Maxima, order and codes of the inputs are made by torch. The program is tested in Triton's interpreter; it has
not been timed on a GPU here.
"""

from __future__ import annotations

import importlib.util

import torch

from ptq.numerics.activations import quantize_smoothed
from ptq.quantized import QuantizedTensor
from ptq.runtime.kernels.kernel import Kernel, KernelQuery, Packed

SMALLEST_GROUP = 16


def _supports(query: KernelQuery) -> str | None:
    inputs = query.inputs
    if inputs is None or inputs.smooth is None:
        return "it is for inputs that Runtime Smooth divides"
    if query.device_type != "cuda":
        return f"it runs on CUDA, not on {query.device_type}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if query.bits > 4 or not query.symmetric or query.float_format is not None:
        return "it holds symmetric integer codes of at most 4 bits"
    if not query.channelwise:
        return f"it takes one scale per output row, not groups of {query.group_width}"
    if inputs.smooth.group < SMALLEST_GROUP:
        return f"smoothing groups of {inputs.smooth.group} leave a tile empty"
    return None


def pack_outputs(codes: torch.Tensor) -> torch.Tensor:
    """Codes ``[out, in]`` in [-8, 7] to uint8 ``[in, ceil(out / 2)]``: code + 8, an even output in the low half."""
    unsigned = (codes.to(torch.int16) + 8).to(torch.uint8).T
    unsigned = torch.nn.functional.pad(unsigned, (0, unsigned.shape[1] % 2))
    return (unsigned[:, 0::2] | unsigned[:, 1::2] << 4).contiguous()


def _pack(q: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """codes uint8 ``[in, ceil(out / 2)]``, scale float32 ``[out]``."""
    signed = q.codes.to(torch.int16) - q.zero_point
    return {"codes": pack_outputs(signed).to(device), "scale": q.scale.view(-1).float().to(device)}


def _run(x: torch.Tensor, packed: Packed, query: KernelQuery) -> torch.Tensor:
    from ptq.runtime.kernels.smoothed_triton import smoothed_product

    assert query.inputs is not None and query.inputs.smooth is not None
    smooth, parts = query.inputs.smooth, []
    for part in x.split(smooth.block) if smooth.block else (x,):
        codes, order, scales, steps = quantize_smoothed(part, query.inputs)
        y = smoothed_product(codes, packed["codes"], order, scales, steps.view(-1), packed["scale"], smooth.group)
        parts.append(y)
    y, bias = torch.cat(parts), packed.get("bias")
    return (y if bias is None else y + bias.float()).to(x.dtype)


TRITON_SMOOTH = Kernel("triton-smooth", _supports, _pack, _run, any_dtype=True, integer=True)
