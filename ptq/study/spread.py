"""What a calibration study says: means and deviations of its runs, how far channels agree between data sets, a verdict.

After Paglieri et al. 2024, "Outliers and Calibration Sets have Diminishing Effect on Quantization of Modern LLMs"
(arXiv 2405.20835).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from ptq.study.ranks import spearman, top_share_jaccard

FACTORS = ("dataset", "samples", "seq_len")
SMALL_SPREAD = 0.01  # rule of thumb: below both, the choice of calibration text does not matter
HIGH_OVERLAP = 0.8


@dataclass(frozen=True)
class CalibrationRun:
    """One quantization of the study and what it scored.

    Attributes:
        dataset, samples, seq_len, seed: what was asked for.
        tokens, fingerprint: of the calibration windows; data sets that ignore seeds repeat them.
        perplexity, kl_mean, delta_nll: against the float model on the study's text, see `calibration.record`.
    """

    dataset: str
    samples: int
    seq_len: int
    seed: int
    tokens: int
    fingerprint: str
    perplexity: float
    kl_mean: float
    delta_nll: float


@dataclass(frozen=True)
class Overlap:
    """How far two calibration sets agree on which channels are large: means over the inputs of all linears of
    Spearman's rank correlation of the largest |x| per channel, and of the Jaccard index of the top 1 % of channels."""

    first: str
    second: str
    spearman: float
    jaccard: float


@dataclass(frozen=True)
class Level:
    """Runs that have something in common. ``deviation`` is the standard deviation (n - 1); None for a single run."""

    values: tuple[str, ...]
    runs: int
    mean: float
    deviation: float | None
    kl_mean: float


def levels(runs: Sequence[CalibrationRun], factors: Sequence[str]) -> tuple[Level, ...]:
    """Runs grouped by the values of some of `FACTORS`, in the order in which they first appear. Seeds with the same
    calibration windows count once."""
    groups: dict[tuple[str, ...], dict[tuple[str, int, int, str], CalibrationRun]] = {}
    for run in runs:
        values = tuple(str(getattr(run, factor)) for factor in factors)
        groups.setdefault(values, {})[run.dataset, run.samples, run.seq_len, run.fingerprint] = run
    found = []
    for values, group in groups.items():
        scores = [run.perplexity for run in group.values()]
        deviation = statistics.stdev(scores) if len(scores) > 1 and all(map(math.isfinite, scores)) else None
        kl = statistics.fmean(run.kl_mean for run in group.values())
        found.append(Level(values, len(scores), statistics.fmean(scores), deviation, kl))
    return tuple(found)


def range_of(found: Iterable[Level]) -> float:
    """(largest mean - smallest mean) / smallest mean."""
    means = [level.mean for level in found]
    return (max(means) - min(means)) / min(means)


def seed_deviation(runs: Sequence[CalibrationRun]) -> float | None:
    """Deviation of perplexity between seeds alone: root mean of the variances within settings; None with one seed."""
    found = [level.deviation for level in levels(runs, FACTORS) if level.deviation is not None]
    return math.sqrt(statistics.fmean(d * d for d in found)) if found else None


def largest_setting(runs: Sequence[CalibrationRun]) -> tuple[CalibrationRun, ...]:
    """The runs with the most samples of the longest windows: where data sets are compared."""
    samples, seq_len = max(run.samples for run in runs), max(run.seq_len for run in runs)
    return tuple(run for run in runs if (run.samples, run.seq_len) == (samples, seq_len))


def overlaps(peaks: dict[str, dict[str, torch.Tensor]]) -> tuple[Overlap, ...]:
    """Agreement of every pair of data sets.

    Args:
        peaks: data set -> input of a linear -> largest |x| per channel, ``[in]``.
    """
    found = []
    for first, second in combinations(peaks, 2):
        pairs = [(peaks[first][name], peaks[second][name]) for name in peaks[first]]
        ranked = [spearman(a.tolist(), b.tolist()) for a, b in pairs]
        known = [value for value in ranked if value is not None]
        jaccard = statistics.fmean(top_share_jaccard(a, b) for a, b in pairs)
        found.append(Overlap(first, second, statistics.fmean(known) if known else 0.0, jaccard))
    return tuple(found)


def verdict(runs: Sequence[CalibrationRun], agreement: Sequence[Overlap]) -> str:
    """Whether the choice of calibration text matters for this model, method and scheme, with the numbers behind it.

    It does not where perplexity spreads by less than `SMALL_SPREAD` and the largest channels overlap by more than
    `HIGH_OVERLAP`. A spread within two deviations between seeds says nothing of data sets.
    """
    by_set = levels(largest_setting(runs), ("dataset",))
    if len(by_set) < 2:
        return "One data set only: whether its choice matters was not measured."
    spread, overlap, deviation = range_of(by_set), min(o.jaccard for o in agreement), seed_deviation(runs)
    best, worst = min(by_set, key=lambda b: b.mean), max(by_set, key=lambda b: b.mean)
    if spread < SMALL_SPREAD and overlap > HIGH_OVERLAP:
        answer = "The choice of calibration text does not matter here"
    elif deviation is not None and spread * best.mean <= 2 * deviation:
        answer = "Data sets differ no more than seeds do, more samples come before another text"
    else:
        answer = "The choice of calibration text matters here"
    noise = "" if deviation is None else f" (deviation between seeds {deviation / best.mean:.2%})"
    return (
        f"{answer}: perplexity spreads by {spread:.2%} over data sets{noise}, from {best.values[0]} to "
        f"{worst.values[0]}, and the least overlap of their largest channels is {overlap:.2f} "
        f"(limits {SMALL_SPREAD:.0%} and {HIGH_OVERLAP})."
    )
