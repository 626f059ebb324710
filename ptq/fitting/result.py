"""`Fitted`: what a fit chose, beside the best uniform settings; and the steps from a model to it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from calibration.distributed import Processes
from calibration.model.checkpoint import write_atomically
from calibration.progress import Progress
from calibration.shown import Shown
from ptq.fitting.budget import Budget
from ptq.fitting.job import Choice, Fit, prepare_fit
from ptq.fitting.outlook import check_recipe_file
from ptq.fitting.sensitivity import Check, Sensitivities
from ptq.planning.job import Options

QUARTERS = range(8, 23)
"""Bits per weight of the frontier that is shown, in quarters of a bit."""


@dataclass(frozen=True)
class FrontierPoint:
    """The best choice under one number of bits per weight, and the best scheme for all linears (None: none fits)."""

    bpw: float
    choice: Choice
    uniform: Choice | None


@dataclass(frozen=True, repr=False)
class Fitted(Shown):
    """A scheme for every linear.

    Attributes:
        model: its name.
        choice: schemes, what they cost, and what they are expected to lose.
        frontier: what other budgets would give.
        recipe: TOML for ``quantize(recipe=...)``.
        checks: what a few linears were expected to cost alone, and what they cost.
    """

    model: str
    budget: Budget
    choice: Choice
    frontier: tuple[FrontierPoint, ...]
    recipe: str
    checks: tuple[Check, ...] = ()

    @property
    def checked(self) -> str:
        """Expected over measured divergence of the linears that were checked; empty where none could be."""
        ratios = sorted(c.expected / c.measured for c in self.checks if c.measured > 0)
        if not ratios:
            return ""
        return (
            f"{len(ratios)} linears rounded alone: expected over measured KL {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )

    @property
    def counts(self) -> Mapping[str, int]:
        """Scheme -> number of linears that took it, the commonest first."""
        return dict(Counter(map(str, self.choice.schemes.values())).most_common())

    @property
    def note(self) -> str:
        return f"{self.model} under {self.budget}: {_summary(self.choice)}"

    def facts(self) -> Mapping[str, object]:
        return {
            "model": self.model,
            "budget": self.budget,
            "bits per weight": f"{self.choice.bits_per_weight:.4f}",
            "file size at most": f"{self.choice.file_bytes / 1e6:.2f} MB",
            "expected KL": f"{self.choice.divergence:.4f} nats",
            "expected perplexity": f"+{100 * self.choice.ppl_increase:.2f}%",
            "checked": self.checked,
            "chosen": ", ".join(f"{count} x {scheme}" for scheme, count in self.counts.items()),
        }


def fit_model(
    model: str | Path,
    budget: Budget,
    method: str,
    format: str | None,
    schemes: Sequence[str],
    options: Options,
    out: Path | None,
    overwrite: bool,
    progress: Progress,
    processes: Processes | None = None,
) -> Fitted:
    """Measure every linear, choose under the budget, and write the recipe into the file ``out``.

    Args:
        processes: that share the work; the first one writes, and all get the result.

    Raises:
        ToolkitError, PlanError: see `prepare_fit`, `Fit.check` and `Fit.solve`; ``out`` exists, or has no folder;
            processes that differ.
    """
    processes = processes or Processes()
    if processes.first:
        check_recipe_file(out, overwrite)
    fit = prepare_fit(model, method=method, format=format, schemes=schemes, options=options)
    fit.check(budget)
    fit.job.tell(progress)
    tokens = fit.job.windows(progress)
    asked = {"budget": budget, "method": method, "format": fit.format.name, "schemes": list(schemes)}
    fit.refuse_differences(processes, tokens, asked)
    sensitivities = fit.sweep(fit.planned(), tokens, progress, processes)
    choice = fit.solve(sensitivities, budget)
    frontier = _frontier(fit, sensitivities, processes)
    processes.mind_first_only()
    note = f"{fit.job.name} under {budget}: {_summary(choice)}"
    found = Fitted(fit.job.name, budget, choice, frontier, fit.recipe(choice, note), sensitivities.checks)
    if processes.first and out is not None:
        write_atomically(out, found.recipe.encode("utf-8"))
    return processes.agree_at_the_end(found)


def _summary(choice: Choice) -> str:
    return (
        f"{choice.bits_per_weight:.4f} bits per weight, {choice.file_bytes / 1e6:.2f} MB at most, "
        f"expected KL {choice.divergence:.4f}, perplexity +{100 * choice.ppl_increase:.2f}%"
    )


def _frontier(fit: Fit, sensitivities: Sensitivities, processes: Processes) -> tuple[FrontierPoint, ...]:
    """Each point by one of the processes."""
    uniform, lowest = fit.uniform(sensitivities), fit.sizes(fit.smallest())[0]
    shown = [quarter / 4 for quarter in QUARTERS if quarter / 4 >= lowest]

    def point(i: int) -> FrontierPoint:
        within = [u for u in uniform if u.bits_per_weight <= shown[i]]
        best = min(within, key=lambda u: u.divergence, default=None)
        return FrontierPoint(shown[i], fit.solve(sensitivities, Budget(bpw=shown[i])), best)

    return tuple(processes.spread([1.0] * len(shown), point))
