"""AdaQuant (Hubara et al. 2020, arXiv 2006.10518) on the Gram objective: weights, steps and zero points by gradient.

Minimizes ||(Q(V) - W) Xᵀ||² = sum((dW G) * dW) over continuous V (which starts at W), steps and zero points, with
straight-through gradients: rounding counts as the identity, clamping comes after it and passes no gradient outside the
range. V is kept in units of its initial step, so that one learning rate fits every layer.
"""

from __future__ import annotations

import torch

from ptq.numerics.grids import Grid, grid_of
from ptq.numerics.groups import join, split
from ptq.numerics.integers import round_scale
from ptq.scheme import TensorQuant


def straight_through(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``value`` with the gradient of ``x``."""
    return x + (value - x).detach()


def quantize_through(
    u: torch.Tensor, stretch: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, quant: TensorQuant
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Rounded units with straight-through gradients in ``u``, ``stretch`` and ``zero``.

    Args:
        u: weights over their initial steps, ``[lines, G, width]``.
        stretch: logarithm of the change of the steps ``[lines, G]``.
        scale: initial steps ``[lines, G]``; zero: zero points ``[lines, G]``, or None for symmetric grids.

    Returns:
        Rounded weights ``[lines, G, width]``, their codes, steps and zero points as they will be stored.
    """
    wanted = scale * stretch.exp()
    step = straight_through(round_scale(wanted), wanted)
    shift: torch.Tensor | int = 2 ** (quant.bits - 1)
    stored = None
    if zero is not None:
        stored = straight_through(zero.round().clamp(0, quant.levels), zero)
        shift = stored.unsqueeze(-1)
    position = u * (scale / step).unsqueeze(-1)
    lowest = 1 if quant.quantizer == "sym_restricted" else 0
    codes = (straight_through(position.round(), position) + shift).clamp(lowest, quant.levels)
    return (codes - shift) * step.unsqueeze(-1), codes, step, stored


def adaquant(
    w: torch.Tensor,
    gram: torch.Tensor,
    quant: TensorQuant,
    iterations: int,
    weight_rate: float,
    step_rate: float,
    grid: Grid | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, float]:
    """Codes, steps and zero points of the best iterate; the first one is rounding to nearest.

    Args:
        w: ``[out, in]`` float32; gram: ``[in, in]``.
        quant: an integer grid.
        iterations: Adam steps; 0 is rounding to nearest.
        weight_rate: of V, in steps; step_rate: of the logarithm of the steps and of zero points.
        grid: to start from; None takes the one that the ranges of W span.

    Returns:
        codes uint8 ``[out, in]``, scale float32 ``[lines, G]``, zero uint8 ``[lines, G]`` or None, and the objective
        over that of rounding to nearest.
    """
    units = split(w, quant.grouping)
    grid = grid or grid_of(w, quant)
    scale, zero = grid.scale, None if grid.zero is None else grid.zero.clone()
    u = (units / scale.unsqueeze(-1)).contiguous().requires_grad_()
    stretch = torch.zeros_like(scale).requires_grad_()
    groups = [{"params": [u], "lr": weight_rate}, {"params": [stretch], "lr": step_rate}]
    if zero is not None:
        zero.requires_grad_()
        groups.append({"params": [zero], "lr": step_rate})
    optimizer = torch.optim.Adam(groups)
    first = best = torch.inf
    kept: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None
    for iteration in range(iterations + 1):
        with torch.enable_grad():
            rounded, codes, step, stored = quantize_through(u, stretch, scale, zero, quant)
            changed = join(rounded, quant.grouping)
        error = changed.detach() - w
        pull = error @ gram
        loss = float((pull * error).sum())
        first = loss if iteration == 0 else first
        if loss < best or kept is None:
            best = loss
            whole = join(codes.detach(), quant.grouping).to(torch.uint8).contiguous()
            kept = whole, step.detach().float(), None if stored is None else stored.detach().to(torch.uint8)
        if iteration == iterations or first <= 0:
            break
        optimizer.zero_grad()
        changed.backward(2 * pull / first)
        optimizer.step()
    assert kept is not None
    return (*kept, best / first if first > 0 else 1.0)
