"""GGUF's blocks and K-quants: bytes against the ``gguf`` package, and the search for grids."""

from __future__ import annotations

from dataclasses import replace

import gguf
import pytest
import torch

from ptq.formats import gguf_blocks, gguf_file
from ptq.methods.rtn import round_to_nearest
from ptq.numerics.superblock_fit import integers, refit, sweep
from ptq.numerics.superblock_gptq import gptq_round_super
from ptq.numerics.superblocks import SuperGrid, choose_grid, dequantize, fake_quantize, nearest_codes
from ptq.quantized import QuantizedTensor
from ptq.scheme import K_QUANTS, parse_scheme
from ptq.scheme_names import GGUF_BLOCKS

BYTES = {"q2_k": 84, "q3_k": 110, "q4_k": 144, "q5_k": 176, "q6_k": 210}


def weights(columns: int = 512) -> torch.Tensor:
    """Rows of different size, with zeros, one sign only, and an outlier."""
    w = torch.randn(12, columns, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 12)[:, None]
    w[1], w[2, :256], w[3], w[4] = 0, 0, w[3].abs(), -w[4].abs()
    w[5, 7] = 50
    return w


@pytest.mark.parametrize("name", [*GGUF_BLOCKS, *K_QUANTS, "mxfp4", "w4a16-g128-sym", "w5a16-gchannel-asym"])
def test_bytes_mean_what_the_gguf_package_says(name):
    scheme = parse_scheme(name)
    q = round_to_nearest(weights(), scheme)
    octets, kind = gguf_file.blocks_of(q), gguf_blocks.type_of(scheme)
    values = torch.from_numpy(gguf.quants.dequantize(octets.numpy(), gguf.GGMLQuantizationType[kind]))
    if kind in ("Q4_1", "Q5_1"):  # the minimum is rounded to float16
        step = q.step.amax(dim=1, keepdim=True)
        assert ((values - q.dequantize()).abs() <= gguf_file.TOLERANCE * step).all()
    else:
        assert torch.equal(values, q.dequantize())
    back = gguf_file.from_blocks(octets, scheme, q.shape)
    for field in ("codes", "scale", "zero", "super_scale", "super_min"):
        before, after = getattr(q, field), getattr(back, field)
        assert (before is None and after is None) or torch.equal(before, after), field


@pytest.mark.parametrize("name", K_QUANTS)
def test_k_quants_have_the_bytes_of_llama_cpp(name):
    scheme = parse_scheme(name)
    assert str(scheme) == name
    assert parse_scheme(str(scheme)) == scheme
    assert scheme.bits_per_weight(4, 256) * 256 / 8 == BYTES[name]
    assert gguf_file.blocks_of(round_to_nearest(weights(256), scheme)).shape[1] == BYTES[name]


@pytest.mark.parametrize("name", K_QUANTS)
def test_the_search_beats_the_ranges_and_follows_importance(name):
    w, quant = weights(), K_QUANTS[name]
    importance = torch.where(torch.arange(512) % 4 == 0, 100.0, 1.0)

    def error(grid):
        step, zero = grid.step.unsqueeze(-1), grid.zero(quant).unsqueeze(-1)
        codes = nearest_codes(w.unflatten(1, (grid.scale.shape[1], -1)), step, zero, quant).flatten(1)
        squared = (dequantize(codes, grid, quant) - w).square() / w.square().mean(dim=1, keepdim=True).clamp(min=1e-9)
        return float(squared.sum()), float((squared * importance).sum())

    plain, weighed = error(choose_grid(w, quant)), error(choose_grid(w, quant, importance))
    ranges = (fake_quantize(w, quant) - w).square() / w.square().mean(dim=1, keepdim=True).clamp(min=1e-9)
    assert plain[0] < 0.9 * float(ranges.sum())
    assert weighed[1] < plain[1]


@pytest.mark.parametrize("name", K_QUANTS)
def test_gptq_rounds_on_the_grid_of_k_quants(name):
    scheme, generator = parse_scheme(name), torch.Generator().manual_seed(1)
    w = torch.randn(32, 256, generator=generator)
    x = torch.randn(512, 256, generator=generator) @ torch.randn(256, 256, generator=generator)
    gram = x.T @ x

    def loss(q):
        d = q.dequantize() - w
        return float(((d @ gram) * d).sum())

    for damage in (1.0, 1.02):  # super-scales that fit, and some that do not
        grid = choose_grid(w, scheme.weights, gram.diagonal())
        grid = replace(grid, super_scale=(grid.super_scale * damage).half().float())
        step, zero = grid.step.unsqueeze(-1), grid.zero(scheme.weights).unsqueeze(-1)
        codes = nearest_codes(w.unflatten(1, (grid.scale.shape[1], -1)), step, zero, scheme.weights).flatten(1)
        values = [dequantize(codes, g, scheme.weights) for g in (grid, refit(w, gram, codes, grid, scheme.weights))]
        before, after = (float((((v - w) @ gram) * (v - w)).sum()) for v in values)
        moved = dequantize(codes, integers(w, gram, codes, grid, scheme.weights), scheme.weights) - w
        assert float(((moved @ gram) * moved).sum()) < (0.97 if scheme.weights.bits < 4 else 1.0) * before
        better = sweep(w, gram, codes, grid, scheme.weights)
        d = dequantize(better, grid, scheme.weights) - w
        assert float(((d @ gram) * d).sum()) < 0.95 * before
        assert after < (1.0 if damage == 1.0 else 0.99) * before
    result = gptq_round_super(w, gram, scheme.weights, order="group")
    codes, scale, zero = result.rows(0, 32, scheme.weights)
    q = QuantizedTensor(codes, scale, zero, scheme, None, {}, None, *result.super_rows(0, 32))
    assert loss(q) < 0.8 * loss(round_to_nearest(w, scheme, importance=gram.diagonal()))
    assert torch.equal(gguf_file.from_blocks(gguf_file.blocks_of(q), scheme, (32, 256)).dequantize(), q.dequantize())


def test_columns_without_data_count_as_zero():
    """For the grid and for the codes: what stood there changes nothing, and what is left there is nearly nothing."""
    w, quant = weights(256), K_QUANTS["q2_k"]
    x = torch.randn(600, 256, generator=torch.Generator().manual_seed(4))
    x[:, ::8] = 0.0
    loud = w.clone()
    loud[:, ::8] *= 100
    first, second = (gptq_round_super(v, x.T @ x, quant) for v in (w, loud))
    assert torch.equal(first.codes, second.codes) and torch.equal(first.super_scale, second.super_scale)
    grid = SuperGrid(second.scale, second.zero, *second.super_rows(0, len(w)))
    left = dequantize(second.codes, grid, quant)[:, ::8].abs()
    assert (left <= grid.step.repeat_interleave(16, dim=1)[:, ::8]).all()
