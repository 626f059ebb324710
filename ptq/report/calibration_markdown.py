"""A calibration study as Markdown: the verdict, what each factor does, every setting, how far channels agree."""

from __future__ import annotations

from collections.abc import Sequence

from ptq.report import figures, wording
from ptq.report.figures import plain, table
from ptq.study.calibration import CalibrationStudy
from ptq.study.spread import FACTORS, Level, levels, range_of, verdict

TITLES = {"dataset": "Data set", "samples": "Samples", "seq_len": "Tokens per sample"}


def render(study: CalibrationStudy) -> str:
    """Markdown; perplexities are mean ± standard deviation over runs (n - 1)."""
    parts = [
        f"# Calibration study of {plain(study.model)}: {plain(study.method)}, {plain(study.scheme)}",
        verdict(study.runs, study.overlaps),
        f"Float perplexity {figures.perplexity(study.float_perplexity)}. "
        + plain(wording.protocol_sentence(study.protocol)),
    ]
    for factor in FACTORS:
        found = levels(study.runs, (factor,))
        if len(found) > 1:
            parts.append(f"## {TITLES[factor]}: spread {figures.percent(range_of(found))}")
            parts.append(_levels((factor,), found))
    parts += ["## Every setting, over seeds", _levels(FACTORS, levels(study.runs, FACTORS))]
    if study.overlaps:
        header = ["Data set", "Data set", "Rank correlation", "Overlap of the top 1 %"]
        rows = [[plain(o.first), plain(o.second), f"{o.spearman:.3f}", f"{o.jaccard:.3f}"] for o in study.overlaps]
        parts += [
            "## Largest activation per channel",
            "Of the float model on the largest calibration set of each: Spearman's rank correlation and Jaccard index, "
            "means over the inputs of all linears.",
            table(header, rows, right=(2, 3)),
        ]
    return "\n\n".join(parts) + "\n"


def _levels(factors: Sequence[str], found: Sequence[Level]) -> str:
    header = [*(TITLES[f] for f in factors), "Runs", "Perplexity", "KL mean (nats)"]
    rows = [[*map(plain, level.values), str(level.runs), _score(level), figures.nats(level.kl_mean)] for level in found]
    return table(header, rows, right=range(len(factors), len(header)))


def _score(level: Level) -> str:
    if level.deviation is None:
        return figures.perplexity(level.mean)
    return f"{figures.perplexity(level.mean)} ± {figures.perplexity(level.deviation)}"
