"""Learned rounding on grids with super-blocks (GGUF's K-quants): offsets before rounding and the float16 scales.

As `ptq.numerics.signround`, with ``w = s (clamp(round((W + o) / s + V) + z, 0, N) - z) - o`` for the step ``s = d sc``.
Grids with minima have ``o = dmin mn`` and z = 0, symmetric ones o = 0 and z in the middle. The integers sc and mn of
the groups stay; d and dmin are multiplied by trained factors, so that what is learned has a place in the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ptq.numerics.groups import join, split
from ptq.numerics.signround import CHUNK, INSIDE
from ptq.numerics.superblocks import SuperGrid, to_half
from ptq.scheme import TensorQuant


@dataclass
class LearnedSuper:
    """One weight in training; B super-blocks of G groups per row.

    Attributes:
        start_grid: what training starts from.
        units: ``[out, G, width]``, the weight; where the start rounded it to another level than the nearest, the end of
            that level's cell.
        offset: V ``[out, G, width]``.
        low, high: logarithms ``[out, B]`` of the factors of dmin (nothing for symmetric grids) and d.
    """

    quant: TensorQuant
    start_grid: SuperGrid
    units: torch.Tensor
    offset: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    @staticmethod
    def start(w: torch.Tensor, codes: torch.Tensor, grid: SuperGrid, quant: TensorQuant) -> LearnedSuper:
        """Begin at a rounding of ``w [out, in]``: uint8 codes ``[out, in]`` on a grid."""
        minima = None if grid.super_min is None else grid.super_min.to(w.dtype)
        grid = replace(grid, super_scale=grid.super_scale.to(w.dtype), super_min=minima)
        step, offset = _step_and_offset(grid)
        code = split(codes, quant.grouping).to(w.dtype) - _zero(quant)
        lowest = torch.where(code <= -_zero(quant), -torch.inf, code - INSIDE)
        highest = torch.where(code >= quant.levels - _zero(quant), torch.inf, code + INSIDE)
        position = ((split(w, quant.grouping) + offset) / step).clamp_(lowest, highest)
        factors = torch.zeros_like(grid.super_scale)
        units = position.mul_(step).sub_(offset)
        return LearnedSuper(quant, grid, units, torch.zeros_like(units), factors, factors.clone())

    def copy(self) -> LearnedSuper:
        """With tensors of its own for what is trained."""
        return replace(self, offset=self.offset.clone(), low=self.low.clone(), high=self.high.clone())

    def grid(self) -> SuperGrid:
        """The grid with the scales that were learned, exact in float16."""
        first = self.start_grid
        minima = None if first.super_min is None else to_half(first.super_min * self.low.exp())
        return replace(first, super_scale=to_half(first.super_scale * self.high.exp()), super_min=minima)

    def rounded(self) -> dict[str, torch.Tensor | None]:
        """What a `QuantizedTensor` has of it."""
        grid = self.grid()
        codes = torch.cat([part._codes(*_step_and_offset(part.grid()))[1] for part in self._parts()])
        return {
            "codes": join(codes, self.quant.grouping).to(torch.uint8).contiguous(),
            "super_scale": grid.super_scale.float(),
            "super_min": None if grid.super_min is None else grid.super_min.float(),
        }

    def weight(self) -> torch.Tensor:
        """The rounded weight ``[out, in]``."""
        found = []
        for part in self._parts():
            step, offset = _step_and_offset(part.grid())
            found.append(part._codes(step, offset)[1].sub_(_zero(self.quant)).mul_(step).sub_(offset))
        return join(torch.cat(found), self.quant.grouping)

    def descend(self, gradient: torch.Tensor, rate: float, range_rate: float) -> None:
        """One step against the signs of the gradients, as in `Learned.descend`."""
        lines = split(gradient, self.quant.grouping)
        first = 0
        for part in self._parts():
            stop = first + part.units.shape[0]
            part._descend(lines[first:stop], rate, range_rate)
            first = stop

    def _parts(self) -> Iterator[LearnedSuper]:
        """The same over a few rows at a time, whose tensors are views."""
        rows = max(1, CHUNK // (self.units[0].numel() or 1))
        for start in range(0, self.units.shape[0], rows):
            part = slice(start, start + rows)
            grid = self.start_grid.rows(part)
            yield LearnedSuper(self.quant, grid, self.units[part], self.offset[part], self.low[part], self.high[part])

    def _codes(self, step: torch.Tensor, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Before and behind the clamp."""
        code = torch.add(self.units, offset).div_(step).add_(self.offset).round_().add_(_zero(self.quant))
        return code, code.clamp(0, self.quant.levels)

    def _descend(self, g: torch.Tensor, rate: float, range_rate: float) -> None:
        step, offset = _step_and_offset(self.grid())
        code, clamped = self._codes(step, offset)
        inside = g * (clamped == code)
        # d w / d s: the level, and inside the range less the position, where its own slopes are 1 in W and 0 in o
        pull = torch.add(self.units, offset).div_(step).mul_(inside).sum(dim=-1)
        slope = clamped.sub_(_zero(self.quant)).mul_(g).sum(dim=-1).sub_(pull).mul_(step.squeeze(-1))
        self.high -= range_rate * self._per_block(slope).sign()
        outside = (inside - g).sum(dim=-1).mul_(offset.squeeze(-1))
        self.low -= range_rate * self._per_block(outside).sign()
        inside.mul_(step.sign())
        self.offset.sub_(inside.sign_(), alpha=rate).clamp_(-0.5, 0.5)

    def _per_block(self, per_group: torch.Tensor) -> torch.Tensor:
        return per_group.unflatten(-1, (self.high.shape[-1], -1)).sum(dim=-1)


def _zero(quant: TensorQuant) -> int:
    """The code of 0 in symmetric grids."""
    return 2 ** (quant.bits - 1) if quant.symmetric else 0


def _step_and_offset(grid: SuperGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """The step and what is subtracted, ``[out, G, 1]``; that is 0 for symmetric grids."""
    step, offset = grid.step, grid.offset
    return step.unsqueeze(-1), (torch.zeros_like(step) if offset is None else offset).unsqueeze(-1)
