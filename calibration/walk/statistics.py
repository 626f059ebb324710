"""Streaming accumulators over the inputs of linears. Each sees a batch, folds it in, and forgets it.

Tokens may have weights: one of weight 2 counts like two equal ones, in every statistic that sums over tokens. How large
values get is in `calibration.walk.ranges`.
"""

from __future__ import annotations

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
        """Correlations in a sample are larger than in the text that it stands for: count as if as many tokens as there
        are channels had come besides, with channels of the same size and without correlation (shrinkage toward the
        diagonal, Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices", by
        this rule; docs/token_weights.md). In place, once."""
        if self.tokens and self.matrix.is_contiguous():
            self.matrix.diagonal().mul_(1 + self.matrix.shape[0] / self.tokens)

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
