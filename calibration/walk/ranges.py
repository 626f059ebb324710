"""Statistics of how large values get: ranges, histograms, maxima. They hold every token, whatever it weighs."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch


class TokenMaxima:
    """Largest |x| of every token, float32 ``[tokens]`` on the CPU: four bytes a token."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._seen: list[torch.Tensor] = []
        self.tokens = 0

    def update(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        self._seen.append(x.abs().amax(dim=1).float().cpu())
        self.tokens += x.shape[0]

    def maxima(self) -> torch.Tensor:
        return torch.cat(self._seen) if self._seen else torch.zeros(0)

    def disparity(self) -> float:
        """The largest of them over their median; 0 where nothing was seen, infinite over a median of 0."""
        found = self.maxima()
        largest, usual = (float(found.max()), float(found.median())) if len(found) else (0.0, 1.0)
        return largest / usual if usual else (math.inf if largest else 0.0)

    def rescale(self, s: torch.Tensor) -> None:
        raise AssertionError("channels are not told apart: gather again behind the balancing")

    def finite(self) -> bool:
        return bool(torch.isfinite(self.maxima()).all())


class EqualBins:
    """A histogram for choosing ranges: counts of all values of the input in ``2 * BINS`` equal bins over
    ``[-limit, limit]``, and their extremes.

    The limit is a power of two that doubles when a value lies beyond it: bins are then merged in pairs, so that
    counts stay exact and the width of a bin is at most ``max|x| / (BINS / 2)``.
    """

    BINS = 2048

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.counts = torch.zeros(2 * self.BINS, dtype=torch.float64)
        self.limit = 2.0**-20
        self.low, self.high = torch.inf, -torch.inf
        self.tokens = 0

    def update(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        low, high = (float(v) for v in torch.aminmax(x))
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.tokens += x.shape[0]
        if not self.finite():
            return
        while self.limit < max(-low, high):
            self._double()
        self.counts += torch.histc(x.float(), 2 * self.BINS, -self.limit, self.limit).double().cpu()

    def _double(self) -> None:
        pairs = self.counts.view(-1, 2).sum(dim=1)
        self.counts = torch.nn.functional.pad(pairs, (self.BINS // 2, self.BINS // 2))
        self.limit *= 2

    def rescale(self, s: torch.Tensor) -> None:
        raise AssertionError("channels are not told apart: gather again behind the balancing")

    def finite(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high) if self.tokens else True


class Extremes:
    """Smallest and largest value of every input channel, float32 ``[in]``."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.low = torch.full((in_features,), torch.inf, device=device)
        self.high = torch.full((in_features,), -torch.inf, device=device)
        self.tokens = 0

    def update(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        low, high = torch.aminmax(x.float(), dim=0)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.tokens += x.shape[0]

    def rescale(self, s: torch.Tensor) -> None:
        self.low.div_(s.float())
        self.high.div_(s.float())

    def finite(self) -> bool:
        return bool(torch.isfinite(self.low).all() and torch.isfinite(self.high).all()) if self.tokens else True


@runtime_checkable
class BySequence(Protocol):
    """A statistic that tells sequences apart, where the model keeps them together."""

    def update_sequences(self, x: torch.Tensor) -> None:
        """Fold in ``x [sequences, tokens, in]``, instead of `Statistic.update`."""


class Midpoints:
    """Extremes of every input channel, and the sum over sequences of the midpoint between a channel's extremes in that
    sequence, float32 ``[in]`` (float64 where the inputs are). Where experts scatter the tokens of a batch, that batch
    counts as one sequence."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.low = torch.full((in_features,), torch.inf, device=device)
        self.high = torch.full((in_features,), -torch.inf, device=device)
        self.total = torch.zeros(in_features, device=device)
        self.sequences = 0
        self.tokens = 0

    def update(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        self.update_sequences(x[None])

    def update_sequences(self, x: torch.Tensor) -> None:
        low, high = torch.aminmax(x if x.dtype == torch.float64 else x.float(), dim=1)
        self.low = torch.minimum(self.low.to(low.dtype), low.amin(dim=0))
        self.high = torch.maximum(self.high.to(low.dtype), high.amax(dim=0))
        self.total = self.total.to(low.dtype) + ((low + high) / 2).sum(dim=0)
        self.sequences += x.shape[0]
        self.tokens += x.shape[0] * x.shape[1]

    def rescale(self, s: torch.Tensor) -> None:
        for tensor in (self.low, self.high, self.total):
            tensor.div_(s.to(tensor.dtype))

    def finite(self) -> bool:
        return bool(torch.isfinite(self.total).all())
