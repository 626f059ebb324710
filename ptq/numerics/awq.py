"""AWQ's two searches, on Gram matrices: a channel scale per balance group, a clipping bound per group of weights.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han, "AWQ: Activation-aware Weight Quantization for LLM
Compression and Acceleration", arXiv 2306.00978, equations 4 and 5. The published search runs the block again for every
candidate; here a candidate costs one product with G = X^T X, and no forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ptq.numerics.grids import fake_quantize
from ptq.numerics.groups import diagonal_blocks, join, rows_per_group, split
from ptq.numerics.objective import output_energy, row_chunks
from ptq.scheme import TensorQuant

SMALLEST = 1e-4  # floor of the published scales
CLIP_BYTES = 4_000_000  # of rows whose bounds are searched at once: a candidate takes four times as much


def normalize(s: torch.Tensor) -> torch.Tensor:
    """``s / sqrt(max(s) * min(s))``, so that the largest and smallest scale are inverse to each other."""
    return s / (s.amax() * s.amin()).sqrt()


def candidate_scales(x_mean: torch.Tensor, alphas: Sequence[float]) -> list[torch.Tensor]:
    """s = x_mean^alpha, floored at 1e-4 and normalized, for every alpha; alpha = 0 gives ones.

    Args:
        x_mean: ``[channels]`` mean |x| per input channel. Channels that never fire keep s = 1: in the published code
            one of them rescales all others through the normalization.
    """
    live = x_mean > 0
    scales = []
    for alpha in alphas:
        s = torch.ones_like(x_mean)
        if bool(live.any()):
            s[live] = normalize(x_mean[live].pow(alpha).clamp(min=SMALLEST))
        scales.append(s)
    return scales


def duo_scales(x_mean: torch.Tensor, w_mean: torch.Tensor, alphas: Sequence[float]) -> list[torch.Tensor]:
    """AutoAWQ's variant: s = x_mean^alpha / (w_mean^(1 - alpha) + 1e-4). Plain rounding is not among its candidates.

    Args:
        w_mean: ``[channels]`` mean over rows of |w| / max|w of its group|.
    """
    return [normalize((x_mean.pow(a) / (w_mean.pow(1 - a) + 1e-4)).clamp(min=SMALLEST)) for a in alphas]


def relative_magnitude(w: torch.Tensor, quant: TensorQuant) -> torch.Tensor:
    """Mean over rows of |w| / (max|w| of its group + 1e-6), ``[in]``, for `duo_scales`."""
    groups = split(w, quant.grouping).abs()
    return join(groups / (groups.amax(dim=-1, keepdim=True) + 1e-6), quant.grouping).mean(dim=0)


def sample_rows(w: torch.Tensor, rows: int) -> torch.Tensor:
    """At most ``rows`` evenly spaced rows of ``w [out, in]``; all of them for ``rows = 0``.

    The channel scale is shared by all rows, so its error on a sample of them ranks candidates as the full error does,
    at a fraction of the cost.
    """
    step = 1 if rows == 0 else -(-w.shape[0] // rows)
    return w[::step]


def scaled_error(w: torch.Tensor, s: torch.Tensor, gram: torch.Tensor, quant: TensorQuant) -> torch.Tensor:
    """||(Q(W s) / s - W) X^T||^2, a scalar. Shapes: w ``[out, in]``, s ``[in]``, gram ``[in, in]``."""
    total = torch.zeros((), dtype=torch.float32, device=w.device)
    for rows in row_chunks(w.shape[0], w.shape[1], multiple=rows_per_group(quant, w.shape[0])):
        total += output_energy(fake_quantize(w[rows] * s, quant).div_(s).sub_(w[rows]), gram)
    return total


def clip_bounds(
    w: torch.Tensor, gram: torch.Tensor, quant: TensorQuant, steps: int = 10, shrink: float = 0.5
) -> torch.Tensor:
    """The clipping bound of every (row, group) that minimizes the error of that group's contribution to the output.

    Candidates are c0 * (1 - shrink * i / steps), i = 0 .. steps - 1, c0 = max|w| of the group; ties keep the larger.
    The error of group k is d G_kk d^T with G_kk the diagonal block of the Gram matrix.

    The bound clips the range that the step is taken from, not the weight (the published code clamps the weight itself).
    A weight beyond the bound still rounds to the outermost code; one within half a step of it may land one code higher
    than the clamped weight would.

    Args:
        w: ``[out, in]``, gram ``[in, in]`` float32.

    Returns:
        ``[lines, G]`` float32. Where groups lie inside columns (axis "out") every weight of one multiplies the same
        input, and the error is that of the weights.
    """
    grouping = quant.grouping
    blocks = diagonal_blocks(gram, grouping.width(w.shape[1])) if grouping.axis == "in" else None
    chosen, multiple = [], rows_per_group(quant, w.shape[0])
    for rows in row_chunks(w.shape[0], w.shape[1], multiple=multiple, size=CLIP_BYTES):
        part = w[rows]
        full = split(part, grouping).abs().amax(dim=2)
        best = full.clone()
        lowest = torch.full_like(full, torch.inf)
        for i in range(steps):
            bound = full * (1 - shrink * i / steps)
            d = split(fake_quantize(part, quant, bound).sub_(part), grouping)
            if blocks is None:
                error = d.square().sum(dim=2)
            else:
                by_group = d.transpose(0, 1)
                error = (torch.bmm(by_group.to(blocks.dtype), blocks).to(d.dtype) * by_group).sum(dim=2).T
            better = error < lowest
            best = torch.where(better, bound, best)
            lowest = torch.where(better, error, lowest)
        chosen.append(best)
    return torch.cat(chosen, dim=0 if grouping.axis == "in" else 1)
