"""What passes that balance channels share: who reads a producer's channels, and how scales reach them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calibration.architectures import Balance, SharedInput
from calibration.walk.context import Context
from calibration.walk.segment import Segment


def quantized_consumers(segment: Segment, group: Balance) -> list[list[str]]:
    """The quantized consumers of a group, by shared input (one list, or one per expert)."""
    groups: dict[SharedInput, list[str]] = {}
    for name in group.consumers:
        if name in segment.schemes:
            groups.setdefault(segment.spec.shared_input(name), []).append(name)
    return list(groups.values())


def by_value_channel(group: Balance, columns: torch.Tensor) -> torch.Tensor:
    """Numbers per input column of the consumers as ``[query heads that share a channel, channels of the producer]``:
    one row but for attention values that several query heads read."""
    if group.heads is None:
        return columns[None]
    heads = group.heads
    return columns.view(heads.key_value, heads.repeats, heads.width).transpose(0, 1).flatten(1)


def spread(group: Balance, s: torch.Tensor) -> torch.Tensor:
    """Scales of the producer's channels as factors of the consumers' input columns."""
    return s if group.heads is None else group.heads.spread(s)


def balance(segment: Segment, context: Context, group: Balance, s: torch.Tensor) -> torch.Tensor:
    """Divide the producer's channels by ``s``, multiply the consumers' columns, and let the statistics follow; returns
    the factors ``[in]`` of the columns."""
    absorbed = segment.absorb(group, s)
    context.rescale([name for name in group.consumers if name not in segment.spec.routers], absorbed)
    return absorbed


def note_all(segment: Segment, inputs: Sequence[Sequence[str]], **values: float | str) -> None:
    """The same numbers into the record of every linear of a group."""
    for names in inputs:
        for name in names:
            segment.note(name, **values)
