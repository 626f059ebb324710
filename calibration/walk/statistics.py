"""Streaming accumulators over the inputs of linears. Each sees a batch, folds it in, and forgets it.

Tokens may have weights: one of weight 2 counts like two equal ones, in every statistic that sums over tokens. Ranges
hold every token, whatever it weighs.
"""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch

from calibration.walk.products import no_products, plus


class Statistic(Protocol):
    """What a pass may ask for about one shared input ``X [tokens, in]``."""

    tokens: int

    def __init__(self, in_features: int, device: torch.device) -> None: ...

    def update(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        """Fold in ``x [tokens, in]`` (the dtype of the forward pass); ``weight`` float32 ``[tokens]``, None: all 1."""

    def rescale(self, s: torch.Tensor) -> None:
        """What the statistic becomes when the input is divided by ``s [in]``: exact, no forward pass."""

    def finite(self) -> bool:
        """Whether all inputs were free of NaN and Inf."""


PSEUDO_TOKENS = 2.0


class Gram:
    """G = sum over tokens of weight x^T x, float32 ``[in, in]``.

    The product of one batch is made in the dtype of the forward pass (bfloat16 products accumulate in float32 and
    round once per batch and entry, a relative error below 2^-8 that averages out over batches); batches add up in
    float32. Every layer objective ||dW X^T||^2 is ``sum((dW G) * dW)``.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.matrix = no_products(in_features, device)
        self.tokens = 0

    def update(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        if x.dtype == torch.float16:
            x = x.float()  # squares of outliers overflow float16
        if weight is not None:
            x = x * weight.sqrt().to(x.dtype)[:, None]  # on both sides, so that rounding keeps the product symmetric
        self.matrix = plus(self.matrix, x.T @ x)
        self.tokens += x.shape[0]

    def rescale(self, s: torch.Tensor) -> None:
        if self.matrix.is_contiguous():
            s = s.to(self.matrix.dtype)
            self.matrix.div_(s[:, None]).div_(s[None, :])

    def shrink(self) -> None:
        """Correlations of a sample are larger than those of the text it stands for: count as if `PSEUDO_TOKENS` times
        as many tokens as there are channels had come besides, with channels of the same size and without correlation
        (toward the diagonal, as by Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance
        matrices"; docs/token_weights.md). In place, once."""
        if self.tokens and self.matrix.is_contiguous():
            self.matrix.diagonal().mul_(1 + PSEUDO_TOKENS * self.matrix.shape[0] / self.tokens)

    def finite(self) -> bool:
        return bool(torch.isfinite(self.matrix.diagonal()).all())


@runtime_checkable
class TwoStreams(Protocol):
    """A statistic of an input beside the one that the float model has there, for the same tokens. A pass that reads one
    works on the quantized stream; the walk then carries that of the float model along."""

    def update_pair(self, x: torch.Tensor, x_float: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        """Fold in ``x [tokens, in]`` and the float model's ``x_float [tokens, in]``, instead of `Statistic.update`."""


class CrossGram:
    """D = sum over tokens of weight (x_float - x)^T x, float32 ``[in, in]``: rows are channels of the difference.
    Products and sums as in `Gram`."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.matrix = no_products(in_features, device)
        self.tokens = 0

    def update(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        """Tokens whose float input is not known count as if it were the same."""
        self.tokens += x.shape[0]

    def update_pair(self, x: torch.Tensor, x_float: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        if x.dtype == torch.float16:
            x, x_float = x.float(), x_float.float()
        difference = x_float - x
        if weight is not None:
            root = weight.sqrt().to(x.dtype)[:, None]
            difference, x = difference * root, x * root
        self.matrix = plus(self.matrix, difference.T @ x)
        self.update(x)

    def rescale(self, s: torch.Tensor) -> None:
        if self.matrix.is_contiguous():
            s = s.to(self.matrix.dtype)
            self.matrix.div_(s[:, None]).div_(s[None, :])

    def finite(self) -> bool:
        return bool(torch.isfinite(self.matrix).all())


class Mean:
    """Sum over tokens of weight x per input channel, float32 ``[in]``, and the sum of the weights; `mean` divides."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.total = torch.zeros(in_features, dtype=torch.float32, device=device)
        self.weight = 0.0
        self.tokens = 0

    def update(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        self.total += x.sum(dim=0, dtype=torch.float32) if weight is None else weight.float() @ x.float()
        self.weight += x.shape[0] if weight is None else float(weight.sum(dtype=torch.float64))
        self.tokens += x.shape[0]

    def rescale(self, s: torch.Tensor) -> None:
        self.total.div_(s.to(self.total.dtype))

    def finite(self) -> bool:
        return bool(torch.isfinite(self.total).all())

    def mean(self) -> torch.Tensor:
        """``[in]``; zeros where no token was seen."""
        return self.total / self.weight if self.weight > 0 else torch.zeros_like(self.total)


class AbsMean(Mean):
    """`Mean` of |x|."""

    def update(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        super().update(x.abs(), weight)


class AbsMax:
    """Largest |x| per input channel over all tokens, float32 ``[in]`` (float64 where the inputs are)."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.maximum = torch.zeros(in_features, dtype=torch.float32, device=device)
        self.tokens = 0

    def update(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        seen = x.abs().amax(dim=0)
        seen = seen if x.dtype == torch.float64 else seen.float()
        self.maximum = torch.maximum(self.maximum.to(seen.dtype), seen)
        self.tokens += x.shape[0]

    def rescale(self, s: torch.Tensor) -> None:
        self.maximum.div_(s.to(self.maximum.dtype))

    def finite(self) -> bool:
        return bool(torch.isfinite(self.maximum).all())


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


class Sample:
    """Some tokens as they are, float32 ``[at most 512, in]``: evenly spaced ones of every batch until it is full. For
    what no sum holds, such as the largest value of each token."""

    LIMIT = 512
    PER_BATCH = 32

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.rows = torch.zeros(0, in_features, dtype=torch.float32, device=device)
        self.tokens = 0

    def update(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        wanted = min(self.PER_BATCH, self.LIMIT - self.rows.shape[0])
        if wanted > 0:
            self.rows = torch.cat([self.rows, x[:: max(1, -(-x.shape[0] // wanted))].float()])
        self.tokens += x.shape[0]

    def rescale(self, s: torch.Tensor) -> None:
        self.rows.div_(s.to(self.rows.dtype))

    def finite(self) -> bool:
        return bool(torch.isfinite(self.rows).all())


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
