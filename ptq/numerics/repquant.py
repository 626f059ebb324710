"""RepQuant's reparameterization: a grid per channel becomes one grid for the tensor (Li et al. 2024, arXiv 2402.05628;
RepQ-ViT, arXiv 2212.08254, section 3.2).

With steps s_c and zero points z_c of the channels, and s~ and z~ of the tensor: ``r1 = s_c / s~``, ``r2 = z_c - z~``.
``x' = (x + s_c r2) / r1`` on (s~, z~) has the codes of x on (s_c, z_c). Zero points are integers here, so this holds
exactly; the code of RepQ-ViT leaves z~ real. Symmetric grids have r2 = 0, and only the scale moves.
"""

from __future__ import annotations

import torch

from ptq.activations import ActivationQuant
from ptq.numerics.activations import encode, step_and_zero
from ptq.numerics.outliertune import covering

BOUND = 32.0  # of r1 and 1 / r1: columns of W that differ by more ruin its own grid
FRACTIONS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)  # of a channel's extremes, tried as its range


def clipping_errors(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, quant: ActivationQuant) -> torch.Tensor:
    """Sum over tokens of ``(x̂ - x)²`` for ``x [tokens, in]`` on the range ``(low, high) [in]`` times each of
    `FRACTIONS`: float32 ``[fractions, in]``."""
    x, errors = x.float(), []
    for fraction in FRACTIONS:
        scale, zero = step_and_zero(low * fraction, high * fraction, quant)
        codes = encode(x, scale, zero, quant)
        errors.append(((codes if zero is None else codes - zero) * scale).sub_(x).square().sum(dim=0))
    return torch.stack(errors)


def channel_factors(low: torch.Tensor, high: torch.Tensor, quant: ActivationQuant) -> torch.Tensor:
    """r1 ``[channels]`` of channels with these ranges: their steps over s~, the mean step, within `BOUND`."""
    steps, _ = step_and_zero(low, high, quant)
    return (steps / covering(float(steps.mean()))).clamp(1 / BOUND, BOUND)


def tensor_grid(
    low: torch.Tensor, high: torch.Tensor, quant: ActivationQuant
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """One grid for channels that have been divided by r1.

    Args:
        low, high: ranges ``[channels]`` after the division. Steps differ where r1 met its bound or was rounded with a
            norm's gain; the largest one serves all, so that no range is cut.

    Returns:
        s~ float32 ``[1]`` (exact in bfloat16 and float16); z_c ``[channels]`` and z~ ``[1]``, integers in float32, or
        None for symmetric grids.
    """
    steps, _ = step_and_zero(low, high, quant)
    step = covering(float(steps.amax()))
    if quant.symmetric:
        return step, None, None
    lowest, highest = quant.bounds
    zeros = (lowest - low.float().clamp(max=0) / step).round().clamp(lowest, highest)
    return step, zeros, zeros.mean().round().view(1)
