"""GPTAQ (Li et al. 2025, arXiv 2504.02692): GPTQ that aims at the float model's outputs on the float model's inputs.

GPTQ keeps a linear's output on the inputs that the rounded blocks before it produce, errors and all. GPTAQ reads both
streams and lets the columns to come take over what the inputs of a column have lost as well. The term that does so is
`ptq.numerics.gptq.asymmetry`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from calibration.errors import Problem
from calibration.walk.context import Context
from calibration.walk.passes import PlanView
from calibration.walk.statistics import CrossGram, Gram, Statistic
from ptq.linears import ModelLayout
from ptq.methods.gptq import Gptq


@dataclass(frozen=True)
class Gptaq(Gptq):
    """GPTQ with asymmetric calibration; settings of `Gptq`, and one more.

    Attributes:
        alpha: weight of the asymmetric term; 0 is GPTQ. 0.25 as in the published code: what a few thousand tokens say
            of the difference of two inputs is noisy.
    """

    alpha: float = 0.25

    name: ClassVar[str] = "gptaq"
    title: ClassVar[str | None] = "GPTAQ"
    summary: ClassVar[str] = "rounds column by column towards the float model's outputs on the float model's inputs"
    expected_errors: ClassVar[Literal["nearest", "feedback"] | None] = None
    statistics: ClassVar[tuple[type[Statistic], ...]] = (Gram, CrossGram)

    def check(self, view: PlanView[ModelLayout]) -> Iterable[Problem]:
        for problem in super().check(view):
            yield Problem(problem.subject.replace("gptq", self.name), problem.reason, problem.fix)
        if not 0 <= self.alpha <= 1:
            yield Problem("gptaq.alpha", f"{self.alpha} is outside [0, 1]", "use 0.25")

    def forwards(self) -> int:
        return 2 * super().forwards()  # a refreshed stage runs both blocks

    def _cross(self, context: Context, linear: str) -> torch.Tensor | None:
        return self.alpha * context.statistic(linear, CrossGram).matrix
