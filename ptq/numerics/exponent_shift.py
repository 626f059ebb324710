"""Pre-shifted exponent biases (Liu et al., "LLM-FP4", arXiv 2310.16836, section 4.2): float grids for activations whose
channels have different magnitudes, at no cost in the product.

Channel j wants the bias b_j that fits its largest value. It gets rho + n_j with one real rho for the tensor and a whole
n_j: Q(X_j; rho + n_j) = 2^-n_j Q(2^n_j X_j; rho). The power of two moves into the producer of X (a norm's gain, rows of
a weight) and its inverse into column j of W, both exactly.
"""

from __future__ import annotations

import torch

from ptq.numerics.floats import bias_of, nearest_with_bias
from ptq.scheme import FloatFormat

SMALLEST_MAXIMUM = 1e-8  # of a channel that is zero everywhere


def channel_shifts(maxima: torch.Tensor, number: FloatFormat, rho: float | None = None) -> tuple[torch.Tensor, float]:
    """n_j = clip(round(b_j) - round(rho), 0, 2^E - 1) per channel, and rho.

    Args:
        maxima: ``[in]`` largest magnitudes.
        rho: the bias of the tensor; None takes that of the largest channel, the least of all b_j.

    Returns:
        n ``[in]`` whole numbers in the dtype of ``maxima``, 0 for the largest channel where rho is None.
    """
    biases = bias_of(maxima.clamp(min=SMALLEST_MAXIMUM), number)
    rho = float(biases.amin()) if rho is None else rho
    return (biases.round() - round(rho)).clamp_(0, 2**number.exponent_bits - 1), rho


def quantize_shifted(x: torch.Tensor, number: FloatFormat, rho: float, n: torch.Tensor) -> torch.Tensor:
    """Q(X_j; rho + n_j) for ``X [tokens, in]`` and n ``[in]``."""
    return nearest_with_bias(x, number, rho + n)


def search_rho(
    x: torch.Tensor, weights: torch.Tensor, maxima: torch.Tensor, number: FloatFormat, shortlist: int = 8
) -> float:
    """The rho of least change of the outputs, sum((dX M) * dX) with M = W^T W, among rho_0 + linspace(-1, 3, 81).

    Args:
        x: ``[tokens, in]`` sample of inputs.
        weights: M, ``[in, in]``.
        maxima: ``[in]`` over all tokens.
        shortlist: candidates scored with M itself, after its diagonal; plain rho_0 is always among them.
    """
    _, rho_0 = channel_shifts(maxima, number)
    candidates = [rho_0] + [rho_0 + offset for offset in torch.linspace(-1, 3, 81).tolist() if offset != 0]

    def change(rho: float) -> torch.Tensor:
        n, _ = channel_shifts(maxima, number, rho)
        return quantize_shifted(x, number, rho, n) - x

    diagonal = weights.diagonal()
    rough = torch.stack([(change(rho).square() * diagonal).sum() for rho in candidates])
    kept = [0, *(i for i in rough.argsort().tolist() if i != 0)][:shortlist]
    exact = torch.stack([((d := change(candidates[i])) @ weights * d).sum() for i in kept])
    return candidates[kept[int(exact.argmin())]]
