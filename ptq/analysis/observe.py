"""One walk over the blocks of a model: everything that is seen with one block in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from calibration.architectures import ArchitectureSpec
from calibration.distributed import Processes
from calibration.errors import ToolkitError
from calibration.model.checkpoint import TensorSource
from calibration.model.skeleton import Skeleton
from calibration.model.watching import watching
from calibration.progress import Progress
from calibration.text.crops import TokenBatches
from calibration.walk.float_blocks import FloatBlocks
from calibration.walk.lanes import merge, sum_of_lanes
from calibration.walk.segment import Segment
from calibration.walk.states import HiddenStates
from ptq.analysis.activations import SiteStatistics
from ptq.analysis.heads import HeadObserver, HeadStatistics
from ptq.analysis.record import HeadRecord, SiteRecord, WeightRecord
from ptq.analysis.sites import Site, SiteObserver
from ptq.analysis.weights import weight_records
from ptq.numerics.softmax import SoftmaxRule
from ptq.runtime.explicit_attention import exchanged_softmax, unsupported

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Subject:
    """The model that is looked at: its tensors as float weights, whatever the checkpoint stores."""

    source: TensorSource
    config: Any
    spec: ArchitectureSpec
    dtype: torch.dtype
    device: torch.device


@dataclass
class Findings:
    """What one walk found. ``ranges``: per site, by full names, what `CHANNELS_FILE` holds. ``no_heads``: why
    attention was not looked at."""

    sites: list[SiteRecord]
    weights: list[WeightRecord]
    heads: list[HeadRecord]
    ranges: dict[str, torch.Tensor]
    no_heads: str | None


@dataclass
class BlockSums:
    """What was seen of one block."""

    sites: dict[Site, SiteStatistics]
    heads: HeadStatistics


@merge.register
def _(total: BlockSums, other: BlockSums) -> None:
    for site, statistics in other.sites.items():
        if site in total.sites:
            total.sites[site].merge(statistics)
        else:
            total.sites[site] = statistics
    total.heads.merge(other.heads)


@torch.no_grad()
def observe(
    subject: Subject,
    tokens: TokenBatches,
    text: Callable[[int], str],
    progress: Progress,
    processes: Processes | None = None,
) -> Findings:
    """Walk over the blocks once.

    Args:
        text: token id to its text.
        processes: that share the windows; the first one gets what was found.
    """
    processes = processes or Processes()
    skeleton = Skeleton(subject.config, subject.spec, subject.dtype, subject.device)
    batch_size = batch_size_of(tokens)
    skeleton.check_complete(subject.source.infos)
    blocks = FloatBlocks(subject.source, skeleton, batch_size=batch_size)
    found = Findings([], [], [], {}, unsupported(skeleton.model))
    heads = HeadObserver(tokens, batch_size, text)
    ids = list(tokens.batches(batch_size))
    watched = exchanged_softmax(skeleton.model, SoftmaxRule(), heads.look) if found.no_heads is None else nullcontext()
    with watched:
        for segment, states in blocks.observe(tokens, progress, processes):
            heads.begin(segment)
            observer = SiteObserver(segment, len(tokens))

            def run(
                lane: range,
                fresh: Mapping[str, BlockSums],
                segment: Segment = segment,
                states: HiddenStates = states,
                observer: SiteObserver = observer,
            ) -> None:
                observer.statistics, heads.statistics = fresh["block"].sites, fresh["block"].heads
                with watching(segment.module, observer.watches()):
                    for i in lane:
                        observer.ids = ids[states.numbers[i]]
                        heads.expect(states.numbers[i], states.batches[i])
                        states.batches[i] = states.output(segment.module, segment.index, i)
                        progress.advance(f"block {segment.index + 1}/{subject.spec.n_blocks}")

            sums = sum_of_lanes(states.lanes, processes, _nothing_seen, run)["block"]
            if processes.first:
                observer.statistics = sums.sites
                _add_records(found, segment, observer, sums.heads, text)
    return found


def _nothing_seen() -> dict[str, BlockSums]:
    return {"block": BlockSums({}, HeadStatistics())}


def batch_size_of(tokens: TokenBatches) -> int:
    """Windows per forward pass."""
    return max(1, min(len(tokens), BATCH_TOKENS // tokens.seq_len))


def _add_records(
    found: Findings, segment: Segment, observer: SiteObserver, heads: HeadStatistics, text: Callable[[int], str]
) -> None:
    """What was seen of one block."""
    _check_finite(segment.prefix, observer)
    found.sites += observer.records(text)
    found.weights += weight_records(segment)
    found.heads += heads.records(segment.index)
    found.ranges.update(_ranges(segment.prefix, observer))


def _ranges(prefix: str, observer: SiteObserver) -> dict[str, torch.Tensor]:
    found = {}
    for site, s in observer.statistics.items():
        ranges = {"low": s.low, "high": s.high, "abs_mean": s.abs_mean().float(), "first_token_max": s.first_max}
        name = f"{prefix}{site.role.replace(' ', '_')}"
        found.update({f"{name}.{key}": value.cpu() for key, value in ranges.items()})
    return found


def _check_finite(prefix: str, observer: SiteObserver) -> None:
    """Refuse what no number describes; the fourth powers of float32 values above 1e9 are infinite too."""
    for site, s in observer.statistics.items():
        if not bool(torch.isfinite(s.abs_sum).all() and torch.isfinite(s.later.m4).all()):
            raise ToolkitError(
                f"{prefix[:-1]}: NaN, Inf or values above 1e9 in its {site.role}",
                "the model overflows on this text: try --dtype float32, or check the checkpoint",
            )
