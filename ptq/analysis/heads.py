"""Which heads do nothing: where their probability goes, and what they add to the residual stream.

Definitions: Bondarenko et al. (arXiv 2306.12929); the thresholds of the no-op score are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from calibration.text.crops import TokenBatches
from calibration.walk.segment import Segment
from ptq.analysis.record import HeadRecord
from ptq.analysis.sites import short, sites_of
from ptq.runtime.explicit_attention import Scores

SMALL_VALUE = 0.3
"""A key whose value norm is below this share of the median carries nothing."""
SINK_MASS = 0.9
QUIET = 0.1
"""A head is quiet at a token where its contribution is among the lowest share of its layer's."""
DELIMITERS = (".", ",")


def is_delimiter(text: str) -> bool:
    """Tokens without content of their own: full stop, comma, line break."""
    return text.strip() in DELIMITERS or "\n" in text


@dataclass(frozen=True)
class Probe:
    """What a batch's attention is seen against.

    Attributes:
        delimiters: bool ``[batch, keys]``, keys behind the first that are delimiters.
        residual: norm of the hidden state entering the block, ``[batch, queries]``.
        projections: ``W_h^T W_h`` of every head's part of the output projection, ``[heads, width, width]``.
    """

    delimiters: torch.Tensor
    residual: torch.Tensor
    projections: torch.Tensor


def head_projections(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """``[heads, width, width]`` of an output projection ``[hidden, heads * width]``: ||O_h W_h|| without W_h."""
    parts = weight.view(weight.shape[0], heads, -1)
    return torch.einsum("ohw,ohv->hwv", parts, parts)


class HeadObserver:
    """Fills `statistics`, which the caller exchanges, by `look` while a block runs.

    Args:
        text: token id to its text.
    """

    def __init__(self, tokens: TokenBatches, batch_size: int, text: Callable[[int], str]) -> None:
        known = {i: is_delimiter(text(i)) for i in tokens.input_ids.unique().tolist()}
        delimiter = torch.tensor([i for i, found in known.items() if found], dtype=torch.int64)
        marked = torch.isin(tokens.input_ids, delimiter)
        marked[:, 0] = False  # the first token is counted by itself
        self._delimiters = marked.split(batch_size)
        self.statistics = HeadStatistics()

    def begin(self, segment: Segment) -> None:
        """The next block; its output projection is the linear behind the attention."""
        (site,) = (s for s in sites_of(segment.architecture, segment.index) if s.role == "o input")
        self._weight = segment.weight(site.linears[0])
        self._projections: torch.Tensor | None = None

    def expect(self, batch: int, hidden: torch.Tensor) -> None:
        """The next batch, and the hidden states ``[batch, tokens, hidden]`` that enter the block."""
        self._marked = self._delimiters[batch].to(hidden.device)
        self._residual = hidden.float().norm(dim=-1)

    def look(self, scores: Scores) -> None:
        if self._projections is None:
            self._projections = head_projections(self._weight.float(), scores.output.shape[1])
        self.statistics.update(scores, Probe(self._marked, self._residual, self._projections))


class HeadStatistics:
    """Sums over queries behind the first token, float64 ``[heads]``, of one block."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.queries = 0

    def update(self, scores: Scores, probe: Probe) -> None:
        """Fold in one batch. The first query sees one key only and is left out."""
        p, a = scores.probabilities[:, :, 1:], scores.logits[:, :, 1:]
        visible = a > torch.finfo(a.dtype).min / 2
        later = probe.delimiters[:, None, None, :]
        norms = scores.values.float().norm(dim=-1)
        sinks = p[..., 0] + (p * later).sum(-1)
        share = norms / norms.median(-1, keepdim=True).values.clamp_min(1e-30)
        at_largest = share.gather(-1, p.argmax(-1))
        entropy = -(p * p.clamp_min(1e-30).log()).sum(-1) / visible.sum(-1).clamp_min(2).log()
        high = a.masked_fill(~visible, -torch.inf).amax(-1)
        spread = high - a.masked_fill(~visible, torch.inf).amin(-1)
        contribution = _contribution(scores.output[:, :, 1:].float(), probe)
        quiet = contribution <= contribution.flatten().quantile(QUIET) if contribution.numel() < 1 << 24 else None
        if quiet is None:  # torch.quantile takes 16 million values
            quiet = contribution <= contribution.flatten()[:: contribution.numel() >> 20].quantile(QUIET)
        found = {
            "first_mass": p[..., 0],
            "delimiter_mass": (p * later).sum(-1),
            "value_ratio": at_largest,
            "entropy": entropy,
            "logit_range": spread,
            "contribution": contribution,
            "no_op": ((sinks >= SINK_MASS) & quiet).float(),
        }
        for name, values in found.items():
            total = values.sum((0, 2), dtype=torch.float64)
            self.sums[name] = self.sums.get(name, torch.zeros_like(total)) + total
        self.queries += p.shape[0] * p.shape[2]

    def merge(self, other: HeadStatistics) -> None:
        """Fold in the sums over the batches that follow."""
        for name, total in other.sums.items():
            self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.queries += other.queries

    def records(self, block: int) -> list[HeadRecord]:
        means = {name: (total / max(self.queries, 1)).tolist() for name, total in self.sums.items()}
        heads = len(next(iter(means.values()), []))
        return [_record(block, h, {name: short(values[h]) for name, values in means.items()}) for h in range(heads)]


def _contribution(output: torch.Tensor, probe: Probe) -> torch.Tensor:
    """||O_h W_h|| over the norm of the residual stream, ``[batch, heads, queries]``."""
    square = torch.einsum("bhqw,hwv,bhqv->bhq", output, probe.projections, output)
    return square.clamp_min(0).sqrt() / probe.residual[:, None, 1:].clamp_min(1e-30)


def _record(block: int, head: int, means: dict[str, float]) -> HeadRecord:
    sink = means["first_mass"] + means["delimiter_mass"]
    return HeadRecord(
        block=block,
        head=head,
        no_op_score=short(sink if means["value_ratio"] < SMALL_VALUE else 0.0),
        no_op_share=means.pop("no_op"),
        **means,
    )
