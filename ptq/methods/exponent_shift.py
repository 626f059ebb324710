"""LLM-FP4's pre-shifted exponent biases (Liu et al. 2023, arXiv 2310.16836) in the form that files can hold.

Powers of two per channel move from the activations' exponent biases into the producer and the columns of the weights
before these are quantized, so that one grid of floats serves all channels. The published code multiplies the weights
by them after quantization, and no file format holds that. The function of the model is unchanged to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from calibration.errors import Problem
from calibration.walk.context import Context
from calibration.walk.passes import Pass, Phase, PlanView, Stream
from calibration.walk.segment import Segment
from calibration.walk.statistics import AbsMax, Statistic
from ptq.linears import ModelLayout
from ptq.methods.balancing import balance, by_value_channel, note_all, quantized_consumers
from ptq.numerics.exponent_shift import channel_shifts
from ptq.numerics.floats import power_of_two
from ptq.scheme import FloatFormat


@dataclass(frozen=True)
class ExponentShift(Pass):
    """Multiply input channels by 2^n_j and the columns that read them by 2^-n_j.

    Attributes:
        exponent_bits, mantissa_bits: of the activations; n_j is at most 2^exponent_bits - 1.
    """

    exponent_bits: int = 2
    mantissa_bits: int = 1

    name: ClassVar[str] = "exponent-shift"
    summary: ClassVar[str] = (
        "moves powers of two per input channel into norms and weights, so that one float grid serves all channels"
    )
    phases: ClassVar[tuple[Phase, ...]] = (Phase.BALANCE,)
    stream: ClassVar[Stream] = "either"
    statistics: ClassVar[tuple[type[Statistic], ...]] = (AbsMax,)

    def check(self, view: PlanView[ModelLayout]) -> Iterable[Problem]:
        if not 1 <= self.exponent_bits <= 3:
            yield Problem(
                "exponent-shift.exponent_bits",
                f"{self.exponent_bits} is outside 1 to 3 (wider formats reach every channel by themselves)",
                "use 2",
            )
        if not 0 <= self.mantissa_bits <= 6:
            yield Problem("exponent-shift.mantissa_bits", f"{self.mantissa_bits} is outside 0 to 6", "use 1")

    def apply(self, segment: Segment, context: Context) -> None:
        number = FloatFormat(self.exponent_bits, self.mantissa_bits)
        for group in segment.spec.balance:
            inputs = quantized_consumers(segment, group)
            if not inputs:
                continue
            maxima = torch.stack([context.statistic(names[0], AbsMax).maximum for names in inputs]).amax(dim=0)
            n, _ = channel_shifts(by_value_channel(group, maxima).amax(dim=0), number)
            balance(segment, context, group, power_of_two(-n, n.dtype))
            note_all(segment, inputs, **{"exponent-shift.mean": float(n.mean())})
            context.show(group.producer)
