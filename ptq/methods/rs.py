"""Runtime Smooth (Yi et al. 2024, arXiv 2409.20361): inputs are smoothed by channel maxima that they have at run time.

Weights do not change, so the pass only says which linears smooth and how; the mathematics is in `ptq.numerics.smooth`.

Two things differ from the publication, because they were measured to be better (docs/activations.md). Maxima are those
of a block of tokens: over a whole sequence one massive token sets the scales of all others, and later tokens change
earlier ones. And the group follows the width: 128 channels are 3 % of the 4096 that they were chosen for, and 22 % of
576.
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

GROUPS = (16, 128)
"""Smallest and largest group by width: what a tile of integer products needs, and the published one."""
SHARE = 32
"""Groups of 1/32 of the width, as 128 of 4096."""


def group_of(width: int) -> int:
    """Channels per group for inputs of this width: the largest power of two up to width / `SHARE`, within `GROUPS`."""
    smallest, largest = GROUPS
    return max(smallest, min(largest, 2 ** ((width // SHARE).bit_length() - 1) if width >= SHARE else 1))


@dataclass(frozen=True)
class Rs(Pass):
    """Give linears with quantized inputs a scheme that smooths them.

    Attributes:
        group: channels that share a scale after sorting; 0 lets the width decide (`group_of`), 128 is the published
            one, 1 the simulated upper bound (per channel).
        reorder: sort channels by their maxima.
        block: tokens over which maxima are taken, so that no token depends on a later block; 0 takes the whole
            sequence, as published.
        attention: also smooth the linears that make queries, keys and values. The authors' release leaves them plain.
        transformed: also smooth inputs that a transform at run time turns first (`rotate` in front of down). Without
            them, and without `rotate`'s ``residual`` and ``values``, what attention and MLP read is smoothed and what
            down reads is rotated.
    """

    group: int = 0
    reorder: bool = True
    block: int = 64
    attention: bool = True
    transformed: bool = True

    name: ClassVar[str] = "rs"
    summary: ClassVar[str] = "divides inputs by channel maxima that they have at run time"
    default_scheme: ClassVar[str | None] = "w4a4"
    phases: ClassVar[tuple[Phase, ...]] = (Phase.CHOOSE,)

    def check(self, view: PlanView[ModelLayout]) -> Iterable[Problem]:
        for setting, value, usual in (
            ("group", self.group, "0, which lets the width decide"),
            ("block", self.block, "64"),
        ):
            if value < 0:
                yield Problem(f"rs.{setting}", f"{value} is negative", f"use {usual}")
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
        return (self._smoothed(scheme, shape[1]),) if self._smoothable(scheme) else ()

    def _smoothed(self, scheme: QuantScheme, width: int) -> QuantScheme:
        assert scheme.inputs is not None
        smooth = RuntimeSmooth(self.group or group_of(width), self.reorder, self.block or None)
        return replace(scheme, inputs=replace(scheme.inputs, smooth=smooth))

    def apply(self, segment: Segment, context: Context) -> None:
        plain = set() if self.attention else set(segment.spec.inputs[0].linears)
        if not self.transformed:
            plain |= {linear for linear, parts in segment.parts.items() if "hadamard" in parts}
        for linear, scheme in segment.schemes.items():
            if linear not in plain and self._smoothable(scheme):
                segment.schemes[linear] = self._smoothed(scheme, segment.weight(linear).shape[1])
