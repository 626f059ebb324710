"""HQQ (Badri & Shaji 2023): steps and zero points by half-quadratic splitting; the iteration is in `ptq.numerics.hqq`.

It chooses and leaves rounding to the pass behind it: ``hqq`` rounds to nearest, ``hqq+gptq`` with error feedback on the
chosen grids. The published zero points are floats, as in ``w4a16-g64-asym_float``, which ``native`` files hold and the
reference kernel runs. Rounded to integers, as files for vLLM and transformers need them, they hardly ever move; there,
and on symmetric grids, what is left is to refit steps (``steps = true``), which the paper does not do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from calibration.errors import Problem
from calibration.walk.context import Context
from calibration.walk.cost import BlockShape, Work
from calibration.walk.passes import Pass, Phase, PlanView
from calibration.walk.segment import Segment
from ptq.formats.checks import matching, refuse
from ptq.linears import ModelLayout
from ptq.numerics.grids import grid_of
from ptq.numerics.hqq import HalfQuadratic, half_quadratic


@dataclass(frozen=True)
class Hqq(Pass):
    """Grids of least p-norm error of the weights, from those of their ranges or those that an earlier pass chose.

    Attributes:
        norm, beta, growth, iterations, steps: see `ptq.numerics.hqq.HalfQuadratic`.
    """

    norm: float = HalfQuadratic.norm
    beta: float = HalfQuadratic.beta
    growth: float = HalfQuadratic.growth
    iterations: int = HalfQuadratic.iterations
    steps: bool = HalfQuadratic.steps

    name: ClassVar[str] = "hqq"
    title: ClassVar[str | None] = "HQQ"
    summary: ClassVar[str] = "chooses steps and zero points that large weights spoil less"
    default_scheme: ClassVar[str | None] = "w4a16-g64-asym_float"
    phases: ClassVar[tuple[Phase, ...]] = (Phase.CHOOSE,)

    def check(self, view: PlanView[ModelLayout]) -> Iterable[Problem]:
        if not 0 < self.norm <= 1:
            yield Problem("hqq.norm", f"{self.norm} is outside (0, 1]", "use 0.7")
        if self.beta <= 0:
            yield Problem("hqq.beta", f"{self.beta} is not positive", "use 10")
        if self.growth < 1:
            yield Problem("hqq.growth", f"{self.growth} is below 1", "use 1.01")
        if self.iterations < 0:
            yield Problem("hqq.iterations", f"{self.iterations} is negative", "use 20")
        others = matching(view.layout, lambda linear: linear.scheme.weights.quantizer in ("float", "binary"))  # type: ignore[union-attr]
        yield from refuse(
            others, "hqq chooses grids of integer codes", "use --scheme w4a16-g64-asym_float, or fp4 for floats"
        )
        whole = matching(view.layout, lambda linear: linear.scheme.weights.grouping.kind == "tensor")  # type: ignore[union-attr]
        yield from refuse(
            whole, "hqq chooses grids of groups, not of whole tensors", "use --scheme w4a16-g64-asym_float"
        )
        if not self.steps:
            fixed = matching(view.layout, lambda linear: not linear.scheme.weights.float_zeros)  # type: ignore[union-attr]
            reason = "symmetric grids have no zero point and integer ones do not move, so that hqq would change nothing"
            yield from refuse(fixed, reason, "use -asym_float in the scheme, or steps = true for hqq in a recipe")

    def cost(self, block: BlockShape) -> list[Work]:
        """Per iteration a rounding of every weight, a shrinking by powers and the sums that refit a grid."""
        weights = float(sum(rows * n for rows, n in block.linears))
        return [Work(values=60.0 * weights, calls=40.0 * len(block.linears)) * float(self.iterations)]

    def apply(self, segment: Segment, context: Context) -> None:
        settings = HalfQuadratic(self.norm, self.beta, self.growth, self.iterations, self.steps)
        for linear, scheme in segment.schemes.items():
            w = segment.weight(linear)
            start = segment.grids.get(linear) or grid_of(w, scheme.weights)
            segment.grids[linear] = half_quadratic(w, scheme.weights, start, settings)
            context.show(linear)
