"""AdaLog's searches (Wu et al. 2024, arXiv 2407.12951): the base of a logarithmic grid, and base and scale together.

Bases are compared by the squared error of what comes of the values. Scales are refined by fast progressive combining
search (FPCS): the best of a coarse grid, then children around each of the best, closer in every step. A parent stays
among its children here, so that a step never loses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ptq.numerics.logarithmic import CANDIDATES, LogQuant, fake_quantize_log

SHIFTS = {
    "relu": 0.0,
    "gelu": 0.16997124254703522,
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), 0.1700407506),
}
"""transformers' name of a nonlinearity -> minus its smallest value (the published one for the exact GELU)."""
BASES, SCALES = 8, 16  # of the coarse grid: the best bases at full scale, times scales
KEPT, CHILDREN, STEPS = 16, 5, 6
FULL_SHARE = 0.9  # smallest scale tried: the quantile of the values above zero

FakeQuantize = Callable[[torch.Tensor, LogQuant], torch.Tensor]


def bases_of(quant: LogQuant) -> list[LogQuant]:
    """The grid with every q of `CANDIDATES`."""
    return [replace(quant, q=q, half=False) for q in CANDIDATES]


def errors_of(
    candidates: Sequence[LogQuant],
    x: torch.Tensor,
    value: torch.Tensor | None = None,
    fake_quantize: FakeQuantize = fake_quantize_log,
) -> torch.Tensor:
    """Mean square of ``x̂ - x``, or of ``(x̂ - x) @ value``, for every candidate: float64 ``[candidates]``."""
    found = []
    for candidate in candidates:
        difference = fake_quantize(x, candidate) - x
        found.append((difference if value is None else difference @ value).square().mean().double())
    return torch.stack(found)


def search_base(
    x: torch.Tensor,
    quant: LogQuant,
    value: torch.Tensor | None = None,
    fake_quantize: FakeQuantize = fake_quantize_log,
) -> LogQuant:
    """The grid with the q that loses least, see `errors_of`."""
    candidates = bases_of(quant)
    return candidates[int(errors_of(candidates, x, value, fake_quantize).argmin())]


def coarse_grid(x: torch.Tensor, quant: LogQuant, value: torch.Tensor | None) -> tuple[list[LogQuant], float]:
    """Pairs of base and scale for ``x >= -shift``, and the distance between neighbouring scales."""
    above = (x + quant.shift).flatten()
    above = above[above > 0].sort().values
    if above.numel() == 0:
        return [quant], 0.0
    low, high = float(above[int(FULL_SHARE * (len(above) - 1))]), float(above[-1])
    bases = bases_of(replace(quant, scale=high))
    best = errors_of(bases, x, value).argsort()[:BASES].tolist()
    scales = torch.linspace(low, high, SCALES).tolist()
    return [replace(bases[i], scale=s) for i in best for s in scales], (high - low) / (SCALES - 1)


def search_base_and_scale(x: torch.Tensor, quant: LogQuant, value: torch.Tensor | None = None) -> LogQuant:
    """The grid with the q and scale that lose least of those that FPCS tries, for values of one bound, ``x >= -shift``
    (up to what the nonlinearity's smallest value was rounded to)."""
    candidates, spacing = coarse_grid(x, quant, value)
    offsets = torch.linspace(-0.5, 0.5, CHILDREN).tolist()
    for step in range(STEPS):
        order = errors_of(candidates, x, value).argsort()
        best = [candidates[i] for i in order[: KEPT if step < STEPS - 1 else 1].tolist()]
        candidates = [replace(c, scale=max(c.scale + o * spacing, c.scale / 2)) for c in best for o in offsets]
        spacing /= CHILDREN - 1
    return best[0]
