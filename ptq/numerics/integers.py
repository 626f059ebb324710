"""Integer grids: scales, zero points and codes of the quantizers in common use.

The vocabulary follows GPTQ (Frantar et al. 2022, arXiv 2210.17323), AWQ (Lin et al. 2023, arXiv 2306.00978) and
SmoothQuant (Xiao et al. 2022, arXiv 2211.10438). A *unit* is a run of weights that shares one scale; here it is the
last axis. N = 2^bits - 1. Codes are unsigned everywhere; symmetric grids use the zero point 2^(bits-1).

==================  ==================================================  =========================================
name                scale                                               zero
==================  ==================================================  =========================================
``asym_minmax``     max(mx - mn, 1e-5) / N                              clamp(round(-mn / s), 0, N)
``asym_zero_in``    as above, range first widened to hold 0; no floor   round(-mn / s), always in range
``sym_full``        max(a, 1e-5) / (2^(bits-1) - 1)                     2^(bits-1)
``sym_restricted``  as ``sym_full``; the lowest code is never used      2^(bits-1)
``sym_gptq``        2 a / N                                             2^(bits-1)
``sym_signed``      -m / 2^(bits-1), of either sign                      2^(bits-1)
``asym_float``      as ``asym_zero_in``                                 -mn / s, a float16 number
==================  ==================================================  =========================================

mx, mn, a, m: largest, smallest, largest absolute value of the unit, and the value that has it. In ``sym_gptq`` the
published code leaves mn at 0 for units without negative values, which cuts the range in half; here mn is always -a.
``sym_signed`` (llama.cpp's Q4_0, AutoRound) turns the grid so that its lowest level, which has no counterpart, is the
weight of largest magnitude, where ``sym_gptq`` has its lowest level beyond all weights: of four levels it uses three.
"""

from __future__ import annotations

import torch

from ptq.numerics.groups import join, split
from ptq.scheme import TensorQuant

MINIMUM_RANGE = 1e-5  # floor of the published AWQ and SmoothQuant code, on the range or on the absolute maximum
SMALLEST_SCALE = 2.0**-24  # the smallest positive float16
LARGEST_SCALE = 65280.0  # the largest value that bfloat16 and float16 share


def round_scale(scale: torch.Tensor) -> torch.Tensor:
    """The nearest values that bfloat16 and float16 both hold exactly, at least 2^-24; dtype and shape unchanged.

    Rounding to bfloat16 first leaves 8 significant bits; float16 then only removes bits of subnormals. Scales are
    rounded before codes are made, so that no file format rounds them again.
    """
    shared = scale.to(torch.bfloat16).to(torch.float16).to(scale.dtype)
    return torch.copysign(shared.abs().clamp_(SMALLEST_SCALE, LARGEST_SCALE), scale)


def stored_zero(zero: torch.Tensor, quant: TensorQuant) -> torch.Tensor:
    """The nearest zero points that are stored: integers or float16 in ``[0, 2^bits - 1]``, in the dtype of ``zero``."""
    bounded = zero.clamp(0, quant.levels)
    return bounded.half().to(zero.dtype) if quant.float_zeros else bounded.round_()


def _bounds(w: torch.Tensor, clip: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    mn, mx = w.amin(-1), w.amax(-1)  # aminmax along an axis is not vectorized, and takes six times as long
    if clip is not None:
        mn, mx = torch.maximum(mn, -clip), torch.minimum(mx, clip)
    return mn, mx


def grid_parameters(
    w: torch.Tensor, quant: TensorQuant, clip: torch.Tensor | None = None, exact_scale: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero point of every unit.

    Args:
        w: ``[..., g]`` float32 or float64; a unit per leading index.
        clip: ``[...]`` symmetric clipping bound per unit, or None: values are taken as ``clamp(w, -clip, clip)``.
        exact_scale: keep the scale as computed instead of rounding it to its storage precision (for analysis).

    Returns:
        scale ``[...]`` in the dtype of w, zero ``[...]`` integers in the dtype of w, or None for symmetric grids.
    """
    mn, mx = _bounds(w, clip)
    if quant.grouping.kind == "tensor":  # w is [..., lines, 1, in]
        mn, mx = mn.amin((-2, -1), True).expand_as(mn), mx.amax((-2, -1), True).expand_as(mx)
    n = quant.levels
    half = 2 ** (quant.bits - 1)
    if quant.quantizer == "asym_minmax":
        scale = (mx - mn).clamp(min=MINIMUM_RANGE) / n
    elif quant.quantizer in ("asym_zero_in", "asym_float"):
        mn, mx = mn.clamp(max=0), mx.clamp(min=0)
        empty = (mn == 0) & (mx == 0)
        mn, mx = torch.where(empty, -1.0, mn), torch.where(empty, 1.0, mx)
        scale = (mx - mn) / n
    else:
        a = torch.maximum(mn.abs(), mx.abs())
        if quant.quantizer == "sym_gptq":
            scale = 2 * torch.where(a == 0, 1.0, a) / n
        elif quant.quantizer == "sym_signed":
            scale = torch.where(a == 0, 1.0, a) / half
            scale = torch.where(mx > -mn, -scale, scale)
        else:
            scale = a.clamp(min=MINIMUM_RANGE) / (half - 1)
    if not exact_scale:
        scale = round_scale(scale)
    if quant.symmetric:
        return scale, None
    return scale, stored_zero(-mn / scale, quant)


def quantize(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, quant: TensorQuant) -> torch.Tensor:
    """Codes ``clamp(round(w / s) + z, lowest, N)`` in the dtype of w; ``round(w / s + z)`` where z is no integer.

    ``scale`` and ``zero`` must broadcast against w. Ties round to even, as torch.round does. Clamping comes before
    any packing: an overflowing code would wrap into its neighbour's bits.
    """
    lowest = 1 if quant.quantizer == "sym_restricted" else 0
    shift = 2 ** (quant.bits - 1) if zero is None else zero
    if quant.float_zeros:
        return (w / scale).add_(shift).round_().clamp_(lowest, quant.levels)
    return (w / scale).round_().add_(shift).clamp_(lowest, quant.levels)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, quant: TensorQuant) -> torch.Tensor:
    """``(code - z) * s``; shapes as in `quantize`."""
    shift = 2 ** (quant.bits - 1) if zero is None else zero
    return (codes - shift) * scale


def fake_quantize(
    w: torch.Tensor, quant: TensorQuant, clip: torch.Tensor | None = None, exact_scale: bool = False
) -> torch.Tensor:
    """Quantize and dequantize ``W [out, in]`` (or ``[..., out, in]``) with the grouping of ``quant``.

    Args:
        clip: ``[..., lines, G]`` clipping bounds, or None.
    """
    units = split(w, quant.grouping)
    scale, zero = grid_parameters(units, quant, clip, exact_scale)
    s, z = scale.unsqueeze(-1), None if zero is None else zero.unsqueeze(-1)
    shift = 2 ** (quant.bits - 1) if z is None else z
    rounded = quantize(units, s, z, quant).sub_(shift).mul_(s)  # in place: searches run this many times
    return join(rounded, quant.grouping)
