"""Pre-shifted exponent biases (Liu et al., "LLM-FP4", arXiv 2310.16836, section 4.2): float grids for activations whose
channels have different magnitudes, at no cost in the product.

Channel j wants the bias b_j that fits its largest value. It gets rho + n_j with one real rho for the tensor and a whole
n_j: Q(X_j; rho + n_j) = 2^-n_j Q(2^n_j X_j; rho). The power of two moves into the producer of X (a norm's gain, rows of
a weight) and its inverse into column j of W, both exactly.
"""

from __future__ import annotations

import torch

from ptq.float_formats import FloatFormat
from ptq.numerics.floats import bias_of

SMALLEST_MAXIMUM = 1e-8  # of a channel that is zero everywhere


def channel_shifts(maxima: torch.Tensor, number: FloatFormat) -> tuple[torch.Tensor, float]:
    """n_j = clip(round(b_j) - round(rho), 0, 2^E - 1) per channel, and rho, the bias of the largest channel.

    Args:
        maxima: ``[in]`` largest magnitudes.

    Returns:
        n ``[in]`` whole numbers in the dtype of ``maxima``, 0 for the largest channel.
    """
    biases = bias_of(maxima.clamp(min=SMALLEST_MAXIMUM), number)
    rho = float(biases.amin())
    return (biases.round() - round(rho)).clamp_(0, 2**number.exponent_bits - 1), rho
