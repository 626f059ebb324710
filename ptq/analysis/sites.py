"""Which tensors of a block are looked at, read from the architecture table, and their records."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from calibration.architectures import ArchitectureSpec, BlockSpec, SharedInput
from calibration.model.watching import Watch
from calibration.walk.segment import Segment
from ptq.analysis.activations import (
    EMERGENT_SHARE,
    SIGMAS,
    Extreme,
    OutlierCounts,
    SiteStatistics,
    outlier_channels,
    standout_channels,
)
from ptq.analysis.record import Massive, OutlierChannel, Peak, SiteRecord, SixSigma
from ptq.analysis.rounding import rounding_costs

TOP = 8
"""Channels, positions and tokens that a record names one by one."""
LISTED_CHANNELS = 64
PROFILE = 128

ROLES = (
    "attention input",
    "o input",
    "mlp input",
    "down input",
    "attention output",
    "mlp output",
    "block output",
)

Text = Callable[[int], str]


@dataclass(frozen=True)
class Site:
    """One tensor, or the tensors of all experts of a block.

    Attributes:
        role: one of `ROLES`.
        paths: submodules below the block whose input (or ``output``) it is.
        linears: block-relative checkpoint names that read it (or the one that writes it).
        balanced: kind of the balance whose consumers read it, None where a scale cannot be moved exactly.
    """

    role: str
    paths: tuple[str, ...]
    linears: tuple[str, ...]
    output: bool
    balanced: str | None

    @property
    def experts(self) -> bool:
        return len(self.paths) > 1


def sites_of(architecture: ArchitectureSpec, index: int) -> list[Site]:
    """Inputs of linears in the order of execution, then what the block adds to the residual stream, then the stream."""
    block = architecture.block(index)
    name = architecture.module_name
    grouped: dict[str, list[SharedInput]] = {}
    for shared in block.inputs:
        grouped.setdefault(_role(shared, block), []).append(shared)
    sites = []
    for role, members in grouped.items():
        paths = tuple(name(shared.linears[0]) for shared in members)
        sites.append(Site(role, paths, members[0].linears, False, _balanced(block, members[0].linears)))
    for inner, role in (("o input", "attention output"), ("down input", "mlp output")):
        if len(grouped.get(inner, ())) == 1:  # experts' outputs are weighted and summed elsewhere
            linear = grouped[inner][0].linears[0]
            sites.append(Site(role, (name(linear),), (linear,), True, None))
    return [*sites, Site("block output", ("",), (), True, None)]


def _role(shared: SharedInput, block: BlockSpec) -> str:
    linears = set(shared.linears)
    if linears & {network.down for network in block.feed_forward}:
        return "down input"
    if linears & set(block.scores):
        return "attention input"
    return "mlp input" if linears & {network.up for network in block.feed_forward} else "o input"


def _balanced(block: BlockSpec, linears: tuple[str, ...]) -> str | None:
    kinds = (b.kind for b in block.balance if set(linears) <= set(b.consumers))
    return next(kinds, None)


class SiteObserver:
    """The statistics of all sites of a block, and the watches that fill them.

    Attributes:
        ids: int64 ``[batch, tokens]`` of the batch that runs; set by the caller.
    """

    def __init__(self, segment: Segment, sequences: int) -> None:
        self.sites = sites_of(segment.architecture, segment.index)
        self.ids: torch.Tensor | None = None
        self.statistics: dict[Site, SiteStatistics] = {}
        self._sequences = sequences
        self._segment = segment

    def watches(self) -> list[Watch]:
        return [Watch(path, self._look(site), site.output) for site in self.sites for path in site.paths]

    def _look(self, site: Site) -> Callable[[torch.Tensor, torch.Tensor], None]:
        def look(x: torch.Tensor, positions: torch.Tensor) -> None:
            if site not in self.statistics:
                residual = site.role == "block output"
                made = SiteStatistics(x.shape[-1], self._sequences, residual, site.experts, x.device)
                self.statistics[site] = made
            self.statistics[site].update(x, positions, None if site.experts else self.ids)

        return look

    def records(self, text: Text) -> list[SiteRecord]:
        """One record per site that saw tokens. ``text``: token id to its text."""
        found = []
        for site in self.sites:
            statistics = self.statistics.get(site)
            if statistics is None:
                continue
            reads = () if site.output or site.experts else site.linears
            weights = [self._segment.weight(linear).float() for linear in reads]
            found.append(
                site_record(self._segment.index, site, statistics, torch.cat(weights) if weights else None, text)
            )
        return found


def site_record(block: int, site: Site, s: SiteStatistics, weight: torch.Tensor | None, text: Text) -> SiteRecord:
    """Numbers of one site. ``weight``: ``[out, width]`` of the linears that read it, for their output error."""
    channel_max, tokens = s.abs_max(), torch.cat(s.token_max)
    pooled = s.later.pooled()
    sqnr, errors = rounding_costs(
        torch.cat(s.sample), abs(s.largest.value), float(channel_max.max()), channel_max, weight
    )
    shape = s.later.kurtosis()
    emergent = s.large >= EMERGENT_SHARE * max(s.later.count, 1)
    names = tuple(re.sub(r"\.\d+\.", ".*.", n) for n in site.linears) if site.experts else site.linears
    whole = not s.parts and s.whole.norms.sequences > 0
    rest = not s.parts and s.rest.norms.sequences > 0
    return SiteRecord(
        block=block,
        role=site.role,
        linears=names,
        balanced=site.balanced,
        width=len(channel_max),
        tokens=s.tokens,
        max_abs=short(abs(s.largest.value)),
        largest=_peak(s.largest, text),
        inf_norm=short(s.whole.norms.inf_norm) if whole else None,
        inf_norm_later=short(s.rest.norms.inf_norm) if rest else None,
        kurtosis_sequence=short(s.whole.norms.kurtosis) if whole else None,
        kurtosis_sequence_later=short(s.rest.norms.kurtosis) if rest else None,
        kurtosis_tensor=short(float(pooled.kurtosis())),
        kurtosis_token=short(s.token_kurtosis / max(s.later.count, 1)),
        kurtosis_channel=short(float(shape.median())),
        six_sigma=_six_sigma(s.whole.six_sigma, text) if whole else None,
        six_sigma_later=_six_sigma(s.rest.six_sigma, text) if rest else None,
        channel_disparity=disparity(channel_max),
        token_disparity=disparity(tokens),
        percentile_ratio=_ratio(s.histogram.threshold(0.9999), s.histogram.threshold(0.5)),
        outlier_channels=_channels(s),
        standout=tuple(standout_channels(s.abs_mean(), channel_max).tolist()),
        emergent=tuple(emergent.nonzero().flatten().tolist()),
        massive=_massive(s, text) if s.residual else None,
        sqnr=sqnr,
        output_error=errors,
        octaves=s.histogram.octaves(),
        six_sigma_at=short(SIGMAS * float(pooled.deviation())),
        profile=tuple(short(float(run.max())) for run in channel_max.tensor_split(min(PROFILE, len(channel_max)))),
    )


def short(value: float) -> float:
    """Six significant digits: what is in a record is what its readers see."""
    return float(f"{value:.6g}")


def disparity(largest: torch.Tensor) -> float:
    """Largest over median; 0 where the median is 0."""
    return _ratio(float(largest.max()), float(largest.median()))


def _ratio(value: float, base: float) -> float:
    return short(value / base) if base > 0 else 0.0


def _channels(s: SiteStatistics) -> tuple[OutlierChannel, ...]:
    mean, largest = s.abs_mean(), s.abs_max()
    found = outlier_channels(mean)
    ordered = found[mean[found].argsort(descending=True)][:LISTED_CHANNELS].tolist()
    whole = max(s.rest.norms.sequences, 1)
    return tuple(
        OutlierChannel(
            channel=c,
            ratio=short(float(mean[c] / mean.mean())),
            max_abs=short(float(largest[c])),
            persistence=short(int(s.flagged[c]) / whole),
        )
        for c in ordered
    )


def _six_sigma(counts: OutlierCounts, text: Text) -> SixSigma:
    return SixSigma(
        count=counts.count,
        share=short(counts.count / max(counts.values, 1)),
        channels_hit=int((counts.channels > 0).sum()),
        channels=_most(counts.channels),
        positions=tuple(counts.positions.most_common(TOP)),
        tokens=tuple((text(token), n) for token, n in counts.tokens.most_common(TOP)),
    )


def _most(counts: torch.Tensor) -> tuple[tuple[int, int], ...]:
    top = counts.argsort(descending=True, stable=True)[:TOP].tolist()
    return tuple((c, int(counts[c])) for c in top if counts[c])


def _massive(s: SiteStatistics, text: Text) -> Massive:
    channels = _most(s.massive.channels)
    largest = tuple(_peak(s.extremes[c], text) for c, _ in channels)
    return Massive(s.massive.count, channels, tuple(s.massive.positions.most_common(TOP)), largest)


def _peak(extreme: Extreme, text: Text) -> Peak:
    token = None if extreme.token is None else text(extreme.token)
    return Peak(short(extreme.value), extreme.channel, extreme.position, token)
