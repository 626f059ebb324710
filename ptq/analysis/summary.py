"""Headline numbers of an analysis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ptq.analysis.record import SiteRecord

EMERGENT_LAYERS = 0.25
"""An emergent feature shows in at least this share of the layers (Dettmers et al. 2022)."""


def summarize(sites: Sequence[SiteRecord], blocks: int) -> dict[str, Any]:
    """The paper's four numbers with and without first tokens, and the channels that stand out across blocks.

    ``max_inf_norm``: largest over tensors of the averaged infinity norm, and where; ``avg_kurtosis`` and
    ``max_kurtosis`` over tensors (Bondarenko et al. 2023). ``outlier_channels``: role -> channel -> blocks in which it
    is an outlier. ``emergent``: hidden dimensions. ``massive``: channel -> blocks after which it holds massive values.
    """
    channels = {
        role: dict(sorted(Counter(c.channel for s in sites if s.role == role for c in s.outlier_channels).items()))
        for role in dict.fromkeys(s.role for s in sites)
    }
    emergent = Counter(c for s in sites if s.role == "attention input" for c in s.emergent)
    massive: dict[int, list[int]] = {}
    for s in sites:
        for channel, _ in s.massive.channels if s.massive else ():
            massive.setdefault(channel, []).append(s.block)
    return {
        "with_first_token": headline((s.block, s.role, s.inf_norm, s.kurtosis_sequence) for s in sites),
        "without_first_token": headline((s.block, s.role, s.inf_norm_later, s.kurtosis_sequence_later) for s in sites),
        "outlier_channels": {role: found for role, found in channels.items() if found},
        "emergent": sorted(c for c, n in emergent.items() if n >= EMERGENT_LAYERS * blocks),
        "massive": dict(sorted(massive.items())),
    }


def headline(tensors: Iterable[tuple[int, str, float | None, float | None]]) -> dict[str, Any]:
    """The four numbers, of (block, role, infinity norm, kurtosis) of every tensor; empty where none is known."""
    known = [(block, role, norm, k) for block, role, norm, k in tensors if norm is not None and k is not None]
    if not known:
        return {}
    block, role, largest, _ = max(known, key=lambda entry: entry[2])
    kurtoses = [k for _, _, _, k in known]
    return {
        "max_inf_norm": largest,
        "max_inf_norm_at": f"block {block} {role}",
        "avg_kurtosis": float(f"{sum(kurtoses) / len(kurtoses):.6g}"),
        "max_kurtosis": max(kurtoses),
    }
