"""Cross-layer equalization (DFQ, Nagel et al. 2019, arXiv 1906.04721): connected weights share ranges, without data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from calibration.architectures import Balance
from calibration.walk.context import Context
from calibration.walk.passes import Pass, Phase
from calibration.walk.segment import Segment
from ptq.numerics.dfq import equalizing_scales

SWEEPS = 20
CONVERGED = 1e-4  # of the largest scale's logarithm


@dataclass(frozen=True)
class Equalize(Pass):
    """Scales of the pairs of linears in the architecture table: up and down of gated MLPs, fc1 and fc2 around a ReLU,
    values and output of attention. Weights of the producer that share a step per row round as before; those of the
    consumer change.

    Attributes:
        values: also move biases of attention values into the bias of the output projection, where both exist. Exact,
            because attention weights sum to 1.
    """

    values: bool = True

    name: ClassVar[str] = "equalize"
    summary: ClassVar[str] = "evens the ranges of weights that follow each other"
    phases: ClassVar[tuple[Phase, ...]] = (Phase.TRANSFORM,)

    def apply(self, segment: Segment, context: Context) -> None:
        pairs = [group for group in segment.spec.balance if group.kind != "norm"]
        for _ in range(SWEEPS):
            largest = 0.0
            for group in pairs:
                scales = equalizing_scales(*channel_ranges(segment, group))
                largest = max(largest, float(scales.log().abs().max()))
                segment.absorb(group, scales)
            if largest < CONVERGED:
                break
        if self.values:
            for group in pairs:
                move_value_bias(segment, group)


def channel_ranges(segment: Segment, group: Balance) -> tuple[torch.Tensor, torch.Tensor]:
    """Twice the largest magnitude per channel of the producer's rows and of the consumers' columns, ``[channels]``;
    columns of all query heads that share a value head count as one channel."""
    rows = slice(*group.rows) if group.rows else slice(None)
    produced = 2 * segment.weight(group.producer)[rows].abs().amax(dim=1)
    consumed = torch.stack([2 * segment.weight(name).abs().amax(dim=0) for name in group.consumers]).amax(dim=0)
    if group.heads is not None:
        heads = group.heads
        consumed = consumed.view(heads.key_value, heads.repeats, heads.width).amax(dim=1).flatten()
    return produced, consumed


def move_value_bias(segment: Segment, group: Balance) -> None:
    """b_o += W_o b_v, b_v = 0 for attention values whose output projection has a bias."""
    source, target = f"{group.producer}.bias", f"{group.consumers[0]}.bias"
    if group.heads is None or source not in segment.masters or target not in segment.masters:
        return
    rows = slice(*group.rows) if group.rows else slice(None)
    values = segment.masters[source][rows]
    moved = segment.masters[target] + segment.weight(group.consumers[0]) @ group.heads.spread(values)
    left = segment.masters[source].clone()
    left[rows] = 0
    segment.set_vector(source, left, exact=True)
    segment.set_vector(target, moved, exact=True)
