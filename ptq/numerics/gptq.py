"""GPTQ: round one input column after another and let the remaining columns absorb the error.

Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323, algorithm 1. Rows are independent given H = X^T X, so linears that read the same input
are stacked and rounded together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ptq.numerics.integers import grid_parameters, quantize
from ptq.scheme import TensorQuant

Order = Literal["natural", "activation", "group"]
"""Column order: as stored; by falling diag(H); or by falling diag(H) inside each group, and groups by their largest
(so that groups stay groups and no file needs a column index)."""


@dataclass(frozen=True)
class Rounded:
    """Result of `gptq_round`. Shapes: codes uint8 ``[out, in]``, scale and zero ``[out, G]``, group_index ``[in]``.

    ``loss`` is the sum of squared scaled errors; it equals tr(dW (H + damping) dW^T).
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    group_index: torch.Tensor | None
    loss: float


def inverse_factor(h: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """Upper triangular U with U^T U = (H + d I)^-1, d = damping * mean(diag H).

    With J the reversal of rows and columns and J H J = L L^T, U = J L^-1 J: one Cholesky factorization and one
    triangular inverse instead of the published three steps. Where the factorization fails the damping grows tenfold.

    Args:
        h: ``[in, in]`` symmetric, float32 or float64, without zero on the diagonal.

    Returns:
        U ``[in, in]`` and the damping that was used.
    """
    mean = h.diagonal().mean()
    identity = torch.eye(h.shape[0], dtype=h.dtype, device=h.device)
    while True:
        damped = torch.flip(h + damping * mean * identity, (0, 1))
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            break
        damping = max(10 * damping, 1e-4)
        assert damping < 1e4, "H + damping is not positive definite: NaN in the statistics?"
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    return torch.flip(inverse, (0, 1)), damping


def column_order(diagonal: torch.Tensor, order: Order, width: int) -> torch.Tensor:
    """Permutation ``[in]`` of the columns for a given diag(H) and group width; ties keep their order."""
    if order == "natural":
        return torch.arange(diagonal.numel(), device=diagonal.device)
    if order == "activation":
        return torch.argsort(diagonal, descending=True, stable=True)
    groups = diagonal.view(-1, width)
    inside = torch.argsort(groups, dim=1, descending=True, stable=True)
    first = torch.argsort(groups.amax(dim=1), descending=True, stable=True)
    return (inside + width * torch.arange(groups.shape[0], device=diagonal.device)[:, None])[first].flatten()


def gptq_round(
    w: torch.Tensor,
    h: torch.Tensor,
    quant: TensorQuant,
    *,
    damping: float = 0.01,
    block_size: int = 128,
    order: Order = "natural",
    static_groups: bool = False,
    clip: torch.Tensor | None = None,
) -> Rounded:
    """Round ``w`` against the inputs whose Gram matrix is ``h``.

    Args:
        w: ``[out, in]`` float32 or float64; not modified.
        h: ``[in, in]`` Gram matrix in the same dtype, any positive multiple of it; not modified. Columns that saw
            only zeros (zero diagonal) get weight zero.
        static_groups: take every group's grid from the original columns, before any update. Otherwise a grid is taken
            when the loop reaches the group, from the updated columns; with ``order="activation"`` groups are then runs
            of reordered columns, and ``group_index`` says which.
        clip: ``[out, G]`` clipping bounds of original groups, or None.

    A block is never smaller than a group and holds whole groups, so that grids are always taken from fully updated
    columns (the published loop uses stale ones for groups that start inside a block).
    """
    out, width = w.shape[0], quant.grouping.width(w.shape[1])
    columns, n_groups = w.shape[1], quant.grouping.count(w.shape[1])
    dead = h.diagonal() == 0
    h, w = h.clone(), w.clone()
    fixed = n_groups == 1 or static_groups
    units = w.unflatten(1, (n_groups, width))
    scale, zero = grid_parameters(units, quant, clip)  # [out, G]; refreshed below unless fixed
    h.diagonal()[dead] = 1
    w[:, dead] = 0

    perm = column_order(h.diagonal(), order, width)
    u, _ = inverse_factor(h[perm][:, perm], damping)
    wt = w.T[perm].contiguous()  # [in, out]: a column of W is a contiguous row here
    scale_t, zero_t = scale.T.contiguous(), None if zero is None else zero.T.contiguous()
    groups = perm // width  # original group of the i-th visited column
    regroup = order == "activation" and not fixed
    if regroup:
        groups = torch.arange(columns, device=w.device) // width
        clip = None
    group_of = groups.tolist()
    codes = torch.empty_like(wt)
    loss = torch.zeros((), dtype=torch.float64)
    block = max(1, block_size // width) * width if not fixed else block_size
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        w1, u1 = wt[start:stop].clone(), u[start:stop, start:stop]
        errors = torch.empty_like(w1)
        inverse_diagonal = (1 / u1.diagonal()).tolist()
        for i in range(stop - start):
            group = group_of[start + i]
            if not fixed and (start + i) % width == 0:
                bound = None if clip is None else clip[:, group]
                s, z = grid_parameters(w1[i : i + width].T, quant, bound)
                scale_t[group] = s
                if zero_t is not None and z is not None:
                    zero_t[group] = z
            s, z = scale_t[group], None if zero_t is None else zero_t[group]
            code = quantize(w1[i], s, z, quant)
            codes[start + i] = code
            shift = 2 ** (quant.bits - 1) if z is None else z
            error = (w1[i] - (code - shift) * s).mul_(inverse_diagonal[i])
            errors[i] = error
            w1[i + 1 :].addr_(u1[i, i + 1 :], error, alpha=-1)
        wt[stop:].addmm_(u[start:stop, stop:].T, errors, alpha=-1)
        loss += errors.square().sum().double().cpu()
    restored = torch.empty_like(codes)
    restored[perm] = codes
    index = None
    if regroup:
        index = torch.empty(columns, dtype=torch.int32, device=w.device)
        index[perm] = groups.to(torch.int32)
    return Rounded(
        restored.T.to(torch.uint8).contiguous().view(out, columns),
        scale_t.T.contiguous(),
        None if zero_t is None else zero_t.T.contiguous(),
        index,
        float(loss),
    )
