"""SmoothQuant's channel scales, and what a scale costs when weights and activations are rounded.

Xiao, Lin, Seznec, Wu, Demouth, Han, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", arXiv 2211.10438, equation 4. Scales are computed in float32 and cast at the end; the published code casts
first. Channels that never fire keep s = 1: the published floor of 1e-5 would multiply their gain by 1e5.
"""

from __future__ import annotations

import torch

from ptq.numerics.grids import fake_quantize
from ptq.numerics.groups import rows_per_group
from ptq.numerics.objective import output_energy, row_chunks
from ptq.scheme import TensorQuant

FLOOR = 1e-5  # of the published code, on the weights' maxima and on s
HALF_RANGE = (1e-3, 1e3)  # of s where the gain it divides is stored in float16


def smoothing_scales(x_max: torch.Tensor, w_max: torch.Tensor, alpha: float) -> torch.Tensor:
    """s = x_max^alpha / w_max^(1 - alpha), ``[channels]``; s = 1 where x_max < 1e-5.

    alpha = 0 is not "no smoothing": it makes every weight column's maximum 1.

    Args:
        x_max: ``[channels]`` largest |x| over the calibration tokens.
        w_max: ``[channels]`` largest |w| over all rows of all linears that read the channel.
    """
    s = x_max.pow(alpha).div(w_max.clamp(min=FLOOR).pow(1 - alpha)).clamp(min=FLOOR)
    return torch.where(x_max < FLOOR, 1.0, s)


def activation_noise(maxima: torch.Tensor, bits: int) -> torch.Tensor:
    """Mean over steps of step^2 / 12, the variance of rounding to multiples of a step max|x| / (2^(bits-1) - 1).

    Args:
        maxima: largest |x| of everything that shares a step: of each token ``[tokens]``, or of the tensor ``[1]``.
    """
    return (maxima / (2 ** (bits - 1) - 1)).square().mean() / 12


def smoothed_error(
    w: torch.Tensor, s: torch.Tensor, gram: torch.Tensor, quant: TensorQuant, noise: torch.Tensor, tokens: int
) -> torch.Tensor:
    """Expected ||Q(X / s) Q(W s)^T - X W^T||^2 for activation rounding that is independent of the values.

    That is ||(Q(W s) / s - W) X^T||^2, from the Gram matrix, and ``tokens * noise * ||Q(W s)||^2``.

    Args:
        w: ``[out, in]``, s ``[in]``, gram ``[in, in]`` of the inputs before smoothing.
        noise: variance of one rounded activation of X / s, see `activation_noise`.
    """
    total = torch.zeros((), dtype=torch.float32, device=w.device)
    for rows in row_chunks(w.shape[0], w.shape[1], multiple=rows_per_group(quant, w.shape[0])):
        rounded = fake_quantize(w[rows] * s, quant)
        total += tokens * noise * rounded.square().sum()
        total += output_energy(rounded.div_(s).sub_(w[rows]), gram)
    return total
