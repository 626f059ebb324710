"""What a plan checks of grids with super-blocks (K-quants): which passes know them."""

from __future__ import annotations

from collections.abc import Iterable

from calibration.errors import Problem
from calibration.walk.passes import Phase, PlanView
from ptq.formats.checks import matching, summary
from ptq.linears import ModelLayout

KNOWING = ("awq", "rtn", "gptq", "gptaq", "ranges", "rs")
"""Passes that choose or round and take a K-quant's grid as it is; those before and behind do not look at grids."""


def super_problems(view: PlanView[ModelLayout]) -> Iterable[Problem]:
    """Every pass that would choose or round on a grid it does not know."""
    linears = matching(view.layout, lambda linear: linear.scheme.weights.superblocks)  # type: ignore[union-attr]
    if not linears:
        return
    for step in view.passes:
        if {Phase.CHOOSE, Phase.ROUND} & set(step.phases) and step.name not in KNOWING:
            reason = f"does not know K-quants, which {summary(linear.name for linear in linears)} shall have"
            yield Problem(step.name, reason, "use rtn, gptq, gptaq or awq+gptq, or a scheme such as q4_0")
