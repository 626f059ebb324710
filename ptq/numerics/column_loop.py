"""Algorithm 1 of GPTQ (see `ptq.numerics.gptq`) once columns are in their order: rounding, and handing errors on.

On GPUs the loop over the columns of a block is one program where Triton is installed and the grids fit
(`ptq.numerics.gptq_triton`), everywhere else it is torch's operations, some twenty per column.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from ptq.numerics.grids import codes_of, grid_parameters, levels, step_of
from ptq.scheme import TensorQuant

PROGRAM_COLUMNS = 256
"""Columns of a block that `ptq.numerics.gptq_triton` holds in registers."""


@dataclass
class Grids:
    """Steps and zero points during the column loop, whose i-th visited column is original column ``perm[i]``.

    Attributes:
        scale, zero: ``[groups, out]`` by group of columns; for axis "out" ``[in, groups of rows]`` by visited column.
            The scale is divided by ``global_scale``, where there is one.
        group_of: the group of every visited column.
        fixed: grids are given; otherwise taken from updated weights when the loop reaches a group.
    """

    quant: TensorQuant
    scale: torch.Tensor
    zero: torch.Tensor | None
    group_of: list[int]
    fixed: bool
    global_scale: torch.Tensor | None

    def column(self, visited: int, rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Step ``[out]`` and zero of the visited column; ``rest [columns, out]`` starts with it, fully updated."""
        grouping, group = self.quant.grouping, self.group_of[visited]
        if grouping.axis == "out":
            width = grouping.width(rest.shape[1])
            if not self.fixed:
                self._take(visited, rest[0].view(-1, width))
            zero = None if self.zero is None else self.zero[visited].repeat_interleave(width)
            return self.scale[visited].repeat_interleave(width), zero
        width = grouping.width(len(self.group_of))
        if not self.fixed and visited % width == 0:
            self._take(group, rest[:width].T.unsqueeze(1))
        step = step_of(self.scale[group], self.global_scale)
        return step, None if self.zero is None else self.zero[group]

    def given(self, start: int, stop: int, out: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Steps ``[columns, out]`` and zeros of visited columns, of ``fixed`` grids without a global scale."""
        assert self.fixed and self.global_scale is None
        grouping, tables = self.quant.grouping, [self.scale] if self.zero is None else [self.scale, self.zero]
        if grouping.axis == "out":
            found = [table[start:stop].repeat_interleave(grouping.width(out), dim=1) for table in tables]
        else:
            found = [table[self.group_of[start:stop]] for table in tables]
        return found[0], found[1] if len(found) > 1 else None

    def _take(self, group: int, units: torch.Tensor) -> None:
        """Take the grid of these ``units``, a group of all rows ``[out, 1, width]`` or of a column ``[groups,
        width]``."""
        scale, zero = grid_parameters(units, self.quant, None, self.global_scale)
        self.scale[group] = scale.flatten()
        if self.zero is not None and zero is not None:
            self.zero[group] = zero.flatten()


def column_loop(
    wt: torch.Tensor, u: torch.Tensor, p: torch.Tensor | None, grids: Grids, block: int
) -> tuple[torch.Tensor, float]:
    """Algorithm 1 on ``wt [in, out]``, visited from the first row on and used up; codes ``[in, out]`` and the loss. The
    weight that ``p`` multiplies is that of the column when it is visited, inside a block and behind it. (The published
    code takes the rounded one behind the block, so that its result depends on the block size.)"""
    columns = wt.shape[0]
    visit = _visit_in_triton if _one_program(wt, grids, block) else _visit
    codes = torch.empty_like(wt, dtype=torch.uint8)
    loss = torch.zeros((), dtype=torch.float64)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        own = slice(start, stop)
        codes[own], errors, w1 = visit(wt[own], u[own, own], None if p is None else p[own, own], grids, start)
        wt[stop:].addmm_(u[own, stop:].T, errors, alpha=-1)
        if p is not None:
            wt[stop:].addmm_(p[own, stop:].T, w1)
        loss += errors.square().sum().double().cpu()
    return codes, float(loss)


def _visit(
    wt: torch.Tensor, u: torch.Tensor, p: torch.Tensor | None, grids: Grids, start: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The columns of one block, of which ``start`` is the first: codes, scaled errors and the weights as they were
    visited, ``[columns, out]``."""
    w1, quant = wt.clone(), grids.quant
    codes, errors = torch.empty_like(w1, dtype=torch.uint8), torch.empty_like(w1)
    inverse_diagonal = (1 / u.diagonal()).tolist()
    for i in range(len(w1)):
        s, z = grids.column(start + i, w1[i:])
        level = levels(w1[i], s, z, quant)
        codes[i] = codes_of(level, z, quant)
        error = (w1[i] - level * s).mul_(inverse_diagonal[i])
        errors[i] = error
        w1[i + 1 :].addr_(u[i, i + 1 :], error, alpha=-1)
        if p is not None:
            w1[i + 1 :].addr_(p[i, i + 1 :], w1[i])
    return codes, errors, w1


def _visit_in_triton(
    wt: torch.Tensor, u: torch.Tensor, p: torch.Tensor | None, grids: Grids, start: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `_visit`, on a GPU."""
    from ptq.numerics.gptq_triton import round_block

    step, zero = grids.given(start, start + len(wt), wt.shape[1])
    return round_block(wt, u, p, step, zero, grids.quant)


def _one_program(wt: torch.Tensor, grids: Grids, block: int) -> bool:
    """Whether a block of columns is one program on a GPU: on integer grids that are given."""
    fits = grids.fixed and grids.quant.float_format is None and wt.dtype == torch.float32 and block <= PROGRAM_COLUMNS
    return fits and _runs_triton(wt.device)


def _runs_triton(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None
