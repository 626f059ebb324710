"""E4M3 times E4M3: FP8 inputs and weights through ``torch._scaled_mm``.

``y = a w Σ q c`` with a step a per token and w per output row, products in float32. Hardware multiplies FP8 from CUDA
compute capability 8.9 on, in sixteens of inputs and outputs. On CPUs the op exists and is exact, but slower than a
product of dequantized weights, so it runs there only where it is asked for by name.
"""

from __future__ import annotations

import torch

from ptq.float_formats import E4M3FN
from ptq.numerics.activations import quantize_inputs
from ptq.quantized import INPUT_GRID, QuantizedTensor
from ptq.runtime.kernels.kernel import Kernel, KernelQuery, Packed

MULTIPLE = 16
CAPABILITY = (8, 9)


def _supports(query: KernelQuery) -> str | None:
    inputs = query.inputs
    if inputs is None or inputs.kind != "fp8-e4m3" or query.float_format != E4M3FN:
        return "it multiplies E4M3 with E4M3"
    if inputs.granularity in ("channel", "group"):
        return f"a step per {inputs.granularity} of inputs does not leave the sum"
    if not query.channelwise:
        return f"it takes one scale per output row, not groups of {query.group_width}"
    if query.device_type not in ("cpu", "cuda"):
        return f"it runs on CPU and CUDA, not on {query.device_type}"
    if query.device_type == "cuda":
        if query.in_features % MULTIPLE or query.out_features % MULTIPLE:
            return f"shape {query.out_features} x {query.in_features} is no multiple of {MULTIPLE}"
        if torch.cuda.is_available() and torch.cuda.get_device_capability() < CAPABILITY:
            return "it needs a GPU of compute capability 8.9 or later"
    return None


def _pack(q: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """codes float8_e4m3fn ``[out, in]``, scale float32 ``[1, out]``."""
    codes = q.codes.view(torch.float8_e4m3fn)
    return {"codes": codes.to(device).contiguous(), "scale": q.scale.view(1, -1).float().to(device)}


def _run(x: torch.Tensor, packed: Packed, query: KernelQuery) -> torch.Tensor:
    assert query.inputs is not None
    codes, step, _ = quantize_inputs(x, query.inputs, packed.get(INPUT_GRID[0]))
    steps = step.view(-1, 1).expand(x.shape[0], 1).contiguous()
    bytes_, weight = codes.to(torch.float8_e4m3fn), packed["codes"].t()
    # GPUs write 16 bits for scales per row; the CPU's op writes float32
    wide = torch.float32 if x.device.type == "cpu" else torch.bfloat16
    y = torch._scaled_mm(bytes_, weight, scale_a=steps, scale_b=packed["scale"], out_dtype=wide)
    bias = packed.get("bias")
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


FP8 = Kernel("fp8", _supports, _pack, _run, any_dtype=True, integer=True, on_request=("cpu",))
