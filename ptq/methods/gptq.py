"""GPTQ (Frantar et al. 2022, arXiv 2210.17323); the column loop is in `ptq.numerics.gptq`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from calibration.errors import Problem
from calibration.walk.context import Context
from calibration.walk.passes import Pass, Phase, PlanView, Stream
from calibration.walk.segment import Segment
from calibration.walk.statistics import Gram, Statistic
from ptq.linears import ModelLayout
from ptq.methods.rounding import global_scales, put
from ptq.methods.rtn import round_to_nearest
from ptq.numerics.gptq import Order, gptq_round
from ptq.numerics.grids import Grid, grid_of, stacked
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

    def check(self, view: PlanView[ModelLayout]) -> Iterable[Problem]:
        if not 0 < self.damping < 1:
            yield Problem("gptq.damping", f"{self.damping} is outside (0, 1)", "use 0.01")
        if self.block_size < 1:
            yield Problem("gptq.block_size", f"{self.block_size} is not positive", "use 128")

    def forwards(self) -> int:
        return 3 if self.true_sequential else 0

    @property
    def reorders(self) -> bool:
        """Whether groups follow the activation order, so that files need a column index."""
        return self.order == "activation" and not self.static_groups

    def apply(self, segment: Segment, context: Context) -> None:
        shared_scales = global_scales(segment)
        stages = sorted({shared.stage for shared in segment.spec.inputs})
        for stage in stages:
            if self.true_sequential and stage > 0:
                context.refresh(stage, *self.statistics)
            for shared in segment.spec.inputs:
                linears = [name for name in shared.linears if name in segment.schemes]
                if shared.stage == stage and linears:
                    self._round(segment, context, linears, shared_scales)

    def _round(
        self, segment: Segment, context: Context, linears: Sequence[str], shared_scales: Mapping[str, torch.Tensor]
    ) -> None:
        """Linears that share an input are stacked, one run of the column loop per scheme among them."""
        gram = context.statistic(linears[0], Gram)
        if gram.tokens == 0:  # an expert without data, which the user allowed
            for name in linears:
                w, scheme, grid = segment.weight(name), segment.schemes[name], segment.grids.get(name)
                put(segment, name, round_to_nearest(w, scheme, grid, shared_scales.get(name)), None)
                segment.note(name, gptq="no calibration tokens: rounded to nearest")
            return
        for members in self._stacks(segment, linears):
            scheme, weights = segment.schemes[members[0]], [segment.weight(name) for name in members]
            global_scale = shared_scales.get(members[0])
            result = gptq_round(
                torch.cat(weights),
                gram.matrix,
                scheme.weights,
                damping=self.damping,
                block_size=self.block_size,
                order=self.order,
                static_groups=self.static_groups,
                grid=self._grid(segment, members, global_scale),
                global_scale=global_scale,
                cross=self._cross(context, linears[0]),
            )
            first = 0
            for name, w in zip(members, weights, strict=True):
                codes, scale, zero = result.rows(first, first + w.shape[0], scheme.weights)
                first += w.shape[0]
                index = self._index(result.group_index, w, scheme.weights)
                q = QuantizedTensor(codes, scale.float(), zero, scheme, index, global_scale=global_scale)
                put(segment, name, q, gram.matrix)
                context.advance(name)

    def _cross(self, context: Context, linear: str) -> torch.Tensor | None:
        """See ``cross`` of `gptq_round`."""
        return None

    def _stacks(self, segment: Segment, linears: Sequence[str]) -> list[list[str]]:
        """Linears of one input by scheme: their rows go through one column loop. A whole column that shares a step is
        one of one linear, and so is a step of a whole tensor: such linears stay alone. Grids that were chosen and
        grids that the loop takes do not go together."""
        stacks: dict[tuple[QuantScheme, str, bool], list[str]] = {}
        for name in linears:
            grouping = segment.schemes[name].weights.grouping
            alone = (grouping.axis == "out" and grouping.size is None) or grouping.kind == "tensor"
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
        if found is not None or not self.reorders or quant.grouping.axis == "out" or quant.grouping.size is None:
            return None if found is None else found.clone()
        columns = torch.arange(w.shape[1], dtype=torch.int32, device=w.device)
        return columns // quant.grouping.size  # on a chosen grid
