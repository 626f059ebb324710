"""How the losses of single linears add up to the loss of the whole model: a curve through what was measured.

The sum of second-order losses is exact for small errors alone. Everything rounded at a few widths shows what larger
errors come to, and between these points the logarithms are taken to be linear.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

LEAST_NLL = 0.1  # of the divergence: a few thousand tokens can show no increase of the loss, or a decrease, by chance


@dataclass(frozen=True)
class Point:
    """Everything rounded: the sum of the expected losses of single linears, the measured divergence, and the measured
    increase of the loss on the text, all in nats per token."""

    parts: float
    kl: float
    nll: float


@dataclass(frozen=True)
class Together:
    """The curve; without a point the sum itself."""

    points: tuple[Point, ...]

    @staticmethod
    def through(measured: Iterable[Point]) -> Together:
        """Points in order, rising; what is zero says nothing."""
        found: list[Point] = []
        for p in sorted(measured, key=lambda p: p.parts):
            if p.parts <= 0 or p.kl <= 0 or (found and p.parts <= found[-1].parts):
                continue
            kl, nll = (found[-1].kl, found[-1].nll) if found else (0.0, 0.0)
            kl = max(p.kl, kl * (1 + 1e-9))
            found.append(Point(p.parts, kl, max(p.nll, LEAST_NLL * kl, nll * (1 + 1e-9))))
        return Together(tuple(found))

    def kl(self, parts: float) -> float:
        """Expected divergence where the single losses add up to ``parts``."""
        return _curve([(p.parts, p.kl) for p in self.points], parts)

    def nll(self, parts: float) -> float:
        """Expected increase of the mean loss."""
        return _curve([(p.parts, p.nll) for p in self.points], parts)

    def parts(self, nll: float) -> float:
        """The sum of single losses at which the mean loss is expected to rise by ``nll``."""
        return _curve([(p.nll, p.parts) for p in self.points], nll)


def _curve(points: list[tuple[float, float]], x: float) -> float:
    """Through rising points: a power law between two of them, proportional outside."""
    if not points or x <= 0:
        return max(x, 0.0)
    if x <= points[0][0]:
        return x * points[0][1] / points[0][0]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x <= x1:
            share = math.log(x / x0) / math.log(x1 / x0)
            return y0 * math.exp(share * math.log(y1 / y0))
    return x * points[-1][1] / points[-1][0]
