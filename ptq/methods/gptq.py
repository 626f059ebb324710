"""GPTQ (Frantar et al. 2022, arXiv 2210.17323); the column loop is in `ptq.numerics.gptq`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from calibration.errors import Problem
from calibration.walk.context import Context
from calibration.walk.passes import Phase, Stream
from calibration.walk.segment import Segment
from calibration.walk.statistics import Gram, Statistic
from ptq.methods.rounding import global_scales, put
from ptq.methods.rtn import round_to_nearest
from ptq.numerics.gptq import Order, gptq_round
from ptq.quantized import QuantizedTensor
from ptq.scheme import QuantScheme


@dataclass(frozen=True)
class Gptq:
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
    phases: ClassVar[tuple[Phase, ...]] = (Phase.ROUND,)
    stream: ClassVar[Stream] = "quantized"
    statistics: ClassVar[tuple[type[Statistic], ...]] = (Gram,)
    parts: ClassVar[tuple[str, ...]] = ()

    def check(self, view: Any) -> Iterable[Problem]:
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
                context.refresh(stage, Gram)
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
                w, scheme, clip = segment.weight(name), segment.schemes[name], segment.ranges.get(name)
                put(segment, name, round_to_nearest(w, scheme, clip, shared_scales.get(name)), None)
                segment.note(name, gptq="no calibration tokens: rounded to nearest")
            return
        for members in _stacks(segment, linears):
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
                clip=_stacked_bounds(segment, members),
                global_scale=global_scale,
            )
            first = 0
            for name, w in zip(members, weights, strict=True):
                rows = first, first + w.shape[0]
                codes, scale, zero = result.rows(*rows, scheme.weights)
                index, first = None if result.group_index is None else result.group_index.clone(), rows[1]
                over = result.super_rows(*rows)
                q = QuantizedTensor(codes, scale.float(), zero, scheme, index, global_scale=global_scale, **over)
                put(segment, name, q, gram.matrix)
                context.advance(name)


def _stacks(segment: Segment, linears: Sequence[str]) -> list[list[str]]:
    """Linears of one input by scheme: their rows go through one column loop. A whole column that shares a step is one
    of one linear, and so is a step of a whole tensor: such linears stay alone."""
    stacks: dict[tuple[QuantScheme, str], list[str]] = {}
    for name in linears:
        grouping = segment.schemes[name].weights.grouping
        alone = (grouping.axis == "out" and grouping.size is None) or grouping.kind == "tensor"
        stacks.setdefault((segment.schemes[name], name if alone else ""), []).append(name)
    return list(stacks.values())


def _stacked_bounds(segment: Segment, members: Sequence[str]) -> torch.Tensor | None:
    """Clipping bounds of a stack; linears without a range of their own are bounded by nothing."""
    known = next((segment.ranges[name] for name in members if name in segment.ranges), None)
    if known is None:
        return None
    bounds, across = [], segment.schemes[members[0]].weights.grouping.axis == "out"
    for name in members:
        shape = segment.weight(name).shape
        grouping = segment.schemes[name].weights.grouping
        unbounded = torch.full(grouping.scales((shape[0], shape[1])), torch.inf, device=known.device)
        bounds.append(segment.ranges.get(name, unbounded))
    return torch.cat(bounds, dim=1 if across else 0)
