"""GPTQ: round one input column after another and let the remaining columns absorb the error.

Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323, algorithm 1. Rows are independent given H = X^T X, so linears that read the same input
are stacked and rounded together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ptq.numerics.column_loop import Grids, column_loop
from ptq.numerics.grids import Grid, grid_of, own_global_scale, zero_of
from ptq.scheme import TensorQuant

Order = Literal["natural", "activation", "group"]
"""Column order: as stored; by falling diag(H); or by falling diag(H) inside each group, and groups by their largest
(so that groups stay groups and no file needs a column index)."""


@dataclass(frozen=True)
class Rounded:
    """Result of `gptq_round`. Shapes: codes uint8 ``[out, in]``, scale and zero ``[lines, G]``, group_index ``[in]``.

    ``loss`` is the sum of squared scaled errors; it equals tr(dW (H + damping) dW^T), if not for asymmetry. Grids with
    super-blocks have integers for scale and zero, and ``super_scale`` and ``super_min`` ``[out, in/256]`` (see
    `QuantizedTensor`); their loss is that before the scales are fitted once more.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    group_index: torch.Tensor | None
    loss: float
    super_scale: torch.Tensor | None = None
    super_min: torch.Tensor | None = None

    def rows(self, first: int, stop: int, quant: TensorQuant) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes, scale and zero of some rows of W, copied; whole groups of rows for axis "out"."""
        own = Grid(self.scale, self.zero).rows(quant, self.codes.shape[0], slice(first, stop))
        return self.codes[first:stop].clone(), own.scale.clone(), zero_of(own, quant)

    def super_rows(self, first: int, stop: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """``super_scale`` and ``super_min`` of some rows of W, copied, where the grid has them."""
        scale, minimum = self.super_scale, self.super_min
        return (
            None if scale is None else scale[first:stop].float().clone(),
            None if minimum is None else minimum[first:stop].float().clone(),
        )


def inverse_factor(
    h: torch.Tensor, damping: float, order: torch.Tensor | None = None, diagonal: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:
    """Upper triangular U with U^T U = (H + d I)^-1, d = damping * mean(diag H).

    With J the reversal of rows and columns and J H J = L L^T, U = J L^-1 J: one Cholesky factorization and one
    triangular inverse instead of the published three steps. Where the factorization fails the damping grows tenfold.

    Args:
        h: ``[in, in]`` symmetric, float32 or float64, without zero on the diagonal; not modified.
        order: of the columns (and rows) in H, ``[in]``; None as they are.
        diagonal: ``[in]``, in the place of that of ``h`` where an order is given; None as it is.

    Returns:
        U ``[in, in]`` and the damping that was used. Beside ``h`` two matrices of its size are in memory at a time.
    """
    while True:
        ordered = _ordered(h, order, diagonal)  # made once more where the factorization fails, and not kept for that
        factor, mean = torch.flip(ordered, (0, 1)), ordered.diagonal().mean()
        del ordered
        factor.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(factor)
        if not int(failed):
            break
        damping = max(10 * damping, 1e-4)
        assert damping < 1e4, "H + damping is not positive definite: NaN in the statistics?"
    inverse = torch.eye(h.shape[0], dtype=h.dtype, device=h.device).T  # column by column, as LAPACK solves in place
    torch.linalg.solve_triangular(factor, inverse, upper=False, out=inverse)
    del factor
    return torch.flip(inverse, (0, 1)), damping


def asymmetry(cross: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """P ``[in, in]``, zero on and below the diagonal: row i times the weight of column i is what the columns behind it
    have to take over because column i reads X where the float model reads X'.

    Li, Yin, Lee, Xiao, Panda, "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", arXiv
    2504.02692: P = ((dX X^T L) * M) L^T with H^-1 = L L^T, M the strictly upper triangular mask, dX = X' - X.

    Args:
        cross: dX X^T, channels of the difference by channels of X, in the order of the columns.
        u: L^T, see `inverse_factor`.
    """
    return (cross @ u.T).triu_(1) @ u


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


def column_loop_cost(rows: int, columns: int) -> float:
    """Operations of rounding ``[rows, columns]`` and of measuring its layer objective, roughly, for sharing work."""
    return 4.0 * rows * columns**2 + 2.0 * columns**3


def gptq_round(
    w: torch.Tensor,
    h: torch.Tensor,
    quant: TensorQuant,
    *,
    damping: float = 0.01,
    block_size: int = 128,
    order: Order = "natural",
    static_groups: bool = False,
    grid: Grid | None = None,
    global_scale: torch.Tensor | None = None,
    cross: torch.Tensor | None = None,
) -> Rounded:
    """Round ``w`` against the inputs whose Gram matrix is ``h``.

    Args:
        w: ``[out, in]`` float32 or float64; not modified.
        h: ``[in, in]`` Gram matrix in the same dtype, any positive multiple of it; not modified. Columns that saw
            only zeros (zero diagonal) get weight zero.
        static_groups: take every group's grid from the original columns, before any update. Otherwise a grid is taken
            when the loop reaches the group, from the updated columns; with ``order="activation"`` groups are then runs
            of reordered columns, and ``group_index`` says which.
        grid: of the original groups, chosen before; the loop then takes none, whatever ``static_groups`` says.
        global_scale: ``[1]``, for two-level formats; None takes that of ``w``.
        cross: ``[in, in]``, (X' - X)^T X in the units of ``h``, or None: reproduce the output on the float model's
            inputs X' instead of that on X, see `asymmetry`.

    Groups along the outputs (axis "out") lie inside one column, so their grids are those of the updated column unless
    they are given, and any order is free: ``static_groups`` says nothing there and no ``group_index`` is needed.

    A block is never smaller than a group and holds whole groups, so that grids are always taken from fully updated
    columns (the published loop uses stale ones for groups that start inside a block).
    """
    columns, inside = w.shape[1], quant.grouping.axis == "out"
    width = 1 if inside else quant.grouping.width(columns)
    assert grid is not None or not quant.superblocks, "see `ptq.numerics.superblock_gptq`"
    diagonal = h.diagonal().clone()
    dead = diagonal == 0
    diagonal[dead] = 1
    fixed = grid is not None or (not inside and (width == columns or static_groups))
    global_scale = own_global_scale(w, quant, global_scale)
    grid = grid or grid_of(w, quant, None, global_scale)
    perm = column_order(diagonal, order, width)
    u, _ = inverse_factor(h, damping, perm, diagonal)
    wt = w.T[perm].contiguous()  # [in, out]: a column of W is a contiguous row here
    wt[dead[perm]] = 0
    regroup = order == "activation" and not fixed and not inside
    groups = (torch.arange(columns, device=w.device) if regroup or inside else perm) // width

    def by_group(per_group: torch.Tensor | None) -> torch.Tensor | None:
        if per_group is None:
            return None
        return per_group[perm] if inside else per_group.T.contiguous()

    first = by_group(grid.scale)
    assert first is not None
    grids = Grids(quant, first, by_group(grid.zero), groups.tolist(), fixed, global_scale)
    block = max(1, block_size // width) * width if not fixed else block_size
    p = None if cross is None else asymmetry(cross.index_select(0, perm).index_select(1, perm), u)
    codes, loss = column_loop(wt, u, p, grids, block)
    del wt, u, p
    restored = torch.empty_like(codes)
    restored[perm] = codes
    index = None
    if regroup:
        index = torch.empty(columns, dtype=torch.int32, device=w.device)
        index[perm] = groups.to(torch.int32)

    def by_line(per_group: torch.Tensor) -> torch.Tensor:
        if not inside:
            return per_group.T.contiguous()
        lines = torch.empty_like(per_group)
        lines[perm] = per_group
        return lines

    zero = None if grids.zero is None else by_line(grids.zero)
    return Rounded(restored.T.contiguous(), by_line(grids.scale), zero, index, loss)


def _ordered(h: torch.Tensor, order: torch.Tensor | None, diagonal: torch.Tensor | None) -> torch.Tensor:
    """``h`` itself, or a copy with its columns in another order, see `inverse_factor`."""
    if order is None:
        return h
    found = h.index_select(0, order).index_select(1, order)
    if diagonal is not None:
        found.diagonal().copy_(diagonal[order])
    return found
