"""Runtime Smooth (Yi et al. 2024, arXiv 2409.20361): inputs are smoothed by channel maxima that they have at run time.

Weights do not change, so the pass only says which linears smooth and how; the mathematics is in `ptq.numerics.smooth`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from calibration.errors import Problem
from calibration.walk.context import Context
from calibration.walk.passes import Pass, Phase, PlanView
from calibration.walk.segment import Segment
from ptq.activations import RuntimeSmooth
from ptq.linears import ModelLayout
from ptq.scheme import QuantScheme


@dataclass(frozen=True)
class Rs(Pass):
    """Give linears with quantized inputs a scheme that smooths them.

    Attributes:
        group: channels that share a scale after sorting; 1 is the simulated upper bound (per channel).
        reorder: sort channels by their maxima.
        block: tokens over which maxima are taken, so that no token depends on a later block; 0 takes the whole
            sequence, as published.
        attention: also smooth the linears that make queries, keys and values. The authors' release leaves them plain.
    """

    group: int = 128
    reorder: bool = True
    block: int = 0
    attention: bool = False

    name: ClassVar[str] = "rs"
    summary: ClassVar[str] = "divides inputs by channel maxima that they have at run time"
    default_scheme: ClassVar[str | None] = "w4a4"
    phases: ClassVar[tuple[Phase, ...]] = (Phase.CHOOSE,)

    def check(self, view: PlanView[ModelLayout]) -> Iterable[Problem]:
        for setting, value, least in (("group", self.group, 1), ("block", self.block, 0)):
            if value < least:
                yield Problem(f"rs.{setting}", f"{value} is less than {least}", f"use {128 if least else 0}")
        wrong = [n for n in view.layout.quantized if n.scheme is not None and not self._smoothable(n.scheme)]
        if view.layout.quantized and len(wrong) == len(view.layout.quantized):
            reason = f"smooths symmetric integer inputs per token, and {wrong[0].scheme} has none"
            yield Problem("rs", reason, "use a scheme such as w4a4 or w4a8")

    @staticmethod
    def _smoothable(scheme: QuantScheme) -> bool:
        inputs = scheme.inputs
        return inputs is not None and inputs.kind == "int" and inputs.granularity == "token" and inputs.symmetric

    def alternatives(self, scheme: QuantScheme, shape: tuple[int, int]) -> Sequence[QuantScheme]:
        """The smoothed scheme, where the linear's inputs can be smoothed."""
        return (self._smoothed(scheme),) if self._smoothable(scheme) else ()

    def _smoothed(self, scheme: QuantScheme) -> QuantScheme:
        assert scheme.inputs is not None
        smooth = RuntimeSmooth(self.group, self.reorder, self.block or None)
        return replace(scheme, inputs=replace(scheme.inputs, smooth=smooth))

    def apply(self, segment: Segment, context: Context) -> None:
        plain = () if self.attention else segment.spec.inputs[0].linears
        for linear, scheme in segment.schemes.items():
            if linear not in plain and self._smoothable(scheme):
                segment.schemes[linear] = self._smoothed(scheme)
