"""`SiteStatistics`: all that is kept of one activation tensor, folded in sequence by sequence.

Memory per site is a few float64 vectors of its width, a histogram, one number per token and a sample of rows; nothing
grows with the number of texts but one float per token. Definitions: Bondarenko et al. (arXiv 2306.12929) for infinity
norms, kurtosis per sequence and six-sigma outliers; Nrusimha et al. (arXiv 2404.03605) for outlier channels; Sun et
al. (arXiv 2402.17762) for massive activations; Dettmers et al. (arXiv 2208.07339) for emergent features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from calibration.histogram import Histogram
from ptq.analysis.moments import PAPER_EPSILON, Moments, deviation, kurtosis

RATIO = 6.0
"""A channel is an outlier where its mean |x| is more than this many times the mean over channels."""
STANDOUT = 10.0
SIGMAS = 6.0
EMERGENT_SIZE, EMERGENT_SHARE = 6.0, 0.06
MASSIVE_SIZE, MASSIVE_RATIO = 100.0, 1000.0
SAMPLE_ROWS = 512


def outlier_channels(abs_mean: torch.Tensor) -> torch.Tensor:
    """Indices of the channels whose mean |x| ``[channels]`` is above `RATIO` times the mean of all."""
    return (abs_mean > RATIO * abs_mean.mean()).nonzero().flatten()


def standout_channels(abs_mean: torch.Tensor, abs_max: torch.Tensor) -> torch.Tensor:
    """Indices of the channels whose mean |x| and whose largest |x| ``[channels]`` are both above `STANDOUT` times those
    of the median channel: large in many tokens, and large enough to set the range for the others."""
    large = abs_mean > STANDOUT * abs_mean.median()
    return (large & (abs_max > STANDOUT * abs_max.median())).nonzero().flatten()


def massive(x: torch.Tensor) -> torch.Tensor:
    """Which values of one sequence ``[tokens, channels]`` are massive activations, bool of its shape."""
    size = x.abs()
    if float(size.max()) <= MASSIVE_SIZE:  # the median costs a sort
        return torch.zeros_like(x, dtype=torch.bool)
    return (size > MASSIVE_SIZE) & (size > MASSIVE_RATIO * size.median())


@dataclass
class OutlierCounts:
    """Where values of some kind lie, over sequences: counts per channel, position and token id."""

    channels: torch.Tensor
    positions: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    values: int = 0

    def add(self, found: torch.Tensor, first: int, ids: torch.Tensor | None) -> None:
        """``found``: bool ``[tokens, channels]``; its first row is at position ``first``; ``ids`` of all rows."""
        self.values += found.numel()
        self.channels += found.sum(0)
        rows = found.sum(1).cpu()
        for row in rows.nonzero().flatten().tolist():
            self.positions[first + row] += int(rows[row])
            if ids is not None:
                self.tokens[int(ids[row])] += int(rows[row])

    def merge(self, other: OutlierCounts) -> None:
        self.channels += other.channels
        self.positions.update(other.positions)
        self.tokens.update(other.tokens)
        self.values += other.values

    @property
    def count(self) -> int:
        return int(self.channels.sum())


@dataclass
class SequenceNorms:
    """Infinity norm and kurtosis of single sequences, averaged over them."""

    inf_norm_sum: float = 0.0
    kurtosis_sum: float = 0.0
    sequences: int = 0

    def add(self, x: torch.Tensor) -> None:
        """``x [tokens, channels]``, one sequence."""
        self.inf_norm_sum += float(x.abs().max())
        self.kurtosis_sum += kurtosis(x, PAPER_EPSILON)
        self.sequences += 1

    @property
    def inf_norm(self) -> float:
        return self.inf_norm_sum / max(self.sequences, 1)

    @property
    def kurtosis(self) -> float:
        return self.kurtosis_sum / max(self.sequences, 1)


@dataclass
class SequenceAverages:
    """What is known of single sequences: norms, and where their six-sigma outliers lie."""

    six_sigma: OutlierCounts
    norms: SequenceNorms = field(default_factory=SequenceNorms)

    def add(self, x: torch.Tensor, first: int, ids: torch.Tensor | None) -> None:
        """``x [tokens, channels]``, one sequence from position ``first`` on."""
        mean, s = deviation(x)
        self.six_sigma.add((x - mean).abs() > SIGMAS * s, first, ids)
        self.norms.add(x)

    def merge(self, other: SequenceAverages) -> None:
        self.six_sigma.merge(other.six_sigma)
        self.norms.inf_norm_sum += other.norms.inf_norm_sum
        self.norms.kurtosis_sum += other.norms.kurtosis_sum
        self.norms.sequences += other.norms.sequences


@dataclass(frozen=True)
class Extreme:
    """One value, and where it is. ``token`` is an id."""

    value: float
    channel: int
    position: int
    token: int | None


class SiteStatistics:
    """Accumulators of one site.

    Args:
        width: channels.
        sequences: how many will come; decides which rows are sampled.
        residual: whether massive activations are looked for.
        parts: only some rows of each sequence come (experts): numbers of sequences are not made.
    """

    def __init__(self, width: int, sequences: int, residual: bool, parts: bool, device: torch.device) -> None:
        def zeros(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(width, dtype=dtype, device=device)

        self.residual, self.parts = residual, parts
        self.later = Moments.empty(width, device)
        self.abs_sum = zeros(torch.float64)
        self.low, self.high = zeros(torch.float32).fill_(torch.inf), zeros(torch.float32).fill_(-torch.inf)
        self.first_max = zeros(torch.float32)
        self.large = zeros(torch.int64)
        self.flagged = zeros(torch.int64)
        self.histogram = Histogram()
        self.token_max: list[torch.Tensor] = []
        self.token_kurtosis = 0.0
        self.whole = SequenceAverages(OutlierCounts(zeros(torch.int64)))
        self.rest = SequenceAverages(OutlierCounts(zeros(torch.int64)))
        self.massive = OutlierCounts(zeros(torch.int64))
        self.extremes: dict[int, Extreme] = {}
        self.largest = Extreme(0.0, 0, 0, None)
        self.sample: list[torch.Tensor] = []
        self._rows_per_call = max(1, SAMPLE_ROWS // max(sequences, 1))

    @property
    def tokens(self) -> int:
        return sum(len(t) for t in self.token_max)

    def update(self, x: torch.Tensor, positions: torch.Tensor, ids: torch.Tensor | None) -> None:
        """Fold in one batch.

        Args:
            x: ``[batch, tokens, channels]``, its flattened rows, or (an expert's) some of those.
            positions: of the rows in their sequences, broadcastable to ``x.shape[:-1]``.
            ids: int64 ``[batch, tokens]``, None where the rows are not known to be whole sequences.
        """
        where = positions.expand(x.shape[:-1]).reshape(-1)
        rows = x.reshape(-1, x.shape[-1])
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if not len(rows):
            return
        whole = None if self.parts else _sequences(rows, where)
        if whole is None:
            self._rows(rows, where, None)
            return
        for i, sequence in enumerate(whole):
            its = None if ids is None else ids[i].to(rows.device)
            self._rows(sequence, where[: len(sequence)], its)
            self._sequence(sequence, its)

    def _rows(self, x: torch.Tensor, positions: torch.Tensor, ids: torch.Tensor | None) -> None:
        size = x.abs()
        per_token = size.amax(1)
        self.token_max.append(per_token.float().cpu())
        row = int(per_token.argmax())
        if float(per_token[row]) > abs(self.largest.value):
            self.largest = _extreme(x, row, int(size[row].argmax()), positions, ids)
        first = positions == 0
        if bool(first.any()):
            self.first_max = torch.maximum(self.first_max, size[first].amax(0).float())
        x, size = (x[~first], size[~first]) if bool(first.any()) else (x, size)
        if not len(x):
            return
        self.later.update(x)
        self.abs_sum += size.sum(0, dtype=torch.float64)
        self.low, self.high = torch.minimum(self.low, x.amin(0).float()), torch.maximum(self.high, x.amax(0).float())
        self.large += (size >= EMERGENT_SIZE).sum(0)
        self.histogram.update(size)
        self.token_kurtosis += float(Moments.of(x.T).kurtosis().sum())
        kept = sum(len(rows) for rows in self.sample)
        wanted = min(self._rows_per_call, SAMPLE_ROWS - kept, len(x))
        self.sample.append(x[torch.linspace(0, len(x) - 1, wanted).long()].float() if wanted > 0 else x[:0].float())

    def _sequence(self, x: torch.Tensor, ids: torch.Tensor | None) -> None:
        self.whole.add(x, 0, ids)
        if len(x) > 1:
            self.rest.add(x[1:], 1, None if ids is None else ids[1:])
            self.flagged[outlier_channels(x[1:].abs().mean(0))] += 1
        if not self.residual:
            return
        found = massive(x)
        self.massive.add(found, 0, ids)
        positions = torch.arange(len(x))
        for channel in found.any(0).nonzero().flatten().tolist():
            row = int(x[:, channel].abs().argmax())
            candidate = _extreme(x, row, channel, positions, ids)
            known = self.extremes.get(channel)
            if known is None or abs(candidate.value) > abs(known.value):
                self.extremes[channel] = candidate

    def merge(self, other: SiteStatistics) -> None:
        """Fold in the statistics of the sequences that follow."""
        self.later = self.later.merged(other.later)
        for name in ("abs_sum", "large", "flagged", "token_max", "token_kurtosis"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.low, self.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        self.first_max = torch.maximum(self.first_max, other.first_max)
        self.histogram.add(other.histogram)
        for name in ("whole", "rest", "massive"):
            getattr(self, name).merge(getattr(other, name))
        for channel, candidate in other.extremes.items():
            known = self.extremes.get(channel)
            if known is None or abs(candidate.value) > abs(known.value):
                self.extremes[channel] = candidate
        if abs(other.largest.value) > abs(self.largest.value):
            self.largest = other.largest
        self.sample = [torch.cat([*self.sample, *other.sample])[:SAMPLE_ROWS]] if self.sample or other.sample else []

    def abs_mean(self) -> torch.Tensor:
        """Mean |x| per channel over later tokens, float64 ``[channels]``."""
        return self.abs_sum / max(self.later.count, 1)

    def abs_max(self) -> torch.Tensor:
        """Largest |x| per channel over later tokens, float32 ``[channels]``; 0 where there were none."""
        seen = self.low <= self.high
        return torch.where(seen, torch.maximum(self.low.abs(), self.high.abs()), 0.0)


def _extreme(x: torch.Tensor, row: int, channel: int, positions: torch.Tensor, ids: torch.Tensor | None) -> Extreme:
    token = None if ids is None else int(ids[row])
    return Extreme(float(x[row, channel]), channel, int(positions[row]), token)


def _sequences(rows: torch.Tensor, positions: torch.Tensor) -> Sequence[torch.Tensor] | None:
    """The rows as whole sequences, ``[n, tokens, channels]``, if they are that."""
    n = int((positions == 0).sum())
    if n == 0 or len(rows) % n:
        return None
    length = len(rows) // n
    if not bool((positions.view(n, length) == torch.arange(length, device=positions.device)).all()):
        return None
    return rows.view(n, length, -1).unbind(0)
