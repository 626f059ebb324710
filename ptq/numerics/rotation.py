"""Orthogonal matrices that are multiplied into weights, applied without being formed.

QuaRot (Ashkboos et al. 2024, arXiv 2404.00456) and SpinQuant (Liu et al. 2024, arXiv 2405.16406) rotate the residual
stream by Q with ``RMSNorm(x Q) = RMSNorm(x) Q``. LayerNorm also subtracts the mean, that is, it removes the component
along the vector of ones. Where Q leaves that vector in place, ``LayerNorm(x Q) = LayerNorm(x) Q`` holds as well: no
norm has to become an RMSNorm, which the stock classes of LayerNorm families could not hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ptq.numerics.hadamard import hadamard_transform, odd_order

Kind = Literal["hadamard", "orthogonal"]
CHUNK = 1_000_000  # values that are rotated in float64 at once


@dataclass(frozen=True)
class Rotation:
    """x -> x Q on the last axis, float64 inside.

    Attributes:
        size: n.
        signs: ``[n]`` of +-1 for Q = diag(signs) H / sqrt(n), or None.
        matrix: Q ``[n, n]`` itself where there is no Hadamard matrix of that order, or None.
        mirror: unit vector ``[n]`` of a reflection after it, which brings the vector of ones back, or None.
    """

    size: int
    signs: torch.Tensor | None
    matrix: torch.Tensor | None
    mirror: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., n] Q`` in the dtype of x."""
        rows = x.reshape(-1, self.size)
        step = max(1, CHUNK // self.size)
        turned = torch.empty_like(rows)
        for i in range(0, rows.shape[0], step):
            turned[i : i + step] = self._rotate(rows[i : i + step].double()).to(x.dtype)
        return turned.view(x.shape)

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        if self.signs is not None:
            y = hadamard_transform(x * self.signs.to(x.device), self.size)
        else:
            assert self.matrix is not None
            y = x @ self.matrix.to(x.device)
        if self.mirror is not None:
            v = self.mirror.to(x.device)
            y = y - 2 * (y @ v)[:, None] * v
        return y


def make_rotation(size: int, kind: Kind, seed: int, keep_mean: bool = False) -> Rotation:
    """A random rotation: a randomized Hadamard matrix, or a uniformly distributed orthogonal one.

    Args:
        kind: ``hadamard`` falls back to ``orthogonal`` where `odd_order` knows no matrix of this size.
        keep_mean: Q maps the vector of ones to itself, see the head of this file.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "hadamard" and odd_order(size) is not None:
        signs = 2.0 * torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64) - 1
        rotation = Rotation(size, signs, None)
    else:
        q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
        rotation = Rotation(size, None, q * r.diagonal().sign())
    if not keep_mean:
        return rotation
    ones = torch.full((size,), size**-0.5, dtype=torch.float64)
    difference = rotation(ones) - ones
    length = difference.norm()
    mirror = difference / length if length > 1e-12 else None
    return Rotation(size, rotation.signs, rotation.matrix, mirror)
