"""AdaQuant (Hubara et al. 2020, arXiv 2006.10518): rounding, steps and zero points learned per layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from calibration.errors import Problem
from calibration.walk.context import Context
from calibration.walk.cost import BlockShape, Work, rounding, total
from calibration.walk.passes import Pass, Phase, PlanView, Stream
from calibration.walk.segment import Segment
from calibration.walk.statistics import Gram, Statistic
from ptq.formats.checks import matching, refuse
from ptq.linears import ModelLayout
from ptq.methods.rounding import put
from ptq.methods.rtn import round_to_nearest
from ptq.numerics.adaquant import adaquant
from ptq.quantized import QuantizedTensor


@dataclass(frozen=True)
class AdaQuant(Pass):
    """Gradient steps from rounding to nearest on the output error of each linear; the best iterate is kept.

    Attributes:
        iterations: Adam steps per linear.
        weight_rate: of the weights, in quantization steps.
        step_rate: of the logarithm of the steps, and of zero points. Most of the gain is in the steps.
    """

    iterations: int = 100
    weight_rate: float = 0.002
    step_rate: float = 0.03

    name: ClassVar[str] = "adaquant"
    summary: ClassVar[str] = "learns rounding, steps and zero points of every layer by gradient"
    phases: ClassVar[tuple[Phase, ...]] = (Phase.ROUND,)
    stream: ClassVar[Stream] = "quantized"
    statistics: ClassVar[tuple[type[Statistic], ...]] = (Gram,)

    def check(self, view: PlanView[ModelLayout]) -> Iterable[Problem]:
        if self.iterations < 0:
            yield Problem("adaquant.iterations", f"{self.iterations} is negative", "use 100")
        for name in ("weight_rate", "step_rate"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                yield Problem(f"adaquant.{name}", f"{value} is outside [0, 1)", f"use {getattr(AdaQuant, name)}")
        floats = matching(view.layout, lambda linear: linear.scheme.weights.float_format is not None)  # type: ignore[union-attr]
        yield from refuse(floats, "adaquant learns integer grids only", "use gptq, or an integer scheme")
        zeros = matching(view.layout, lambda linear: linear.scheme.weights.float_zeros)  # type: ignore[union-attr]
        yield from refuse(zeros, "adaquant learns integer zero points", "use -asym instead of -asym_float, or gptq")

    def cost(self, block: BlockShape) -> list[Work]:
        """Per iteration and linear a product with the Gram matrix, a backward pass and a step of Adam."""
        steps = [
            Work(exact=2.0 * rows * n**2, fresh=30.0 * rows * n, calls=100.0) * float(self.iterations + 1)
            for rows, n in block.linears
        ]
        return [total([*steps, *rounding(block)])]

    def apply(self, segment: Segment, context: Context) -> None:
        for linear, scheme in segment.schemes.items():
            w, grid, gram = segment.weight(linear), segment.grids.get(linear), context.statistic(linear, Gram)
            if gram.tokens == 0:  # an expert without data, which the user allowed
                put(segment, linear, round_to_nearest(w, scheme, grid), None)
                continue
            codes, scale, zero, left = adaquant(
                w, gram.matrix, scheme.weights, self.iterations, self.weight_rate, self.step_rate, grid
            )
            put(segment, linear, QuantizedTensor(codes, scale, zero, scheme), gram.matrix)
            segment.note(linear, **{"adaquant.error_left": left})
            context.advance(linear)
