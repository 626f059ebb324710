"""LLM-FP4 for weights (Liu et al. 2023, arXiv 2310.16836): which float format, and which exponent bias per group.

It chooses, and leaves the rounding to the pass behind it: ``fp4`` alone rounds to nearest, ``fp4+gptq`` with error
feedback on the chosen grids. For MXFP4 and NVFP4 it chooses the scale of every block. The search is in
`ptq.numerics.float_search`; unlike in the paper, formats are chosen on a Gram matrix instead of stored outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from calibration.errors import Problem
from calibration.walk.context import Context
from calibration.walk.cost import BlockShape, Work
from calibration.walk.passes import Pass, Phase, PlanView, Stream
from calibration.walk.segment import Segment
from calibration.walk.statistics import Gram, Statistic
from ptq.float_formats import float_formats
from ptq.formats.checks import matching, refuse
from ptq.linears import ModelLayout
from ptq.methods.rounding import global_scales
from ptq.numerics.float_search import OFFSETS, search_bounds
from ptq.numerics.grids import grid_of
from ptq.numerics.objective import rounding_error
from ptq.scheme import QuantScheme

FORMATS_OF_A_WIDTH = 3  # about as many split four bits into exponent and mantissa


@dataclass(frozen=True)
class Fp4(Pass):
    """Grids of floats chosen by output error.

    Attributes:
        formats: try every ExMy with as many bits as the planned one; otherwise keep it. (Hardware formats are kept.)
    """

    formats: bool = True

    name: ClassVar[str] = "fp4"
    summary: ClassVar[str] = "chooses a float format per linear and a scale per group by the error of the output"
    default_scheme: ClassVar[str | None] = "fp4-e2m1-g128"
    phases: ClassVar[tuple[Phase, ...]] = (Phase.CHOOSE,)
    stream: ClassVar[Stream] = "either"
    statistics: ClassVar[tuple[type[Statistic], ...]] = (Gram,)

    def check(self, view: PlanView[ModelLayout]) -> Iterable[Problem]:
        integers = matching(view.layout, lambda linear: linear.scheme.weights.float_format is None)  # type: ignore[union-attr]
        named = ", ".join(dict.fromkeys(str(linear.scheme) for linear in integers))
        yield from refuse(integers, f"{named}: fp4 chooses among floats", "use --scheme fp4-e2m1-g128, mxfp4 or nvfp4")

    def alternatives(self, scheme: QuantScheme, shape: tuple[int, int]) -> tuple[QuantScheme, ...]:
        """The scheme with every format of as many bits, itself first."""
        w = scheme.weights
        if not self.formats or w.float_format is None or w.scale_format != "bf16":
            return (scheme,)
        others = (number for number in float_formats(w.bits) if number != w.float_format)
        return (
            scheme,
            *(dataclasses.replace(scheme, weights=dataclasses.replace(w, float_format=number)) for number in others),
        )

    def cost(self, block: BlockShape) -> list[Work]:
        """Every scale that is tried of every format, on each weight and the Gram matrix of its group."""
        tried = float(len(OFFSETS) * (FORMATS_OF_A_WIDTH if self.formats else 1))
        return [
            Work(values=50.0 * rows * n, exact=2.0 * rows * n * block.group, calls=30.0) * tried
            for rows, n in block.linears
        ]

    def apply(self, segment: Segment, context: Context) -> None:
        shared = global_scales(segment)
        for linear, scheme in list(segment.schemes.items()):
            if context.statistic(linear, Gram).tokens == 0:
                continue
            w, gram = segment.weight(linear), context.product_gram(linear)
            options = self.alternatives(scheme, (w.shape[0], w.shape[1]))
            bounds = (search_bounds(w, gram, option.weights, shared.get(linear)) for option in options)
            grids = [grid_of(w, o.weights, b, shared.get(linear)) for o, b in zip(options, bounds, strict=True)]
            best = 0
            if len(options) > 1:
                errors = [float(rounding_error(w, gram, o.weights, g)) for o, g in zip(options, grids, strict=True)]
                best = min(range(len(options)), key=errors.__getitem__)
                names = (str(option.weights.float_format) for option in options)
                segment.note(linear, **{f"fp4.{name}": e for name, e in zip(names, errors, strict=True)})
            segment.schemes[linear] = options[best]
            segment.grids[linear] = grids[best]
            context.show(linear)
