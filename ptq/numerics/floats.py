"""Grids of small floats: ExMy values times a scale.

Liu, Liu, Huang, Dong, Cheng, "LLM-FP4: 4-Bit Floating-Point Quantized Transformers", arXiv 2310.16836: the exponent
bias b of a float format is a real number, so it is exactly a scale, 2^(bias - b). MXFP4: OCP Microscaling Formats v1.0.
NVFP4: groups of 16 with E4M3 scales and one float32 scale per tensor, as compressed-tensors stores it.

A *level* is a value of the format with its own bias (E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives); a code is
its bit pattern, sign first.
"""

from __future__ import annotations

import math

import torch

from ptq.float_formats import FloatFormat
from ptq.numerics.groups import join, shared_maxima, split
from ptq.scheme import ScaleFormat, TensorQuant

LARGEST_E4M3 = 448.0  # with scales the code above it is NaN
SMALLEST_E4M3 = 2.0**-9
SMALLEST_EXPONENT, LARGEST_EXPONENT = -127, 127  # of E8M0
_TERMS = 20  # of the series of 2^x on [-1, 0]: the next one is below 1e-23
_EXPONENT_FIELD = {
    torch.float32: (torch.int32, 0x7F800000, 23, 127),
    torch.float64: (torch.int64, 0x7FF0000000000000, 52, 1023),
}


def _binade(magnitude: torch.Tensor, number: FloatFormat) -> torch.Tensor:
    """The power of two at or below every value, at least that of the smallest normal number."""
    integers, mask, _, _ = _EXPONENT_FIELD[magnitude.dtype]
    power = (magnitude.view(integers) & mask).view(magnitude.dtype)
    return power.clamp_(min=2.0 ** (1 - number.bias))


def nearest(x: torch.Tensor, number: FloatFormat) -> torch.Tensor:
    """The nearest level of every value, ties to the even code; beyond the largest, the largest.

    Args:
        x: float32 or float64, any shape.
    """
    clipped = x.clamp(-number.largest, number.largest)
    step = _binade(clipped, number).mul_(2.0**-number.mantissa_bits)
    return clipped.div_(step).round_().mul_(step)


def power_of_two(exponent: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """2^n to the bit, put together from its exponent field; n whole numbers in any dtype, within the normal range of
    ``dtype`` (float32 or float64). `torch.exp2` gives no such promise, and `torch.ldexp` goes through float32."""
    integers, _, shift, offset = _EXPONENT_FIELD[dtype]
    return ((exponent.to(integers) + offset) << shift).view(dtype)


def _power_of_fraction(x: torch.Tensor) -> torch.Tensor:
    """2^x for -1 <= x <= 0, within three units in the last place, by sums and products alone: the same value gives the
    same bits at every place of every tensor. `torch.exp2` differs by a unit between vector and scalar code, and which
    of them runs depends on how a tensor lies in memory."""
    y = x * math.log(2.0)
    result = torch.ones_like(y)
    for k in range(_TERMS, 0, -1):
        result = result * y / k + 1.0
    return result


def nearest_with_bias(x: torch.Tensor, number: FloatFormat, bias: torch.Tensor | float) -> torch.Tensor:
    """The published quantizer Q(x; E, M, b) with a real bias: levels times 2^(bias of the format - b)."""
    b = torch.as_tensor(bias, dtype=x.dtype)
    whole = torch.floor(b)  # exact powers of two stay exact: Q(2^k x; b - k) = 2^k Q(x; b) to the bit
    scale = _power_of_fraction(whole - b) * power_of_two(number.bias - whole, x.dtype)
    return nearest(x / scale, number) * scale


def bias_of(maximum: torch.Tensor, number: FloatFormat) -> torch.Tensor:
    """The bias with which the largest value is ``maximum``: 2^E - log2(maximum) + log2(2 - 2^-M) - 1."""
    top = torch.tensor(2 - 2.0**-number.mantissa_bits, dtype=maximum.dtype)
    return 2**number.exponent_bits - torch.log2(maximum) + torch.log2(top) - 1


def codes(levels: torch.Tensor, number: FloatFormat) -> torch.Tensor:
    """Bit patterns of levels: uint8, the sign above E exponent and M mantissa bits. Zero has no sign."""
    integers, _, shift, offset = _EXPONENT_FIELD[levels.dtype]
    magnitude = levels.abs()
    power = _binade(magnitude, number)
    exponent = (power.view(integers) >> shift) - offset + number.bias  # the field, 1 for subnormals too
    mantissa = (magnitude / power * 2.0**number.mantissa_bits).to(integers)  # with the implied bit, except subnormals
    code = (exponent - 1) * 2**number.mantissa_bits + mantissa
    return (code + (levels < 0).to(integers) * 2 ** (number.bits - 1)).to(torch.uint8)


def table(number: FloatFormat, device: torch.device | str = "cpu") -> torch.Tensor:
    """Levels of all codes, float32 ``[2^bits]``; the second half negative, starting with -0."""
    code = torch.arange(2 ** (number.bits - 1), device=device)
    field, mantissa = code >> number.mantissa_bits, code & (2**number.mantissa_bits - 1)
    fraction = mantissa * 2.0**-number.mantissa_bits + (field > 0)
    positive = torch.ldexp(fraction, field.clamp(min=1) - number.bias)
    return torch.cat((positive, -positive))


def levels_of(code: torch.Tensor, number: FloatFormat) -> torch.Tensor:
    """The inverse of `codes`, float32."""
    return table(number, code.device)[code.int()]


def tensor_scale(largest_weight: torch.Tensor, number: FloatFormat) -> torch.Tensor:
    """The global scale ``[1]`` of a two-level format, 448 * largest level / max|W|; 1 for a zero tensor. Steps are the
    E4M3 scales *divided* by it."""
    scale = LARGEST_E4M3 * number.largest / largest_weight.float().reshape(1)
    return torch.where(torch.isfinite(scale), scale, torch.ones_like(scale))


def round_scale(scale: torch.Tensor, kind: ScaleFormat) -> torch.Tensor:
    """The nearest value in which a scale is stored (powers of two: the next below); dtype and shape unchanged."""
    if kind == "e8m0":
        exponent = torch.floor(torch.log2(scale)).clamp(SMALLEST_EXPONENT, LARGEST_EXPONENT)
        return torch.ldexp(torch.ones_like(scale), exponent.to(torch.int32))
    if kind == "e4m3":
        bounded = scale.clamp(SMALLEST_E4M3, LARGEST_E4M3)
        return bounded.float().to(torch.float8_e4m3fn).to(scale.dtype)
    return scale.clamp(min=torch.finfo(torch.bfloat16).tiny).to(torch.bfloat16).to(scale.dtype)


def scales(
    units: torch.Tensor, quant: TensorQuant, bound: torch.Tensor | None = None, global_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """The stored scale of every unit.

    Args:
        units: ``[..., g]`` float32 or float64.
        bound: ``[...]`` what the largest level shall stand for; infinite or None: the largest magnitude of the unit.
            It may exceed that. For powers of two the largest level is that of the top binade (4 for E2M1), so that
            the bound itself may be clipped, as the OCP specification has it; not of E4M3, which has one bit more.
        global_scale: ``[1]``, for two-level formats only.
    """
    number = quant.float_format
    assert number is not None
    largest = units.abs().amax(dim=-1)
    if bound is not None:
        largest = torch.where(torch.isfinite(bound), bound.to(largest.dtype), largest)
    largest = shared_maxima(largest, quant.grouping)
    largest = torch.where(largest == 0, 1.0, largest) if quant.scale_format == "bf16" else largest
    if quant.scale_format == "e8m0":
        power = round_scale(largest / number.top_binade, "e8m0")
        # where the top code is no number, the top binade ends at 1.75 times its power
        return torch.where(largest > number.largest * power, 2 * power, power) if number.has_nan else power
    if global_scale is not None:
        return round_scale(largest / number.largest * global_scale.to(largest.dtype), "e4m3")
    return round_scale(largest / number.largest, quant.scale_format)


def fake_quantize(
    w: torch.Tensor, quant: TensorQuant, bound: torch.Tensor | None = None, global_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Quantize and dequantize ``W [..., out, in]``; see `scales`. A two-level format without ``global_scale`` takes
    that of W itself."""
    number = quant.float_format
    assert number is not None
    units = split(w, quant.grouping)
    if quant.scale_format == "e4m3" and global_scale is None:
        global_scale = tensor_scale(w.abs().amax(), number)
    step = scales(units, quant, bound, global_scale)
    if global_scale is not None:
        step = step / global_scale.to(step.dtype)
    return join(nearest(units / step.unsqueeze(-1), number).mul_(step.unsqueeze(-1)), quant.grouping)
