"""GPTQ (Frantar et al. 2022, arXiv 2210.17323); the column loop is in `ptq.numerics.gptq`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from calibration.architectures import SharedInput
from calibration.errors import Problem
from calibration.memory import return_freed
from calibration.walk.context import Context
from calibration.walk.cost import BlockShape, Work, searching, total
from calibration.walk.passes import Pass, Phase, PlanView, Stream
from calibration.walk.segment import Segment
from calibration.walk.statistics import Gram, Statistic
from ptq.linears import ModelLayout
from ptq.methods.rounding import global_scales, place, put, relative_errors
from ptq.methods.rtn import round_to_nearest
from ptq.numerics.gptq import Order, Rounded, column_loop_cost, gptq_round
from ptq.numerics.grids import Grid, grid_of, stacked
from ptq.numerics.superblock_gptq import TIMES, gptq_round_super, settling_cost
from ptq.quantized import QuantizedTensor
from ptq.scheme import QuantScheme, TensorQuant


@dataclass(frozen=True)
class Gptq(Pass):
    """Round column by column with second-order error feedback.

    Attributes:
        damping: added to diag(H), as a fraction of its mean.
        block_size: columns updated lazily at once; does not change the result.
        order: column order, see `ptq.numerics.gptq.Order`. ``group`` needs no column index in the file.
        static_groups: grids from the original weights instead of the updated ones.
        true_sequential: gather statistics again before each stage, so that o sees the rounded v and down the rounded
            up: one more forward pass per stage.
    """

    damping: float = 0.01
    block_size: int = 128
    order: Order = "activation"
    static_groups: bool = True
    true_sequential: bool = False

    name: ClassVar[str] = "gptq"
    title: ClassVar[str | None] = "GPTQ"
    summary: ClassVar[str] = "rounds column by column and moves each column's error into those still to come"
    phases: ClassVar[tuple[Phase, ...]] = (Phase.ROUND,)
    expected_errors: ClassVar[Literal["nearest", "feedback"] | None] = "feedback"
    stream: ClassVar[Stream] = "quantized"
    statistics: ClassVar[tuple[type[Statistic], ...]] = (Gram,)
    spreads: ClassVar[bool] = True

    def check(self, view: PlanView[ModelLayout]) -> Iterable[Problem]:
        if not 0 < self.damping < 1:
            yield Problem("gptq.damping", f"{self.damping} is outside (0, 1)", "use 0.01")
        if self.block_size < 1:
            yield Problem("gptq.block_size", f"{self.block_size} is not positive", "use 128")

    def forwards(self) -> int:
        return 3 if self.true_sequential else 0

    def cost(self, block: BlockShape) -> list[Work]:
        """A column loop for the linears of every input: a step per column on the rest of its block of columns, the
        columns behind the block by one product, and a factorization. On super-blocks the grid is searched for, and each
        of the starts is settled."""
        tasks = []
        for shared in block.inputs:
            rows, n = sum(shared.rows), shared.width
            loop = Work(
                exact=3.0 * n**3 + 1.0 * rows * n**2,
                values=rows * n * (0.5 * self.block_size + 40.0),
                calls=25.0 * n,
            )
            if block.integers:
                exact, values = settling_cost(rows, n, block.group, block.integers)
                start = loop + Work(exact=exact, values=values)
                loop = searching(block, rows, n) + start * float(len(TIMES))
            tasks.append(total([loop, *(block.measuring(own, n) for own in shared.rows)]))
        return tasks

    @property
    def reorders(self) -> bool:
        """Whether groups follow the activation order, so that files need a column index."""
        return self.order == "activation" and not self.static_groups

    def apply(self, segment: Segment, context: Context) -> None:
        shared_scales = global_scales(segment)
        stages = sorted({shared.stage for shared in segment.spec.inputs})
        for now in [[stage] for stage in stages] if self.true_sequential else [stages]:
            if self.true_sequential and now[0] > 0:
                context.refresh(now[0], *self.statistics)
            inputs = [shared for stage in now for shared in segment.spec.inputs if shared.stage == stage]
            self._round(segment, context, inputs, shared_scales)

    def _round(
        self,
        segment: Segment,
        context: Context,
        inputs: Sequence[SharedInput],
        shared_scales: Mapping[str, torch.Tensor],
    ) -> None:
        """Linears that share an input are stacked, one run of the column loop per scheme among them. The loops do not
        depend on each other, and several processes spread them."""
        stacks: list[list[str]] = []
        for shared in inputs:
            linears = [name for name in shared.linears if name in segment.schemes]
            if linears and context.statistic(linears[0], Gram).tokens == 0:  # an expert without data, which is allowed
                for name in linears:
                    w, scheme, grid = segment.weight(name), segment.schemes[name], segment.grids.get(name)
                    put(segment, name, round_to_nearest(w, scheme, grid, shared_scales.get(name)), None)
                    segment.note(name, gptq="no calibration tokens: rounded to nearest")
            else:
                stacks += self._stacks(segment, linears)
        shapes = [[segment.weight(name).shape for name in members] for members in stacks]
        costs = [column_loop_cost(sum(rows for rows, _ in members), members[0][1]) for members in shapes]
        found = context.spread(costs, lambda i: self._column_loop(segment, context, stacks[i], shared_scales))
        for members, rounded in zip(stacks, found, strict=True):
            for name in members:
                q, errors = rounded[name]
                place(segment, name, q, q.dequantize(segment.weight(name).dtype), errors)
                context.advance(name)

    def _column_loop(
        self, segment: Segment, context: Context, members: Sequence[str], shared_scales: Mapping[str, torch.Tensor]
    ) -> dict[str, tuple[QuantizedTensor, dict[str, float]]]:
        """One stack, and the errors of its linears."""
        return_freed()  # of the stack before, whose matrices had other sizes
        gram = context.statistic(members[0], Gram).matrix
        scheme, weights = segment.schemes[members[0]], [segment.weight(name) for name in members]
        global_scale = shared_scales.get(members[0])
        result = self._rounded(
            weights[0] if len(weights) == 1 else torch.cat(weights),
            gram,
            scheme.weights,
            self._grid(segment, members, global_scale),
            global_scale,
            self._cross(context, members[0]),
        )
        found: dict[str, tuple[QuantizedTensor, dict[str, float]]] = {}
        first = 0
        for name, w in zip(members, weights, strict=True):
            rows = first, first + w.shape[0]
            codes, scale, zero = result.rows(*rows, scheme.weights)
            first = rows[1]
            index = self._index(result.group_index, w, scheme.weights)
            q = QuantizedTensor(codes, scale.float(), zero, scheme, index, {}, global_scale, *result.super_rows(*rows))
            found[name] = q, relative_errors(w, q.dequantize(w.dtype), gram)
        return found

    def _rounded(
        self,
        w: torch.Tensor,
        gram: torch.Tensor,
        quant: TensorQuant,
        grid: Grid | None,
        global_scale: torch.Tensor | None,
        cross: torch.Tensor | None,
    ) -> Rounded:
        damping, size, order = self.damping, self.block_size, self.order
        if quant.superblocks:  # no pass chooses such a grid beforehand
            return gptq_round_super(w, gram, quant, damping=damping, block_size=size, order=order, cross=cross)
        return gptq_round(
            w,
            gram,
            quant,
            damping=damping,
            block_size=size,
            order=order,
            static_groups=self.static_groups,
            grid=grid,
            global_scale=global_scale,
            cross=cross,
        )

    def _cross(self, context: Context, linear: str) -> torch.Tensor | None:
        """See ``cross`` of `gptq_round`."""
        return None

    def _stacks(self, segment: Segment, linears: Sequence[str]) -> list[list[str]]:
        """Linears of one input by scheme: their rows go through one column loop. A whole column that shares a step is
        one of one linear, and so is a step of a whole tensor or of a block: such linears stay alone. Grids that were
        chosen and grids that the loop takes do not go together."""
        stacks: dict[tuple[QuantScheme, str, bool], list[str]] = {}
        for name in linears:
            grouping = segment.schemes[name].weights.grouping
            alone = (grouping.axis == "out" and grouping.size is None) or grouping.kind in ("tensor", "block")
            static = name in segment.grids or (self.static_groups and grouping.axis == "in")
            stacks.setdefault((segment.schemes[name], name if alone else "", static), []).append(name)
        return list(stacks.values())

    def _grid(self, segment: Segment, members: Sequence[str], global_scale: torch.Tensor | None) -> Grid | None:
        """The grid of a stack: chosen ones, and that of the weights as they are for members without one."""
        if not any(name in segment.grids for name in members):
            return None
        quant = segment.schemes[members[0]].weights
        own = [segment.grids.get(name) or grid_of(segment.weight(name), quant, None, global_scale) for name in members]
        return stacked(own, quant)

    def _index(self, found: torch.Tensor | None, w: torch.Tensor, quant: TensorQuant) -> torch.Tensor | None:
        """The group of every column ``[in]`` int32, where files of this run tell it."""
        width = None if quant.grouping.axis == "out" or quant.superblocks else quant.grouping.size
        if found is not None or not self.reorders or width is None:
            return None if found is None else found.clone()
        columns = torch.arange(w.shape[1], dtype=torch.int32, device=w.device)
        return columns // width  # on a chosen grid
