"""Quantized inputs: the one definition that propagation, the runtime and evaluation share.

Symmetric integers (Xiao et al. 2022, arXiv 2211.10438, with clamping): ``s = max|x| / (2^(b-1) - 1)``, codes
``clamp(round(x / s), -2^(b-1), 2^(b-1) - 1)``. With zero points the range is first widened to hold 0:
``s = (max - min) / (2^b - 1)``, ``z = round(-2^(b-1) - min / s)``, codes ``clamp(round(x / s) + z, ...)``. E4M3:
``s = max|x| / 448``, "codes" are the float8 values of ``x / s``, which do not overflow; E2M1 likewise with 6. Where a
range is empty, s is ``SMALLEST_STEP``. NVFP4: groups have ``s = S * E4M3(max|x| / 6 / S)`` under a calibrated S, the
largest input over 6 * 448. MXFP4: s is the power of two at or below ``max|x| / 4``, or the next one where that is at
least 1.75 times as much, so that less is clipped (compressed-tensors 0.20, ``quantization/utils``). MXFP8: the same of
``max|x| / 256``, and codes are E4M3. Everything is computed in float32.
"""

from __future__ import annotations

import torch

from ptq.activations import BLOCK_FLOATS, ActivationQuant
from ptq.float_formats import E2M1, E4M3FN, FloatFormat
from ptq.numerics import floats
from ptq.numerics.smooth import channel_groups, channel_maxima, smoothing_scales

E4M3_LARGEST = 448.0
LARGEST_FLOAT: dict[str, float] = {
    "fp8-e4m3": E4M3_LARGEST,
    "fp4-e2m1": E2M1.largest,
    "nvfp4": E2M1.largest * E4M3_LARGEST,  # of what a step for the whole tensor has above it
}
SMALLEST_STEP = 1e-8  # of an input that is zero everywhere; SmoothQuant's floor of 1e-5 on the range is about this
MX_NUMBERS: dict[str, FloatFormat] = {"mxfp4": E2M1, "mxfp8": E4M3FN}
WITHOUT_STEP = 0.125  # of groups below the smallest E4M3, whose codes all become 0 by it


def ranges(x: torch.Tensor, quant: ActivationQuant) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value of everything that shares a step, broadcastable against ``x [..., in]`` (against
    ``[..., in / group, group]`` for groups)."""
    if quant.granularity == "tensor":
        low, high = torch.aminmax(x)
        return low, high
    if quant.granularity == "channel":
        return x.flatten(0, -2).amin(dim=0), x.flatten(0, -2).amax(dim=0)
    if quant.granularity == "group":
        assert quant.group_size is not None
        x = x.unflatten(-1, (-1, quant.group_size))
    # two reductions: torch.aminmax along a dimension takes 20 times as long on a CPU
    return x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)


def step_and_zero(
    low: torch.Tensor, high: torch.Tensor, quant: ActivationQuant
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Step and zero point (None for symmetric grids) of ranges of any shape; float32, the zero an integer."""
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    lowest, highest = quant.bounds
    if quant.kind in MX_NUMBERS:
        return _power_of_two(torch.maximum(-low, high), MX_NUMBERS[quant.kind]), None
    if quant.symmetric:
        largest = LARGEST_FLOAT.get(quant.kind, highest)
        return (torch.maximum(-low, high) / largest).clamp(min=SMALLEST_STEP), None
    scale = ((high - low) / (highest - lowest)).clamp(min=SMALLEST_STEP)
    return scale, (lowest - low / scale).round().clamp(lowest, highest)


def _power_of_two(largest: torch.Tensor, number: FloatFormat) -> torch.Tensor:
    """The step of an MX group of such numbers, by its largest magnitude; float32."""
    reached = largest / number.top_binade
    power = floats.round_scale(reached.clamp(min=SMALLEST_STEP), "e8m0")
    return torch.where(reached >= 1.75 * power, 2 * power, power)


def _group_step(x: torch.Tensor, tensor_step: torch.Tensor) -> torch.Tensor:
    """Steps ``[..., groups, 1]`` of NVFP4 groups ``x [..., groups, 16]`` under the step of the tensor ``[1]``."""
    wanted = x.abs().amax(dim=-1, keepdim=True) / E2M1.largest
    local = (wanted / tensor_step).clamp(max=E4M3_LARGEST).to(torch.float8_e4m3fn).float()
    return torch.where(local == 0, WITHOUT_STEP, local) * tensor_step


def encode(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, quant: ActivationQuant) -> torch.Tensor:
    """Codes of float32 ``x``, as float32: signed integers, or values of E4M3. Ties round to even."""
    codes = x / scale
    if quant.kind == "fp8-e4m3":
        return codes.clamp_(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn).float()
    if quant.kind == "fp4-e2m1" or quant.kind in BLOCK_FLOATS:
        return floats.nearest(codes, MX_NUMBERS.get(quant.kind, E2M1))
    codes = codes.round_()
    return (codes if zero is None else codes.add_(zero)).clamp_(*quant.bounds)


def quantize_inputs(
    x: torch.Tensor, quant: ActivationQuant, scale: torch.Tensor | None = None, zero: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes of ``x [..., in]`` as float32, with the step and the zero point that they stand for.

    Args:
        scale, zero: calibrated ones, ``[1]`` or ``[in]``; None for dynamic grids. NVFP4: the step of the tensor.

    Returns:
        codes ``[..., in]`` (``[..., in / group, group]`` for groups), step and zero broadcastable against them.
    """
    x = x.float()
    if quant.dynamic:
        scale, zero = step_and_zero(*ranges(x, quant), quant)
    assert scale is not None, "a static grid comes with its scale"
    if quant.granularity == "group":
        x = x.unflatten(-1, (-1, quant.group_size or 1))
    if quant.kind == "nvfp4":
        scale = _group_step(x, scale)
    return encode(x, scale, zero, quant), scale, zero


def quantize_smoothed(
    x: torch.Tensor, quant: ActivationQuant
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runtime Smooth over all tokens of ``x [tokens, in]``, channels in the order of their groups.

    Returns:
        codes int8 ``[tokens, in]`` in that order, order int64 ``[in]``, group scales float32 ``[groups]``, step float32
        ``[tokens, 1]``.
    """
    assert quant.smooth is not None
    x = x.float()
    order, scales = channel_groups(channel_maxima(x, None)[0], quant.smooth)
    divisors = scales.repeat_interleave(quant.smooth.group)[: x.shape[1]]
    codes, step, _ = quantize_inputs(x.index_select(1, order) / divisors, quant)
    return codes.to(torch.int8), order, scales, step


def fake_quantize_inputs(
    x: torch.Tensor, quant: ActivationQuant, scale: torch.Tensor | None = None, zero: torch.Tensor | None = None
) -> torch.Tensor:
    """``x [..., in]`` after quantization, in its own shape and dtype; arguments as in `quantize_inputs`.

    Runtime Smooth takes its maxima over the tokens of axis -2, for every leading index by itself.
    """
    if x.numel() == 0:  # an expert without tokens
        return x
    if quant.smooth is None:
        codes, step, shift = quantize_inputs(x, quant, scale, zero)
        return ((codes if shift is None else codes - shift) * step).reshape(x.shape).to(x.dtype)
    smoothing = smoothing_scales(x.float(), quant.smooth)
    codes, step, _ = quantize_inputs(x.float() / smoothing, quant)
    return (codes * step * smoothing).to(x.dtype)
