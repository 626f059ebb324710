"""Half-quadratic quantization: grids that few large errors spoil less, from the weights alone.

Badri & Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (Mobius Labs, 2023): minimize the sparse
norm sum |W - Q^-1(Q(W))|^p, p < 1, over zero points. With E in place of the error, half-quadratic splitting minimizes
``|E|^p + beta/2 (E - (W - Q^-1(Q(W))))^2`` in turn over E (`shrink`) and over the grid (`refit`), while beta grows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ptq.numerics.grids import Grid, stacked
from ptq.numerics.groups import rows_per_group, split
from ptq.numerics.integers import dequantize, quantize, round_scale, stored_zero
from ptq.numerics.objective import row_chunks
from ptq.scheme import TensorQuant


@dataclass(frozen=True)
class HalfQuadratic:
    """Settings, with the published values.

    Attributes:
        norm: p of the norm, in (0, 1].
        beta, growth: the first beta, and the factor that it grows by in every iteration. beta weighs errors in the
            units of the weights: those below beta^(-1 / (2 - p)) (0.17) shrink to zero, so on the weights of language
            models the iteration is alternating least squares.
        iterations: at most.
        steps: also refit steps, which the paper keeps. Symmetric grids have nothing else to refit, and integer zero
            points hardly move: their optimum lies within half a level.
    """

    norm: float = 0.7
    beta: float = 10.0
    growth: float = 1.01
    iterations: int = 20
    steps: bool = False


def shrink(x: torch.Tensor, beta: float, norm: float) -> torch.Tensor:
    """Generalized soft thresholding, ``sign(x) max(0, |x| - |x|^(p-1) / beta)``: the E step. For p = 1 it is exact, for
    p < 1 the published approximation."""
    magnitude = x.abs()
    if float(magnitude.amax()) <= beta ** (1 / (norm - 2)):
        return torch.zeros_like(x)  # as for most weights of language models: powers are slow
    return torch.sign(x) * (magnitude - magnitude.pow(norm - 1) / beta).clamp_(min=0)


def refit(
    target: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    quant: TensorQuant,
    steps: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The grid step: zero points ``mean(codes - target / s)``, as published, and then, with ``steps``, least-squares
    steps ``<codes - z, target> / ||codes - z||^2``.

    Args:
        target: W - E, ``[lines, G, width]``; codes alike; scale and zero ``[lines, G]``.

    Returns:
        Scale and zero ``[lines, G]``, neither rounded. A step whose solution has the other sign stays.
    """
    shift = torch.full_like(scale, 2 ** (quant.bits - 1))
    if zero is not None:
        shift = zero = (codes - target / scale.unsqueeze(-1)).mean(dim=-1)
    if steps or zero is None:
        level = codes - shift.unsqueeze(-1)
        fitted = (level * target).sum(dim=-1) / level.square().sum(dim=-1)
        scale = torch.where(torch.isfinite(fitted) & (fitted * scale > 0), fitted, scale)
    return scale, zero


def _stored(scale: torch.Tensor, zero: torch.Tensor | None, quant: TensorQuant) -> Grid:
    return Grid(round_scale(scale), None if zero is None else stored_zero(zero, quant))


def norm_errors(units: torch.Tensor, grid: Grid, quant: TensorQuant, norm: float) -> torch.Tensor:
    """sum |W - Q(W)|^p of every unit ``[lines, G]`` of ``[lines, G, width]``."""
    scale, zero = grid.scale.unsqueeze(-1), None if grid.zero is None else grid.zero.unsqueeze(-1)
    rounded = dequantize(quantize(units, scale, zero, quant), scale, zero, quant)
    return rounded.sub_(units).abs_().pow_(norm).sum(dim=-1)


def half_quadratic(w: torch.Tensor, quant: TensorQuant, start: Grid, settings: HalfQuadratic) -> Grid:
    """The grid of least p-norm error that the iteration passes, group by group: never worse than ``start``.

    The iteration moves freely, as published; what competes are its grids as files hold them.

    Args:
        w: ``[out, in]``; quant: an integer grid, whose steps no two groups share.
    """
    parts = []
    for rows in row_chunks(w.shape[0], w.shape[1], multiple=rows_per_group(quant, w.shape[0])):
        units = split(w[rows], quant.grouping)
        parts.append(_improved(units, quant, start.rows(quant, w.shape[0], rows), settings))
    return stacked(parts, quant)


def _improved(units: torch.Tensor, quant: TensorQuant, best: Grid, settings: HalfQuadratic) -> Grid:
    scale, zero, beta = best.scale, best.zero, settings.beta
    lowest = norm_errors(units, best, quant, settings.norm)
    total = torch.inf
    for _ in range(settings.iterations):
        s, z = scale.unsqueeze(-1), None if zero is None else zero.unsqueeze(-1)
        shift = 2 ** (quant.bits - 1) if z is None else z
        codes = (units / s + shift).round_().clamp_(quant.quantizer == "sym_restricted", quant.levels)
        error = units - dequantize(codes, s, z, quant)
        reached = float(error.abs().mean())
        if reached >= total:
            break  # the published early stop
        total = reached
        scale, zero = refit(units - shrink(error, beta, settings.norm), codes, scale, zero, quant, settings.steps)
        beta *= settings.growth
        found = _stored(scale, zero, quant)
        errors = norm_errors(units, found, quant, settings.norm)
        better = errors < lowest
        lowest = torch.where(better, errors, lowest)
        kept = None if best.zero is None else torch.where(better, found.zero, best.zero)  # type: ignore[arg-type]
        best = Grid(torch.where(better, found.scale, best.scale), kept)
    return best
