"""Central moments 1 to 4 per channel, folded in batch by batch, and kurtosis in each of its flavours.

Sources: Pebay, "Formulas for robust, one-pass parallel computation of covariances and arbitrary-order statistical
moments" (Sandia report SAND2008-6212, 2008); kurtosis and infinity norms as the released evaluation of Bondarenko et
al., "Quantizable Transformers" (NeurIPS 2023, arXiv 2306.12929) has them. Never excess kurtosis: a Gaussian has 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PAPER_EPSILON = 1e-6
"""Added to s^4 by the released evaluation. It hides the kurtosis of tensors whose deviation is below 0.1."""


def kurtosis(x: torch.Tensor, epsilon: float = 0.0) -> float:
    """``mean((x - mu)^4) / (s^4 + epsilon)`` over all values, with the unbiased deviation s; 0 where all are equal.

    The flavour "per sequence" of the paper is this with `PAPER_EPSILON` on one sequence ``[tokens, channels]``. Sums
    are float64, whatever the dtype of x.
    """
    d = x - x.mean(dtype=torch.float64).to(x.dtype)
    square = d.square()
    second = float(square.sum(dtype=torch.float64)) / max(x.numel() - 1, 1)
    fourth = float(square.square().sum(dtype=torch.float64)) / x.numel()
    return fourth / (second**2 + epsilon) if second > 0 else 0.0


def deviation(x: torch.Tensor) -> tuple[float, float]:
    """Mean and unbiased standard deviation of all values, summed in float64."""
    mean = float(x.mean(dtype=torch.float64))
    square = float((x - mean).square().sum(dtype=torch.float64))
    return mean, (square / max(x.numel() - 1, 1)) ** 0.5


@dataclass
class Moments:
    """``count`` values per channel, their mean, and sums of powers of the distance from it, float64 ``[channels]``."""

    count: int
    mean: torch.Tensor
    m2: torch.Tensor
    m3: torch.Tensor
    m4: torch.Tensor

    @classmethod
    def empty(cls, channels: int, device: torch.device) -> Moments:
        return cls(0, *(torch.zeros(channels, dtype=torch.float64, device=device) for _ in range(4)))

    @classmethod
    def of(cls, x: torch.Tensor) -> Moments:
        """Moments of ``x [tokens, channels]``, two passes over it."""
        mean = x.mean(0, dtype=torch.float64)
        d = x - mean.to(x.dtype)
        square = d.square()
        sums = [(power).sum(0, dtype=torch.float64) for power in (square, square * d, square.square())]
        return cls(len(x), mean, *sums)

    def update(self, x: torch.Tensor) -> None:
        """Fold in ``x [tokens, channels]``."""
        if len(x):
            merged = self.merged(Moments.of(x))
            self.count, self.mean, self.m2, self.m3, self.m4 = (
                merged.count, merged.mean, merged.m2, merged.m3, merged.m4,
            )  # fmt: skip

    def merged(self, other: Moments) -> Moments:
        """Moments of both sets of values together."""
        a, b, n = self.count, other.count, self.count + other.count
        if a == 0 or b == 0:
            return other if a == 0 else self
        d = other.mean - self.mean
        m2 = self.m2 + other.m2 + d**2 * (a * b / n)
        m3 = self.m3 + other.m3 + d**3 * (a * b * (a - b) / n**2) + 3 * d * (a * other.m2 - b * self.m2) / n
        m4 = (
            self.m4
            + other.m4
            + d**4 * (a * b * (a * a - a * b + b * b) / n**3)
            + 6 * d**2 * (a * a * other.m2 + b * b * self.m2) / n**2
            + 4 * d * (a * other.m3 - b * self.m3) / n
        )
        return Moments(n, self.mean + d * (b / n), m2, m3, m4)

    def pooled(self) -> Moments:
        """Moments of the values of all channels together, in tensors of one element."""
        mean = self.mean.mean()
        d, n = self.mean - mean, self.count
        m2 = (self.m2 + n * d**2).sum()
        m3 = (self.m3 + 3 * d * self.m2 + n * d**3).sum()
        m4 = (self.m4 + 4 * d * self.m3 + 6 * d**2 * self.m2 + n * d**4).sum()
        return Moments(n * len(self.mean), *(t.reshape(1) for t in (mean, m2, m3, m4)))

    def deviation(self) -> torch.Tensor:
        """Unbiased standard deviation, ``[channels]``."""
        return (self.m2 / max(self.count - 1, 1)).sqrt()

    def kurtosis(self) -> torch.Tensor:
        """``[channels]``; 0 where all values are equal."""
        ratio = (self.m4 / max(self.count, 1)) / (self.m2 / max(self.count - 1, 1)).square()
        return torch.where(self.m2 > 0, ratio, 0.0)
