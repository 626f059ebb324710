"""Hadamard matrices of every order that model dimensions need, made by construction, and transforms by them.

A Hadamard matrix H has entries +1 and -1 and H H^T = n I. For n = K 2^m the transform here is
(H_K (x) H_{2^m}) / sqrt(n), in n log n: Sylvester's for the power of two, and for K a construction of Paley (1933), of
order q + 1 or 2(q + 1) for a prime power q, or of Williamson (1944). As used for rotations by QuaRot (Ashkboos et al.
2024, arXiv 2404.00456) and QuIP# (Tseng et al. 2024, arXiv 2402.04396), without their tables.
"""

from __future__ import annotations

from functools import cache
from math import isqrt

import torch

LARGEST_DENSE = 64  # factors of the power of two that are multiplied at once: faster than butterflies of two

WILLIAMSON: dict[int, tuple[str, str, str, str]] = {
    39: ("+++--+-+-----+--++--", "++++---+--++----+-+-", "+++--++-+---+-+--+--", "+---++-+-+-----+++-+"),
    43: ("+---++--++++-+-+++-++-", "++-++++++----+-+--++-+", "+++-+-++--+-+-++++-+--", "++---++++-+--+--++----"),
}
"""Order 4m: the first halves of the rows of four symmetric circulants with A^2 + B^2 + C^2 + D^2 = 4m I."""


def prime_power(q: int) -> tuple[int, int] | None:
    """``(p, k)`` with q = p^k, p an odd prime and k at most 3, or None."""
    for k in (1, 2, 3):
        p = round(q ** (1 / k))
        if p > 2 and p**k == q and all(p % d for d in range(2, isqrt(p) + 1)):
            return p, k
    return None


def odd_order(n: int) -> int | None:
    """The order K of the factor with the odd part of n: n = K 2^m and a matrix of order K is constructed here.

    None where n is no multiple of 4 (but for 1 and 2), or where no construction is known here.
    """
    odd = n
    while odd % 2 == 0:
        odd //= 2
    if odd == 1:
        return 1
    order = 4 * odd
    while n % order == 0:
        second = order // 2 - 1
        if (
            prime_power(order - 1)
            or (second % 4 == 1 and prime_power(second))
            or (order == 4 * odd and odd in WILLIAMSON)
        ):
            return order
        order *= 2
    return None


def block_size(n: int) -> int:
    """The largest divisor of n for which there is a transform: n itself, or the block of a block-diagonal one."""
    return next(size for size in range(n, 0, -1) if n % size == 0 and odd_order(size) is not None)


@cache
def hadamard_matrix(order: int) -> torch.Tensor:
    """int64 ``[order, order]`` with H H^T = order I, for an order that `odd_order` gives or a power of two."""
    second = order // 2 - 1
    if order & (order - 1) == 0:
        h = torch.ones(1, 1, dtype=torch.int64)
        while h.shape[0] < order:
            h = torch.kron(torch.tensor([[1, 1], [1, -1]]), h)
    elif prime_power(order - 1):
        j = _bordered(_quadratic_characters(order - 1), -1)
        h = torch.eye(order, dtype=torch.int64) + j
    elif second % 4 == 1 and prime_power(second):
        c = _bordered(_quadratic_characters(second), 1)
        h = torch.kron(c, torch.tensor([[1, 1], [1, -1]]))
        h += torch.kron(torch.eye(order // 2, dtype=torch.int64), torch.tensor([[1, -1], [-1, -1]]))
    else:
        h = _williamson(order // 4)
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=torch.int64)), f"no Hadamard matrix of order {order}"
    return h


def _bordered(characters: torch.Tensor, left: int) -> torch.Tensor:
    """``[[0, 1], [left, characters]]``."""
    n = characters.shape[0] + 1
    c = torch.zeros(n, n, dtype=torch.int64)
    c[0, 1:], c[1:, 0], c[1:, 1:] = 1, left, characters
    return c


def _quadratic_characters(q: int) -> torch.Tensor:
    """chi(a_i - a_j) int64 ``[q, q]`` over the field of q = p^k elements: 1 for squares, -1 for others, 0 for 0."""
    found = prime_power(q)
    assert found is not None
    p, k = found
    weights = p ** torch.arange(k)
    elements = (torch.arange(q)[:, None] // weights) % p  # coefficients of polynomials, lowest first
    squares = torch.zeros(q, 2 * k - 1, dtype=torch.int64)
    for i in range(k):
        for j in range(k):
            squares[:, i + j] += elements[:, i] * elements[:, j]
    modulus = _irreducible(p, k)
    for degree in range(2 * k - 2, k - 1, -1):  # x^k = -(the rest of the modulus)
        squares[:, degree - k : degree] -= squares[:, degree : degree + 1] * modulus
    chi = torch.full((q,), -1, dtype=torch.int64)
    chi[(squares[:, :k] % p) @ weights] = 1
    chi[0] = 0
    differences = (elements[:, None] - elements[None]) % p
    return chi[differences @ weights]


def _irreducible(p: int, k: int) -> torch.Tensor:
    """Coefficients 0 .. k - 1 of a monic polynomial of degree k without a root modulo p (for k = 2, 3 irreducible)."""
    x = torch.arange(p)
    for number in range(p**k):
        coefficients = (number // p ** torch.arange(k)) % p
        values = x**k + sum(c * x**i for i, c in enumerate(coefficients))
        if k == 1 or bool((values % p != 0).all()):
            return coefficients
    raise AssertionError(f"no irreducible polynomial of degree {k} modulo {p}")


def _williamson(m: int) -> torch.Tensor:
    blocks = []
    for half in WILLIAMSON[m]:
        first = torch.tensor([1 if sign == "+" else -1 for sign in half])
        row = torch.cat([first, first[1:].flip(0)])
        blocks.append(torch.stack([row.roll(shift) for shift in range(m)]))
    a, b, c, d = blocks
    rows = ([a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a])
    return torch.cat([torch.cat(row, dim=1) for row in rows])


def hadamard_transform(x: torch.Tensor, block: int) -> torch.Tensor:
    """T x along the last axis, in blocks of ``block``: orthogonal, T = (H_K (x) H_{2^m}) / sqrt(block) per block.

    The same routine on activations and on the rows of a weight leaves their products unchanged.

    Args:
        x: ``[..., n]``, n a multiple of ``block``, which `block_size` allows. Computed in float32 (float64 where x is)
            and returned in the dtype of x.
    """
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    order = odd_order(block)
    assert order is not None and x.shape[-1] % block == 0, f"no transform of blocks of {block}"
    y = x.to(wide).reshape(-1, order, block // order)
    if order > 1:
        y = _dense(order, wide, x.device) @ y
    inner = block // order
    while inner > 1:  # H_{2^m} is the Kronecker product of smaller ones: one axis after the other
        size = min(inner, LARGEST_DENSE)
        inner //= size
        y = _dense(size, wide, x.device) @ y.reshape(-1, size, inner)
        y = y.reshape(-1, inner) if inner > 1 else y
    return y.reshape(x.shape).mul_(block**-0.5).to(x.dtype)


@cache
def _dense(order: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return hadamard_matrix(order).to(device, dtype)
