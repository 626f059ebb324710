"""K-quants after GPTQ: scales fitted to the codes and codes to the scales, in turn, against the layer's output.

For fixed codes and integers a row is linear in its super-scales and super-minima: ``w = sum_k p_k b_k`` with
``b_k = sc * code`` (or ``-mn``) on the columns of one super-block and 0 elsewhere. The p that minimize
``(w - sum p b) H (w - sum p b)'`` solve a small system per row. Its right side is taken from what the current ones
leave over, and a ridge keeps directions that H does not see as they are.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ptq.numerics.superblocks import LOWS, TOPS, SuperGrid, dequantize, nearest_codes, to_half
from ptq.scheme import SUPER_WIDTH, TensorQuant

RIDGE = 1e-4  # of the mean of the diagonal
ROWS = 512  # at a time
COLUMNS = 128  # swept before the others are brought up to date; does not change the result
ROUNDS = 3
"""Of new scales and integers for the codes, and new codes for those."""


def settle(
    w: torch.Tensor, h: torch.Tensor, codes: torch.Tensor, grid: SuperGrid, quant: TensorQuant
) -> tuple[torch.Tensor, SuperGrid]:
    """Codes and grid with a smaller loss; arguments as in `refit`."""
    for _ in range(ROUNDS):
        grid = integers(w, h, codes, refit(w, h, codes, grid, quant), quant)
        codes = sweep(w, h, codes, grid, quant)
    return codes, refit(w, h, codes, integers(w, h, codes, grid, quant), quant)


def refit(w: torch.Tensor, h: torch.Tensor, codes: torch.Tensor, grid: SuperGrid, quant: TensorQuant) -> SuperGrid:
    """The grid with other super-scales and super-minima; codes and integers stay.

    Args:
        w: ``[out, in]`` the float weight.
        h: ``[in, in]`` Gram matrix of the inputs, same dtype.
        codes: uint8 ``[out, in]``.
    """
    scales, minima = [], []
    for start in range(0, len(w), ROWS):
        rows = slice(start, start + ROWS)
        part = grid.rows(rows)
        change = _change(w[rows], h, codes[rows], part, quant)
        blocks = grid.super_scale.shape[1]
        scales.append(to_half(part.super_scale + change[:, :blocks]))
        if part.super_min is not None:
            minima.append(to_half(part.super_min + change[:, blocks:]))
    return replace(grid, super_scale=torch.cat(scales), super_min=torch.cat(minima) if minima else None)


def _change(w: torch.Tensor, h: torch.Tensor, codes: torch.Tensor, grid: SuperGrid, quant: TensorQuant) -> torch.Tensor:
    """What to add to super-scales and super-minima ``[rows, parameters]``."""
    width = quant.grouping.width(w.shape[1])
    shift = 2 ** (quant.bits - 1) if grid.minimum is None else 0
    basis = [(codes.to(w.dtype) - shift) * grid.scale.to(w.dtype).repeat_interleave(width, dim=1)]
    if grid.minimum is not None:
        basis.append(-grid.minimum.to(w.dtype).repeat_interleave(width, dim=1))
    rest = w - dequantize(codes, grid, quant).to(w.dtype)
    matrix, right = [], []
    for b in basis:
        for k, block in enumerate(b.split(SUPER_WIDTH, dim=1)):
            seen = block @ h[k * SUPER_WIDTH : (k + 1) * SUPER_WIDTH]  # [rows, in]
            right.append((seen * rest).sum(dim=1))
            products = torch.cat([(seen * other).unflatten(1, (-1, SUPER_WIDTH)).sum(dim=2) for other in basis], dim=1)
            matrix.append(products)
    a, r = torch.stack(matrix, dim=1), torch.stack(right, dim=1)
    diagonal = a.diagonal(dim1=1, dim2=2)
    a = a + torch.diag_embed(RIDGE * diagonal + 1e-30 + 1e-6 * diagonal.mean(dim=1, keepdim=True))
    solution: torch.Tensor = torch.linalg.solve(a, r)
    return solution


def integers(w: torch.Tensor, h: torch.Tensor, codes: torch.Tensor, grid: SuperGrid, quant: TensorQuant) -> SuperGrid:
    """The grid with other integers; codes and super-scales stay. One round of coordinate descent: the scale of each
    group in turn, and then its minimum, becomes the integer that is best given all others. The loss never grows.

    Args:
        w, h, codes: as in `refit`.
    """
    width = quant.grouping.width(w.shape[1])
    shift = 2 ** (quant.bits - 1) if grid.minimum is None else 0
    low, top = (LOWS[quant.scale_format], -LOWS[quant.scale_format] - 1) if shift else (1, TOPS[quant.scale_format])
    scale, minimum = grid.scale.clone(), None if grid.minimum is None else grid.minimum.clone()
    over = grid.super_scale.repeat_interleave(SUPER_WIDTH // width, dim=1)
    under = None if grid.super_min is None else grid.super_min.repeat_interleave(SUPER_WIDTH // width, dim=1)
    wanted = (w - dequantize(codes, grid, quant).to(w.dtype)) @ h  # [out, in]: minus the gradient, halved
    for group in range(scale.shape[1]):
        columns = slice(group * width, (group + 1) * width)
        basis = (codes[:, columns].to(w.dtype) - shift) * over[:, group, None]
        scale[:, group] = _moved(basis, scale[:, group], (low, top), h, wanted, columns)
        if minimum is not None and under is not None:
            basis = -under[:, group, None].expand(-1, width)
            minimum[:, group] = _moved(basis, minimum[:, group], (0, TOPS[quant.scale_format]), h, wanted, columns)
    return replace(grid, scale=scale, minimum=minimum)


def _moved(
    basis: torch.Tensor,
    integer: torch.Tensor,
    ends: tuple[int, int],
    h: torch.Tensor,
    wanted: torch.Tensor,
    columns: slice,
) -> torch.Tensor:
    """The best integers ``[out]`` of one group whose values are ``basis [out, width]`` times them, never 0 where the
    lower end is negative; ``wanted`` is brought up to date."""
    seen = basis @ h[columns]  # [out, in]
    curvature = (seen[:, columns] * basis).sum(dim=1)
    change = torch.where(curvature > 0, (wanted[:, columns] * basis).sum(dim=1) / curvature, 0.0)
    found = (integer + change).round().clamp(*ends)
    found = torch.where((found == 0) & (ends[0] != 0), integer, found)
    wanted.addcmul_(seen, (found - integer).unsqueeze(1), value=-1)
    return found


def sweep(w: torch.Tensor, h: torch.Tensor, codes: torch.Tensor, grid: SuperGrid, quant: TensorQuant) -> torch.Tensor:
    """Codes after one round of coordinate descent on ``(w - v) H (w - v)'``: each column in turn gets the best code
    given all others (Behdin et al. 2023, "QuantEase", arXiv 2309.01885). The loss never grows.

    Args:
        w, h, codes: as in `refit`; the diagonal of h is positive.
    """
    width = quant.grouping.width(w.shape[1])
    step = grid.step.to(w.dtype).T.repeat_interleave(width, dim=0)  # [in, out], as everything here
    zero = grid.zero(quant).to(w.dtype).T.repeat_interleave(width, dim=0)
    values = (codes.T.to(w.dtype) - zero) * step
    wanted = h @ (w.T - values)  # how much less the loss gets per unit of each value, halved
    diagonal = h.diagonal()
    result = torch.empty_like(values, dtype=torch.uint8)
    for start in range(0, len(values), COLUMNS):
        stop = min(start + COLUMNS, len(values))
        inside, local = h[start:stop, start:stop], wanted[start:stop]
        moved = torch.empty_like(local)
        for i in range(stop - start):
            j = start + i
            code = nearest_codes(values[j] + local[i] / diagonal[j], step[j], zero[j], quant)
            result[j] = code.to(torch.uint8)
            moved[i] = (code - zero[j]) * step[j] - values[j]
            local[i + 1 :].addr_(inside[i, i + 1 :], moved[i], alpha=-1)
        wanted[stop:].addmm_(h[stop:, start:stop], moved, alpha=-1)
    return result.T.contiguous()
