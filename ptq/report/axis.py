"""Scales of the charts: values to percentages of the plot, and where round values stand."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_MAX_TICKS = 9
LOG_FROM = 4.0  # values this many times apart are not told apart on a linear axis


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis over ``[low, high]``."""

    low: float
    high: float
    log: bool

    @staticmethod
    def around(values: Iterable[float], log: bool, margin: float = 0.06) -> Axis | None:
        """An axis with room on both sides; None where there is nothing finite to show. Zeros have no logarithm and
        are drawn at the low end."""
        known = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
        if not known:
            return None
        low, high = (math.log10(min(known)), math.log10(max(known))) if log else (min(known), max(known))
        least = 0.3 if log else max(abs(high), 1e-9) * 0.02
        room = max((high - low) * margin, (least - (high - low)) / 2, 0.0)
        return Axis(low - room, high + room, log)

    def at(self, value: float) -> float:
        """Position in percent of the axis, clamped."""
        if self.log and value <= 0:
            return 0.0
        place = ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)
        return round(100 * min(max(place, 0.0), 1.0), 2)

    def ticks(self) -> list[Tick]:
        return self._log_ticks() if self.log else self._linear_ticks()

    def _log_ticks(self) -> list[Tick]:
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        span = self.high - self.low
        narrow = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
        steps = (1,) if span > 3 else (1, 3) if span > 1.5 else (1, 2, 5) if span > 0.7 else narrow
        values = [(m, e) for e in decades for m in steps if self.low <= math.log10(m) + e <= self.high]
        values = values[:: math.ceil(len(values) / _MAX_TICKS) or 1]
        return [Tick(self.at(m * 10.0**e), f"{m * 10**e:g}" if 0 <= e <= 3 else f"{m:g}e{e}") for m, e in values]

    def _linear_ticks(self, wanted: int = 5) -> list[Tick]:
        rough = (self.high - self.low) / wanted
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
        digits = max(0, -math.floor(math.log10(step) + 1e-9) + (1 if f"{step / power:g}" == "2.5" else 0))
        first = math.ceil(self.low / step - 1e-9)
        values = [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [Tick(self.at(v), f"{v:.{digits}f}") for v in values]
