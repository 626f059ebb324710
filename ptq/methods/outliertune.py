"""OutlierTune (Wang et al. 2024, arXiv 2406.18832): a step for every input channel, executed in the weights beforehand.

What a norm feeds gets static inputs: the norm's bias is shifted so that every channel is symmetric around zero (the
linears' biases take the shift back), and the step of each channel moves from the input into the weight's column. The
norm then emits numbers that only have to be rounded. Norms without a bias (RMSNorm) are not shifted. All other linears
keep the inputs of their scheme. It does not round.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from calibration.architectures import ArchitectureSpec, Balance, BlockSpec
from calibration.errors import Problem
from calibration.walk.context import Context
from calibration.walk.passes import Pass, Phase, PlanView, Stream
from calibration.walk.ranges import Midpoints
from calibration.walk.segment import Segment
from calibration.walk.statistics import Statistic
from ptq.activations import ActivationQuant
from ptq.formats.checks import refuse
from ptq.linears import ModelLayout
from ptq.methods.balancing import balance, quantized_consumers
from ptq.methods.static_steps import (
    biases_behind_norms,
    has_integer_inputs,
    switched_biases,
    take_shift,
    with_static_inputs,
)
from ptq.numerics.outliertune import channel_steps, covering_scale, shift_of
from ptq.scheme import QuantScheme


@dataclass(frozen=True)
class OutlierTune(Pass):
    """Symmetrization and pre-executed dequantization in front of linears that a norm feeds.

    Attributes:
        shift: move channels to be symmetric around zero, where the norm has a bias.
    """

    shift: bool = True

    name: ClassVar[str] = "outliertune"
    summary: ClassVar[str] = "gives each channel behind a norm a static step, and moves the steps into the weights"
    default_scheme: ClassVar[str | None] = "w8a8-asym"
    phases: ClassVar[tuple[Phase, ...]] = (Phase.BALANCE, Phase.CHOOSE)
    stream: ClassVar[Stream] = "quantized"
    statistics: ClassVar[tuple[type[Statistic], ...]] = (Midpoints,)
    parts: ClassVar[tuple[str, ...]] = ("input_scale",)

    def check(self, view: PlanView[ModelLayout]) -> Iterable[Problem]:
        floats = [n for n in view.layout.quantized if n.scheme is not None and not has_integer_inputs(n.scheme)]
        reason = "has no integer inputs, whose channels OutlierTune gives steps"
        yield from refuse(floats, reason, "use a scheme such as w8a8-asym or w6a6-asym, or a rule that says float")

    def alternatives(self, scheme: QuantScheme, shape: tuple[int, int]) -> Sequence[QuantScheme]:
        """Static inputs, for linears that a norm feeds."""
        return [with_static_inputs(scheme)] if has_integer_inputs(scheme) else []

    def remarks(self, view: PlanView[ModelLayout]) -> Iterable[str]:
        if self.shift and view.spec.norm != "layer":
            yield "outliertune: norms without a bias cannot shift their channels; steps alone move into the weights"

    def config_changes(self, config: Any) -> Mapping[str, Any]:
        """Linears that take back a shift need a bias."""
        return switched_biases(config) if self.shift else {}

    def new_biases(self, architecture: ArchitectureSpec, index: int, stored: Collection[str]) -> Collection[str]:
        return biases_behind_norms(architecture, index, stored) if self.shift else ()

    def calibrated(self, block: BlockSpec) -> Collection[str]:
        return [linear for group in block.balance if group.kind == "norm" for linear in group.consumers]

    def apply(self, segment: Segment, context: Context) -> None:
        for group in segment.spec.balance:
            inputs = quantized_consumers(segment, group)
            if group.kind == "norm" and inputs:
                self._tune(segment, context, group, [name for names in inputs for name in names])
                context.show(group.producer)

    def _tune(self, segment: Segment, context: Context, group: Balance, linears: Sequence[str]) -> None:
        inputs = segment.schemes[linears[0]].inputs
        assert isinstance(inputs, ActivationQuant)
        seen = context.statistic(linears[0], Midpoints)
        bias = f"{group.producer}.bias"
        shift = torch.zeros_like(seen.total)
        if self.shift and bias in segment.masters:
            shift = shift_of(seen.total, seen.sequences)
        steps = channel_steps(seen.low, seen.high, shift, inputs.bits)
        divided = balance(segment, context, group, steps)
        moved = shift / divided
        if bool(moved.any()):
            moved = take_shift(segment, group, moved)
            context.forget(group.consumers)
        largest = torch.maximum(seen.high - moved, moved - seen.low).amax()
        for linear in linears:
            scheme = segment.schemes[linear]
            segment.schemes[linear] = with_static_inputs(scheme)
            segment.parts.setdefault(linear, {})["input_scale"] = covering_scale(float(largest), inputs.bits)
            segment.note(linear, **{"outliertune.shifted": str(bool(moved.any())).lower()})
