"""Scales (exponent biases) of float grids and the format itself, by output error.

Liu et al., "LLM-FP4", arXiv 2310.16836: per layer, a grid search over formats and exponent biases that minimizes the
change of the layer's output. There candidates are multiples of the bias, whose effect depends on the units of W (none
at all where the bias is 0); here they are offsets to it: the bias that fits the largest weight of a group, plus an
offset from -0.6 to 1. An offset of -0.585 brings that weight to two thirds of the range (E2M1: from 6 to 4), where
levels are dense; positive ones clip it.

The error of group k of a row is d G_kk d^T with the diagonal block of the Gram matrix, for every candidate. (Where
inputs are correlated, a shortlist by the diagonal of G loses good candidates, and with them the right format.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ptq.numerics import floats
from ptq.numerics.grids import own_global_scale, step_of
from ptq.numerics.groups import diagonal_blocks, rows_per_group, split
from ptq.numerics.objective import row_chunks
from ptq.scheme import TensorQuant

OFFSETS = tuple(i / 20 for i in range(-12, 21))
"""Offsets of the bias, i.e. scales divided by 2^offset; 0, plain rounding, is among them."""


def _bound_of(scale: torch.Tensor, quant: TensorQuant, global_scale: torch.Tensor | None) -> torch.Tensor:
    """What the largest level stands for with this stored scale, as `floats.scales` takes it."""
    assert quant.float_format is not None
    number = quant.float_format
    top = number.top_binade if quant.scale_format == "e8m0" else number.largest
    return step_of(scale, global_scale) * top


def search_bounds(
    w: torch.Tensor,
    gram: torch.Tensor,
    quant: TensorQuant,
    global_scale: torch.Tensor | None = None,
    offsets: tuple[float, ...] = OFFSETS,
) -> torch.Tensor:
    """The range of every group that minimizes the error of its own contribution to the output.

    Args:
        w: ``[out, in]`` float32.
        gram: ``[in, in]``, X^T X; products with it run in its dtype.
        quant: a grid of floats.
        global_scale: ``[1]``, for two-level formats; None takes that of W alone.
        offsets: to the bias that fits the largest weight; whole numbers are taken where scales are powers of two.

    Returns:
        ``[lines, G]`` float32 bounds as rounding passes take them (``clip``): what the largest level stands for.
    """
    if quant.scale_format == "e8m0":
        offsets = tuple(float(o) for o in range(-1, 1 + max(1, int(max(offsets)))))
    global_scale = own_global_scale(w, quant, global_scale)
    across = quant.grouping.axis == "out"
    diagonal = gram.diagonal().to(w.dtype)
    blocks = None if across else diagonal_blocks(gram, quant.grouping.width(w.shape[1]))
    chosen = []
    for rows in row_chunks(w.shape[0], w.shape[1], multiple=rows_per_group(quant, w.shape[0])):
        units = split(w[rows], quant.grouping)
        best = lowest = None
        for scale in _candidates(units, quant, global_scale, offsets):
            d = _error(units, scale, quant, global_scale)
            error = d.square_().mul_(diagonal.view(-1, 1, 1)).sum(-1) if blocks is None else _energy(d, blocks)
            if best is None or lowest is None:
                best, lowest = scale, error
            better = error < lowest
            best, lowest = torch.where(better, scale, best), torch.where(better, error, lowest)
        assert best is not None
        chosen.append(_bound_of(best, quant, global_scale))
    return torch.cat(chosen, dim=1 if across else 0)


def _candidates(
    units: torch.Tensor, quant: TensorQuant, global_scale: torch.Tensor | None, offsets: tuple[float, ...]
) -> Iterator[torch.Tensor]:
    """Stored scales ``[lines, G]``, one candidate after another; the first is that of plain rounding."""
    plain = floats.scales(units, quant, None, global_scale)
    yield plain
    bound = _bound_of(plain, quant, global_scale)
    for offset in offsets:
        if offset != 0:
            yield floats.scales(units, quant, bound * 2.0**-offset, global_scale)


def _error(
    units: torch.Tensor, scale: torch.Tensor, quant: TensorQuant, global_scale: torch.Tensor | None
) -> torch.Tensor:
    """Rounded minus exact, ``[lines, G, width]``."""
    assert quant.float_format is not None
    step = step_of(scale, global_scale).unsqueeze(-1)
    return floats.nearest(units / step, quant.float_format).mul_(step).sub_(units)


def _energy(d: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """d G_kk d^T ``[lines, G]`` of errors ``[lines, G, width]``, with blocks ``[G, width, width]``."""
    by_group = d.transpose(0, 1)
    return (torch.bmm(by_group.to(blocks.dtype), blocks).to(d.dtype) * by_group).sum(dim=2).T
