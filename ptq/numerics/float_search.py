"""Scales (exponent biases) of float grids and the format itself, by output error.

Liu et al., "LLM-FP4", arXiv 2310.16836: per layer, a grid search over formats and exponent biases that minimizes the
change of the layer's output. There candidates are multiples of the bias, whose effect depends on the units of W (none
at all where the bias is 0); here they are offsets to it: the bias that fits the largest weight of a group, plus an
offset from -0.6 to 1. An offset of -0.585 brings that weight to two thirds of the range (E2M1: from 6 to 4), where$
levels are dense; positive ones clip it.

The error of group k of a row is d G_kk d^T with the diagonal block of the Gram matrix. Every candidate is scored with
the diagonal of it, and each group's best few with all of it.
"""

from __future__ import annotations

import torch

from ptq.numerics import floats
from ptq.numerics.grids import own_global_scale, step_of
from ptq.numerics.groups import diagonal_blocks, rows_per_group, split
from ptq.numerics.objective import row_chunks
from ptq.scheme import TensorQuant

OFFSETS = tuple(i / 20 for i in range(-12, 21))
"""Offsets of the bias, i.e. scales divided by 2^offset; 0, plain rounding, is among them."""

COARSE = tuple(i / 5 for i in range(-3, 6))
"""Enough to compare formats, whose best errors differ more than those of neighbouring scales."""

SHORTLIST = 8


def _bound_of(scale: torch.Tensor, quant: TensorQuant, global_scale: torch.Tensor | None) -> torch.Tensor:
    """What the largest level stands for with this stored scale, as `floats.scales` takes it."""
    assert quant.float_format is not None
    number = quant.float_format
    top = 2.0 ** (2**number.exponent_bits - 1 - number.bias) if quant.scale_format == "e8m0" else number.largest
    return step_of(scale, global_scale) * top


def search_bounds(
    w: torch.Tensor,
    gram: torch.Tensor,
    quant: TensorQuant,
    global_scale: torch.Tensor | None = None,
    offsets: tuple[float, ...] = OFFSETS,
    shortlist: int = SHORTLIST,
) -> torch.Tensor:
    """The range of every group that minimizes the error of its own contribution to the output.

    Args:
        w: ``[out, in]`` float32.
        gram: ``[in, in]``, X^T X; products with it run in its dtype.
        quant: a grid of floats.
        global_scale: ``[1]``, for two-level formats; None takes that of W alone.
        offsets: to the bias that fits the largest weight; whole numbers are taken where scales are powers of two.
        shortlist: candidates per group that are scored with all of ``gram``; never without plain rounding.

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
        weight = diagonal.view(-1, 1, 1) if across else diagonal.view(units.shape[1:])
        scales = _candidates(units, quant, global_scale, offsets)
        errors = torch.stack(
            [_error(units, scale, quant, global_scale).square_().mul_(weight).sum(-1) for scale in scales]
        )
        if blocks is None:  # the weights of a group all multiply the same input: the diagonal is all there is
            best = errors.argmin(dim=0, keepdim=True)
        else:
            best = _best_of_shortlist(units, scales, errors, blocks, quant, global_scale, shortlist)
        chosen.append(_bound_of(scales.gather(0, best)[0], quant, global_scale))
    return torch.cat(chosen, dim=1 if across else 0)


def _candidates(
    units: torch.Tensor, quant: TensorQuant, global_scale: torch.Tensor | None, offsets: tuple[float, ...]
) -> torch.Tensor:
    """Stored scales ``[offsets, lines, G]``; the first is that of plain rounding."""
    plain = floats.scales(units, quant, None, global_scale)
    bound = _bound_of(plain, quant, global_scale)
    others = [floats.scales(units, quant, bound * 2.0**-o, global_scale) for o in offsets if o != 0]
    return torch.stack([plain, *others])


def _error(
    units: torch.Tensor, scale: torch.Tensor, quant: TensorQuant, global_scale: torch.Tensor | None
) -> torch.Tensor:
    """Rounded minus exact, ``[lines, G, width]``."""
    assert quant.float_format is not None
    step = step_of(scale, global_scale).unsqueeze(-1)
    return floats.nearest(units / step, quant.float_format).mul_(step).sub_(units)


def _best_of_shortlist(
    units: torch.Tensor,
    scales: torch.Tensor,
    errors: torch.Tensor,
    blocks: torch.Tensor,
    quant: TensorQuant,
    global_scale: torch.Tensor | None,
    shortlist: int,
) -> torch.Tensor:
    """Index ``[1, lines, G]`` of the candidate of least error among the ``shortlist`` of least ``errors``."""
    kept = min(shortlist, len(scales))
    order = errors.topk(kept, dim=0, largest=False).indices
    missing = (order != 0).all(dim=0)
    order[-1] = torch.where(missing, 0, order[-1])
    exact = []
    for index in order:
        d = _error(units, scales.gather(0, index[None])[0], quant, global_scale).transpose(0, 1)  # [G, lines, width]
        exact.append((torch.bmm(d.to(blocks.dtype), blocks).to(d.dtype) * d).sum(dim=2).T)
    return order.gather(0, torch.stack(exact).argmin(dim=0, keepdim=True))
