"""OutlierTune (Wang et al. 2024, arXiv 2406.18832): a step for every input channel, executed in the weights beforehand.

What a norm feeds gets static inputs: the norm's bias is shifted so that every channel is symmetric around zero (the
linears' biases take the shift back), and the step of each channel moves from the input into the weight's column. The
norm then emits numbers that only have to be rounded. Norms without a bias (RMSNorm) are not shifted. All other linears
keep the inputs of their scheme. It does not round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from calibration.architectures import ArchitectureSpec, Balance, resolve
from calibration.context import Context
from calibration.errors import Problem
from calibration.passes import Phase, Stream
from calibration.segment import Segment
from calibration.statistics import Midpoints, Statistic
from ptq.activations import ActivationQuant
from ptq.export.checks import refuse
from ptq.linears import ModelLayout
from ptq.methods.balancing import balance, quantized_consumers
from ptq.numerics.outliertune import channel_steps, covering_scale, shift_of
from ptq.scheme import QuantScheme


@dataclass(frozen=True)
class OutlierTune:
    """Symmetrization and pre-executed dequantization in front of linears that a norm feeds.

    Attributes:
        shift: move channels to be symmetric around zero, where the norm has a bias.
    """

    shift: bool = True

    name: ClassVar[str] = "outliertune"
    phases: ClassVar[tuple[Phase, ...]] = (Phase.BALANCE, Phase.CHOOSE)
    stream: ClassVar[Stream] = "quantized"
    statistics: ClassVar[tuple[type[Statistic], ...]] = (Midpoints,)
    parts: ClassVar[tuple[str, ...]] = ("input_scale",)

    def check(self, view: ModelLayout) -> Iterable[Problem]:
        floats = [linear for linear in view.quantized if linear.scheme is not None and not _integers(linear.scheme)]
        reason = "has no integer inputs, whose channels OutlierTune gives steps"
        yield from refuse(floats, reason, "use a scheme such as w8a8-asym or w6a6-asym, or a rule that says float")

    def forwards(self) -> int:
        return 0

    def alternatives(self, scheme: QuantScheme, shape: tuple[int, int]) -> Sequence[QuantScheme]:
        """Static inputs, for linears that a norm feeds."""
        return [_static(scheme)] if _integers(scheme) else []

    def refusals(self, architecture: ArchitectureSpec) -> Iterable[Problem]:
        return ()

    def remarks(self, architecture: ArchitectureSpec, view: Any) -> Iterable[str]:
        if self.shift and architecture.norm != "layer":
            yield "outliertune: norms without a bias cannot shift their channels; steps alone move into the weights"

    def config_changes(self, config: Any) -> Mapping[str, Any]:
        """Linears that take back a shift need a bias."""
        architecture = resolve(config)
        if not self.shift or architecture.norm != "layer":
            return {}
        return {key: True for key in architecture.bias_switches if not getattr(config, key)}

    def new_biases(self, architecture: ArchitectureSpec, index: int, stored: Collection[str]) -> Collection[str]:
        found: dict[str, None] = {}
        for group in architecture.block(index).balance:
            if self.shift and group.kind == "norm" and f"{group.producer}.bias" in stored:
                for linear in group.consumers:
                    siblings = [members for members in architecture.bias_switches.values() if linear in members]
                    found |= dict.fromkeys(n for members in siblings or [(linear,)] for n in members)
        return [linear for linear in found if f"{linear}.bias" not in stored]

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
            segment.schemes[linear] = _static(scheme)
            segment.parts.setdefault(linear, {})["input_scale"] = covering_scale(float(largest), inputs.bits)
            segment.note(linear, **{"outliertune.shifted": str(bool(moved.any())).lower()})


def take_shift(segment: Segment, group: Balance, shift: torch.Tensor) -> torch.Tensor:
    """Subtract ``shift [channels]`` from the norm's output, and let the consumers' biases add W shift.

    Returns:
        The shift that was taken: a norm's bias is rounded to its stored dtype first, so that saving it does not undo
        exactness.
    """
    name = f"{group.producer}.bias"
    before = segment.masters[name].clone()
    after = (before - shift).to(segment.stored_dtypes[name]).to(before.dtype)
    taken = before - after
    segment.replace(name, after)
    for linear in group.consumers:
        bias = f"{linear}.bias"
        moved = segment.masters[bias].double() + segment.weight(linear).double() @ taken.double()
        segment.replace(bias, moved)
    return taken


def _integers(scheme: QuantScheme) -> bool:
    return scheme.inputs is not None and scheme.inputs.kind == "int" and scheme.inputs.smooth is None


def _static(scheme: QuantScheme) -> QuantScheme:
    assert scheme.inputs is not None
    inputs = ActivationQuant(scheme.inputs.bits, "int", "tensor", dynamic=False)
    return dataclasses.replace(scheme, inputs=inputs)
