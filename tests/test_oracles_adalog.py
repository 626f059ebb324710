"""Oracles of logarithmic grids (RepQ-ViT, arXiv 2212.08254; AdaLog, arXiv 2407.12951)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ptq.numerics.log_search import SHIFTS, coarse_grid, errors_of, search_base, search_base_and_scale
from ptq.numerics.logarithmic import (
    LogQuant,
    decode,
    encode,
    fake_quantize_log,
    log_sqrt2,
    signed_log,
    tables,
)


def probabilities(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.softmax(3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_shift_and_parity_equal_the_root_and_even_codes_equal_log2(bits):
    """Oracle 4."""
    half, whole = log_sqrt2(bits), LogQuant(bits)
    codes = torch.arange(half.last + 1)
    found = decode(codes, half, torch.float64)
    torch.testing.assert_close(found, 2.0 ** (-codes.double() / 2), rtol=1e-7, atol=0)
    even = codes[: 2 * (whole.last // 2) : 2]
    assert torch.equal(decode(even, half), decode(even // 2, whole))


def test_q_37_is_log2_and_tables_are_the_listed_ones():
    """Oracle 5, for 4 bits as published: 16 codes above zero."""
    shift, mantissa = tables(LogQuant(4, 37, zero_code=False))
    assert shift.tolist() == list(range(16)) and (mantissa == 1).all()
    shift, mantissa = tables(LogQuant(4, 18, zero_code=False))
    assert shift.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7]
    assert (30 * mantissa).round().tolist() == [30, 21, 15, 22, 16, 22, 16, 23, 16, 23, 16, 24, 17, 24, 17, 24]
    for q in range(10, 138):
        assert ((tables(LogQuant(4, q))[1] >= 0.5) & (tables(LogQuant(4, q))[1] <= 1)).all()
    p = probabilities(50, 40)
    assert torch.equal(
        fake_quantize_log(p, LogQuant(4)), 2.0 ** -torch.log2(p).neg().round() * (-torch.log2(p).round() < 15)
    )


@pytest.mark.parametrize("quant", [LogQuant(4), LogQuant(3, 18), log_sqrt2(4), LogQuant(4, 60, scale=0.5)])
@pytest.mark.parametrize("zero_code", [True, False])
def test_codes_are_monotone_and_the_ends_are_exact(quant, zero_code):
    """Oracle 6."""
    quant = replace(quant, zero_code=zero_code)
    x = torch.linspace(0, 2 * quant.scale, 4001)
    codes = encode(x, quant)
    assert (codes.diff() <= 0).all() and encode(torch.tensor(quant.scale), quant) == 0
    assert codes[0] == quant.last + 1 and fake_quantize_log(x[:1], quant) == 0
    assert fake_quantize_log(torch.tensor([3.0]), quant) == quant.scale
    assert codes.max() + 1 == quant.codes + (not zero_code), "a grid of k bits has 2^k values, the published one more"


def test_folding_the_shift_of_gelu_into_a_bias():
    """Oracle 7: a decoder that leaves the shift out, and a bias that has it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.gelu(torch.randn(30, 16, generator=generator))
    w, bias = torch.randn(5, 16, generator=generator), torch.randn(5, generator=generator)
    quant = LogQuant(4, 20, scale=float(x.max()) + SHIFTS["gelu"], shift=SHIFTS["gelu"])
    codes = encode(x, quant)
    plain = decode(codes, quant) @ w.T + bias
    folded = decode(codes, replace(quant, shift=0.0)) @ w.T + (bias - SHIFTS["gelu"] * w.sum(1))
    torch.testing.assert_close(plain, folded, rtol=1e-5, atol=1e-6)


def test_the_search_finds_the_base_of_the_data():
    """Oracle 8."""
    i = torch.arange(15).double()
    assert search_base((2.0**-i).float(), LogQuant(4)).q == 37
    assert search_base((2.0 ** (-i / 2)).float(), LogQuant(4)).q in (18, 19)
    p, value = probabilities(64, 64), torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    found = search_base(p, LogQuant(3), value)

    def error(quant: LogQuant) -> float:
        return float(((fake_quantize_log(p, quant) - p) @ value).square().mean())

    assert error(found) <= min(error(LogQuant(3)), error(LogQuant(3, 18)))


def test_fpcs_is_as_good_as_a_dense_grid_and_no_worse_than_its_coarse_one():
    """Oracle 9, on one-dimensional Gaussians behind GELU, and on their squares."""
    draw = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    for x, shift in ((torch.nn.functional.gelu(draw), SHIFTS["gelu"]), (draw.square(), 0.0)):
        start = LogQuant(4, shift=shift)
        candidates, spacing = coarse_grid(x, start, None)
        assert len(candidates) == 128 and spacing > 0 and len({c.q for c in candidates}) == 8
        coarse = float(errors_of(candidates, x).min())
        found = float(errors_of([search_base_and_scale(x, start)], x))
        largest = float(x.max()) + shift
        dense = [replace(start, q=q, scale=largest * i / 100) for q in range(10, 40) for i in range(20, 101, 2)]
        assert found <= coarse and found <= 1.01 * float(errors_of(dense, x).min()), (found, coarse)


def test_values_at_or_below_the_shift_alone_keep_the_start():
    start = LogQuant(4, shift=0.5)
    assert search_base_and_scale(torch.full((10, 1), -0.5), start) == start


def test_range_of_the_grids_on_flat_attention():
    """4-bit log-sqrt2 ends at 2^-7, so a head spread over 2048 tokens loses its whole row; log2 keeps it."""
    flat = torch.full((1, 2048), 1 / 2048)
    assert fake_quantize_log(flat, log_sqrt2(4)).sum() == 0
    assert fake_quantize_log(flat, LogQuant(4)).sum() == 1


def test_signs_and_sizes_of_products():
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(2)) ** 3
    found = signed_log(x, LogQuant(8, 4))
    assert (found.sign() * x.sign() >= 0).all()
    kept = found != 0
    assert ((found - x).abs()[kept] <= 0.05 * x.abs()[kept]).all()
