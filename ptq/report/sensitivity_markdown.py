"""A sensitivity study as Markdown: correlations, which roles suffer, and the linears that suffer most."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Sequence

from ptq.report.figures import DASH, nats, plain, table
from ptq.study.sensitivity import LinearSensitivity, SchemeSensitivity, SensitivityStudy

SHOWN = 10
_EXPERT = re.compile(r"experts\.\d+")


def render(study: SensitivityStudy) -> str:
    """Markdown; divergences in nats per token."""
    calibration = f"{study.calibration['tokens']:,} calibration tokens"
    parts = [
        f"# Sensitivity of {plain(study.model)}",
        "Every linear rounded to nearest alone. Objective: ||(Q(W) - W) X||² per token; KL from the float model as "
        f"expected to second order; both on {study.gradient_tokens:,} of {calibration}. Measured on "
        f"{study.probe_tokens:,} tokens: all linears at once, and a few of them alone. Rank correlation: Spearman's, "
        "of objective and expected KL over linears.",
        _totals(study.schemes),
    ]
    for scheme in study.schemes:
        parts += [f"## {plain(scheme.scheme)}", _roles(scheme), f"The {SHOWN} largest:", _largest(scheme)]
    return "\n\n".join(parts) + "\n"


def sections(schemes: Sequence[SchemeSensitivity]) -> str:
    """The same as sections of the report of an analysis; empty where nothing was measured."""
    parts = ["## Linears rounded alone", _totals(schemes)] if schemes else []
    for scheme in schemes:
        parts += [f"### {plain(scheme.scheme)}", _largest(scheme)]
    return "\n\n".join(parts)


def _totals(schemes: Sequence[SchemeSensitivity]) -> str:
    header = ["Scheme", "Linears", "Sum of expected KL", "All at once, over the sum", "Checked", "Rank correlation"]
    rows = [
        [
            plain(s.scheme),
            str(len(s.linears)),
            nats(sum(x.divergence for x in s.linears)),
            f"{s.additivity:.2f}",
            _checked(s),
            DASH if s.rank_correlation is None else f"{s.rank_correlation:.3f}",
        ]
        for s in schemes
    ]
    return table(header, rows, right=range(1, 6))


def _checked(scheme: SchemeSensitivity) -> str:
    """Expected over measured KL of the linears that were run alone."""
    ratios = [x.divergence / x.measured for x in scheme.linears if x.measured]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else DASH


def _roles(scheme: SchemeSensitivity) -> str:
    groups: dict[str, list[LinearSensitivity]] = defaultdict(list)
    for linear in scheme.linears:
        groups[_EXPERT.sub("experts.*", linear.name.partition(f".{linear.block}.")[2])].append(linear)
    rows = [
        [
            plain(role),
            str(len(found)),
            f"{statistics.fmean(x.objective for x in found):.3g}",
            f"{statistics.fmean(x.divergence for x in found):.3g}",
            plain(max(found, key=lambda x: x.divergence).name),
        ]
        for role, found in groups.items()
    ]
    return table(["Linear", "Blocks", "Mean objective", "Mean expected KL", "Largest"], rows, right=(1, 2, 3))


def _largest(scheme: SchemeSensitivity) -> str:
    by_objective = sorted(scheme.linears, key=lambda x: -x.objective)
    place = {x.name: i + 1 for i, x in enumerate(by_objective)}
    largest = sorted(scheme.linears, key=lambda x: -x.divergence)[:SHOWN]
    rows = [
        [
            plain(x.name),
            f"{x.divergence:.3g}",
            DASH if x.measured is None else f"{x.measured:.3g}",
            f"{x.objective:.3g}",
            str(place[x.name]),
        ]
        for x in largest
    ]
    return table(["Linear", "Expected KL", "Measured", "Objective", "Rank by objective"], rows, right=range(1, 5))
