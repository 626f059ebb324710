"""The best low-rank part of a rounding error, plain (LoRC) or weighted by the calibration inputs (QERA, EoRA, LQER).

LoRC (Yao et al. 2023, arXiv 2303.08302) keeps the leading singular vectors of E = W - W_q. Its successors minimize
the error of the layer's output, ||(E - Ê) Xᵀ||² = tr((E - Ê) G (E - Ê)ᵀ) with G = XᵀX. QERA-exact (Zhang et al. 2024,
arXiv 2410.06040) takes the SVD of E G^½ = P Σ Rᵀ and returns P_m Σ_m R_mᵀ G^-½; EoRA (arXiv 2410.21271) takes another
square root of G and gets the same product. Both are P_m P_mᵀ E: the projection of E on the m leading eigenvectors of
E G Eᵀ. That form needs neither a square root nor an inverse, so a singular G (few tokens, dead channels) is no
special case, and with a diagonal G or the identity it is QERA-approx, LQER or LoRC.
"""

from __future__ import annotations

import torch

OVERSAMPLING = 8  # extra directions that make the wanted ones converge fast
ITERATIONS = 60
CONVERGED = 1e-7  # relative change of the energy kept
FACTOR_BITS = (8, 16)


def _times_gram(v: torch.Tensor, gram: torch.Tensor | None) -> torch.Tensor:
    """``v G`` for ``v [k, in]``; a vector stands for a diagonal G, None for the identity."""
    if gram is None:
        return v
    return v * gram if gram.ndim == 1 else v @ gram


def leading_directions(error: torch.Tensor, rank: int, gram: torch.Tensor | None) -> torch.Tensor:
    """The leading eigenvectors of E G Eᵀ, by subspace iteration: no matrix ``[out, out]`` and no SVD is made.

    Args:
        error: E ``[out, in]`` float32 or float64.
        rank: number of directions, at most min(out, in).
        gram: G ``[in, in]``, its diagonal ``[in]``, or None for the identity; dtype of ``error``.

    Returns:
        ``[out, rank]``, orthonormal columns, strongest first, in the dtype of ``error``. On a flat spectrum they are
        directions that keep the same energy to 1e-7, not the same vectors.
    """
    out = error.shape[0]
    generator = torch.Generator().manual_seed(0)  # the start decides nothing but the sign and the last digits
    width = min(rank + OVERSAMPLING, out)
    start = torch.randn(out, width, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(start.to(error.device, error.dtype)).Q
    kept = -1.0
    for _ in range(ITERATIONS):
        image = error @ _times_gram(basis.T @ error, gram).T  # E G Eᵀ Q
        values, rotation = torch.linalg.eigh((basis.T @ image).double())  # ascending
        energy = float(values[-rank:].sum())
        if energy <= 0 or energy - kept <= CONVERGED * energy:
            break
        kept = energy
        basis = torch.linalg.qr(image).Q
    return (basis @ rotation.flip(1)[:, :rank].to(basis.dtype)).contiguous()


def low_rank(error: torch.Tensor, rank: int, gram: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Ê = B A of the given rank that minimizes tr((E - Ê) G (E - Ê)ᵀ).

    Args:
        error, rank, gram: as in `leading_directions`.

    Returns:
        B ``[out, rank]`` with orthonormal columns, and A ``[rank, in]``, in the dtype of ``error``. Columns of A are 0
        where G says that an input is always 0.
    """
    left = leading_directions(error, rank, gram)
    right = left.T @ error
    if gram is not None:
        diagonal = gram if gram.ndim == 1 else gram.diagonal()
        right = right * (diagonal != 0)
    return left, right


def quantize_factors(
    left: torch.Tensor, right: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both factors with one scale per component: B A = (b * scale) a.

    Args:
        left, right: B ``[out, m]``, A ``[m, in]``, float.
        bits: 8 for int8 codes in [-127, 127], 16 for float16 values in [-1, 1].

    Returns:
        b ``[out, m]``, a ``[m, in]`` (int8 or float16), scale float32 ``[m]``. A component without content has scale 0.
    """
    peaks = left.abs().amax(dim=0), right.abs().amax(dim=1)
    top = 127.0 if bits == 8 else 1.0
    b = left / peaks[0].clamp(min=torch.finfo(left.dtype).tiny) * top
    a = right / peaks[1].clamp(min=torch.finfo(right.dtype).tiny)[:, None] * top
    scale = peaks[0].double() * peaks[1].double() / top**2
    if bits == 8:
        return b.round().to(torch.int8), a.round().to(torch.int8), scale.float()
    return b.half(), a.half(), scale.float()


def factor_product(b: torch.Tensor, a: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(b * scale) a as float32 ``[out, in]``."""
    return (b.float() * scale) @ a.float()


def factor_bits(out_features: int, in_features: int, rank: int, bits: int) -> int:
    """Stored bits of b, a and scale."""
    return rank * (bits * (out_features + in_features) + 32)
