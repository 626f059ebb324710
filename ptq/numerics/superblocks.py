"""GGUF's K-quants as grids: groups of 16 or 32 with integer scales under one float16 scale for 256 weights.

A weight is ``d * sc * code - dmin * mn`` (asymmetric: q2_k, q4_k, q5_k; sc and mn unsigned integers of 4 or 6 bits) or
``d * sc * (code - 2^(bits-1))`` (symmetric: q3_k, q6_k; sc a signed integer of 6 or 8 bits, so that the side with one
more level can be either). Source of the layout: llama.cpp, ``ggml-common.h`` and ``ggml-quants.c``.

The grid is chosen before codes are made, by a search that weighs every column with its importance (the diagonal of
the Gram matrix, where there is one); GPTQ then rounds on it. Importance-weighted least squares given codes is the idea
of llama.cpp's own quantizers; the search over super-scales and the neighbours of the integers is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ptq.numerics.groups import split
from ptq.scheme import SUPER_WIDTH, ScaleFormat, TensorQuant

SMALLEST = 2.0**-24  # the smallest positive float16
LARGEST = 65504.0
TOPS: dict[ScaleFormat, int] = {"k4": 15, "k6": 63, "k8": 127}
LOWS: dict[ScaleFormat, int] = {"k6": -32, "k8": -128}
SHRINK = tuple(1.05 - 0.05 * i for i in range(11))
"""Ranges tried per group, as a share of the whole one."""
SUPER_SHRINK = (1.0, 0.95, 0.9, 0.85)
"""Super-scales tried, as a share of the one that represents the largest scale."""
CHUNK = 2**20  # weights searched at a time


@dataclass(frozen=True)
class SuperGrid:
    """The grid of ``W [..., lines, in]`` with G groups and B super-blocks per line.

    Attributes:
        scale: ``[..., lines, G]`` integers, none of them 0.
        minimum: ``[..., lines, G]`` integers >= 0, or None for symmetric grids.
        super_scale, super_min: ``[..., lines, B]`` exact in float16.
    """

    scale: torch.Tensor
    minimum: torch.Tensor | None
    super_scale: torch.Tensor
    super_min: torch.Tensor | None

    def rows(self, part: slice) -> SuperGrid:
        """The grid of some lines ``[lines, ...]``; views."""
        minimum = None if self.minimum is None else self.minimum[part]
        super_min = None if self.super_min is None else self.super_min[part]
        return SuperGrid(self.scale[part], minimum, self.super_scale[part], super_min)

    @property
    def step(self) -> torch.Tensor:
        """What one level is worth, ``[..., lines, G]``; negative where the scale is."""
        return spread(self.super_scale, self.scale)

    @property
    def offset(self) -> torch.Tensor | None:
        """What is subtracted, ``[..., lines, G]``, or None for symmetric grids."""
        return None if self.minimum is None or self.super_min is None else spread(self.super_min, self.minimum)

    def zero(self, quant: TensorQuant) -> torch.Tensor:
        """The code that stands for 0, ``[..., lines, G]``, no integer where groups have minima."""
        offset = self.offset
        return torch.full_like(self.scale, 2 ** (quant.bits - 1)) if offset is None else offset / self.step


def spread(super_values: torch.Tensor, integers: torch.Tensor) -> torch.Tensor:
    """Super-block values ``[..., B]`` times the integers ``[..., G]`` of their groups."""
    per_block = integers.unflatten(-1, (super_values.shape[-1], -1))
    return (super_values.unsqueeze(-1) * per_block.to(super_values.dtype)).flatten(-2)


def dequantize(codes: torch.Tensor, grid: SuperGrid, quant: TensorQuant) -> torch.Tensor:
    """Weights ``[lines, in]`` of codes, in float32 and in the order of llama.cpp: (d sc) code - (dmin mn)."""
    offset, units = grid.offset, split(codes.float(), quant.grouping)
    if offset is None:
        return ((units - 2 ** (quant.bits - 1)) * grid.step.float().unsqueeze(-1)).flatten(-2)
    return (units * grid.step.float().unsqueeze(-1) - offset.float().unsqueeze(-1)).flatten(-2)


def nearest_codes(units: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, quant: TensorQuant) -> torch.Tensor:
    """The nearest code of every weight, in the dtype of the weights; ``step`` and ``zero`` must broadcast."""
    return (units / step).add_(zero).round_().clamp_(0, quant.levels)


def to_half(x: torch.Tensor) -> torch.Tensor:
    """Rounded to float16, same dtype; the smallest magnitude is 2^-24, so that nothing is divided by 0."""
    rounded = x.clamp(-LARGEST, LARGEST).half().to(x.dtype)
    return torch.where(rounded == 0, SMALLEST, rounded)


def _ranges(units: torch.Tensor, quant: TensorQuant) -> tuple[torch.Tensor, torch.Tensor]:
    """Step and offset ``[..., G]`` that cover every group of units ``[..., G, g]``."""
    low, high = torch.aminmax(units, dim=-1)
    if quant.symmetric:
        extreme = torch.where(-low >= high, low, high)
        return extreme / -(2 ** (quant.bits - 1)), torch.zeros_like(low)
    offset = (-low).clamp(min=0)
    return (high + offset) / quant.levels, offset


def _integers(step: torch.Tensor, offset: torch.Tensor, quant: TensorQuant, share: float = 1.0) -> SuperGrid:
    """The grid nearest to these steps and offsets ``[..., G]``."""
    per_block = (-1, SUPER_WIDTH // quant.grouping.width(SUPER_WIDTH))
    steps = step.unflatten(-1, per_block)
    if quant.symmetric:
        low = LOWS[quant.scale_format]
        place = steps.abs().argmax(dim=-1, keepdim=True)
        d = to_half(steps.gather(-1, place) / (low * share))
        scale = (steps / d).round().clamp(low, -low - 1)
        return SuperGrid(torch.where(scale == 0, 1.0, scale).flatten(-2), None, d.squeeze(-1), None)
    top, offsets = TOPS[quant.scale_format], offset.unflatten(-1, per_block)
    d = to_half(steps.amax(dim=-1, keepdim=True) / (top * share))
    m = to_half(offsets.amax(dim=-1, keepdim=True) / (top * share))
    scale, minimum = (steps / d).round().clamp(1, top), (offsets / m).round().clamp(0, top)
    return SuperGrid(scale.flatten(-2), minimum.flatten(-2), d.squeeze(-1), m.squeeze(-1))


def better_rows(first: SuperGrid, second: SuperGrid, choose: torch.Tensor) -> SuperGrid:
    """Rows of the first grid where ``choose [lines]`` is true, else of the second."""

    def pick(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
        return None if a is None or b is None else torch.where(choose[:, None], a, b)

    scale, over = pick(first.scale, second.scale), pick(first.super_scale, second.super_scale)
    assert scale is not None and over is not None
    return SuperGrid(scale, pick(first.minimum, second.minimum), over, pick(first.super_min, second.super_min))


def range_grid(units: torch.Tensor, quant: TensorQuant, clip: torch.Tensor | None = None) -> SuperGrid:
    """The grid that covers the range of every group of units ``[..., lines, G, g]``.

    Args:
        clip: ``[..., lines, G]`` bounds of the ranges, or None.
    """
    if clip is not None:
        units = torch.maximum(torch.minimum(units, clip.unsqueeze(-1)), -clip.unsqueeze(-1))
    return _integers(*_ranges(units, quant), quant)


def fake_quantize(w: torch.Tensor, quant: TensorQuant, clip: torch.Tensor | None = None) -> torch.Tensor:
    """Quantize and dequantize ``W [..., out, in]`` on the grid of its ranges."""
    units = split(w, quant.grouping)
    grid = range_grid(units, quant, clip)
    step, zero = grid.step.unsqueeze(-1), grid.zero(quant).unsqueeze(-1)
    return nearest_codes(units, step, zero, quant).sub_(zero).mul_(step).flatten(-2)


def choose_grid(w: torch.Tensor, quant: TensorQuant, importance: torch.Tensor | None = None) -> SuperGrid:
    """The grid with the smallest importance-weighted squared error that the search finds for ``W [out, in]``.

    Args:
        importance: ``[in]``, what a squared error of a column counts; None counts all alike.
    """
    weight = torch.ones(w.shape[1], dtype=w.dtype, device=w.device) if importance is None else importance.to(w.dtype)
    weight = weight / weight.mean().clamp(min=torch.finfo(w.dtype).tiny) + 1e-6  # columns without data count a little
    weight = weight.view(-1, quant.grouping.width(w.shape[1]))
    rows = max(1, CHUNK // w.shape[1])
    parts = []
    for start in range(0, len(w), rows):
        units = split(w[start : start + rows], quant.grouping)
        parts.append(_search(units, weight, quant))
    return SuperGrid(
        torch.cat([part.scale for part in parts]),
        None if quant.symmetric else torch.cat([part.minimum for part in parts if part.minimum is not None]),
        torch.cat([part.super_scale for part in parts]),
        None if quant.symmetric else torch.cat([part.super_min for part in parts if part.super_min is not None]),
    )


def _error(units: torch.Tensor, step: torch.Tensor, offset: torch.Tensor, weight: torch.Tensor, quant: TensorQuant):  # type: ignore[no-untyped-def]
    """Codes ``[lines, G, g]`` and weighted squared error ``[lines, G]`` of rounding on a grid."""
    shift = 2 ** (quant.bits - 1) if quant.symmetric else 0
    s, m = step.unsqueeze(-1), offset.unsqueeze(-1)
    codes = ((units + m) / s).add_(shift).round_().clamp_(0, quant.levels).sub_(shift)
    return codes, ((codes * s).sub_(m).sub_(units).square_() * weight).sum(dim=-1)


def _fit(
    codes: torch.Tensor, units: torch.Tensor, weight: torch.Tensor, quant: TensorQuant
) -> tuple[torch.Tensor, torch.Tensor]:
    """The step and offset ``[lines, G]`` of least weighted squares for given codes."""
    qq, qx = (codes.square() * weight).sum(-1), (codes * units * weight).sum(-1)
    plain = torch.where(qq > 0, qx / qq, 0.0)
    if quant.symmetric:
        return plain, torch.zeros_like(plain)
    total, q, x = weight.sum(-1), (codes * weight).sum(-1), (units * weight).sum(-1)
    determinant = total * qq - q.square()
    step = torch.where(determinant > 0, (total * qx - q * x) / determinant, plain)
    offset = (step * q - x) / total
    return torch.where(offset < 0, plain, step), offset.clamp(min=0)


def _search(units: torch.Tensor, weight: torch.Tensor, quant: TensorQuant) -> SuperGrid:
    """See `choose_grid`; units ``[lines, G, g]``, weight ``[G, g]``."""
    whole, low = _ranges(units, quant)
    whole = torch.where(whole == 0, SMALLEST, whole)
    best_step, best_offset, best = whole, low, torch.full_like(whole, torch.inf)
    for share in (*SHRINK, *(-share for share in SHRINK if quant.symmetric)):
        step, offset = whole * share, low
        for _ in range(2):
            codes, error = _error(units, step, offset, weight, quant)
            better = error < best
            best_step, best_offset = torch.where(better, step, best_step), torch.where(better, offset, best_offset)
            best = torch.where(better, error, best)
            step, offset = _fit(codes, units, weight, quant)
            step = torch.where((step == 0) | ((step < 0) & (not quant.symmetric)), whole, step)
    grids = [
        _neighbours(units, _integers(best_step, best_offset, quant, share), weight, quant) for share in SUPER_SHRINK
    ]
    errors = torch.stack([error.unflatten(-1, (grid.super_scale.shape[-1], -1)).sum(-1) for grid, error in grids])
    chosen = errors.argmin(dim=0)  # [lines, B]
    return _picked([grid for grid, _ in grids], chosen)


def _neighbours(
    units: torch.Tensor, grid: SuperGrid, weight: torch.Tensor, quant: TensorQuant
) -> tuple[SuperGrid, torch.Tensor]:
    """The grid with every integer moved by at most one where that lessens the error, and the error ``[lines, G]``."""
    low, top = (
        (LOWS[quant.scale_format], -LOWS[quant.scale_format] - 1) if quant.symmetric else (1, TOPS[quant.scale_format])
    )
    scale, minimum, best = grid.scale, grid.minimum, torch.full_like(grid.scale, torch.inf)
    for by in (0, -1, 1):
        for lower in (0, -1, 1) if grid.minimum is not None else (0,):
            moved = (grid.scale + by).clamp(low, top)
            moved = torch.where(moved == 0, grid.scale, moved)
            offset, down = torch.zeros_like(moved), grid.minimum
            if grid.minimum is not None and grid.super_min is not None:
                down = (grid.minimum + lower).clamp(0, TOPS[quant.scale_format])
                offset = spread(grid.super_min, down)
            _, error = _error(units, spread(grid.super_scale, moved), offset, weight, quant)
            better = error < best
            scale, best = torch.where(better, moved, scale), torch.where(better, error, best)
            minimum = None if minimum is None or down is None else torch.where(better, down, minimum)
    return SuperGrid(scale, minimum, grid.super_scale, grid.super_min), best


def _picked(grids: list[SuperGrid], chosen: torch.Tensor) -> SuperGrid:
    """For every super-block the grid of this index ``[lines, B]``."""

    def pick(values: list[torch.Tensor]) -> torch.Tensor:
        stacked = torch.stack([value.view(*chosen.shape, -1) for value in values])
        index = chosen[None, ..., None].expand(1, *stacked.shape[1:])
        return stacked.gather(0, index)[0].flatten(-2)

    return SuperGrid(
        pick([grid.scale for grid in grids]),
        None if grids[0].minimum is None else pick([g.minimum for g in grids if g.minimum is not None]),
        pick([grid.super_scale for grid in grids]),
        None if grids[0].super_min is None else pick([g.super_min for g in grids if g.super_min is not None]),
    )
