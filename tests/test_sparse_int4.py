"""Sparse products with 4-bit codes, against the dequantized weight."""

from __future__ import annotations

import pytest
import torch
from runtime_layers import quantized
from test_sparse_kernels import BF16, CPU_FLOAT, FP32, assert_close, draw, mask_for, masked, needs_native

from sparsity.kernels import native
from sparsity.kernels.build import cpu_level, library
from sparsity.kernels.int4 import Int4Rows, int4_problem
from sparsity.kernels.kernel import Mask
from sparsity.kernels.native import NATIVE
from sparsity.kernels.reference import REFERENCE

kernels = pytest.mark.parametrize("kernel", [REFERENCE, pytest.param(NATIVE, marks=needs_native)], ids=lambda k: k.name)
CASES = [("w4a16-g32-sym", 5, 64), ("w4a16-g64-asym", 130, 192), ("w3a16-g128-asym", 257, 384)]
CASES += [("w4a16-g128-sym", 2200, 256), ("w4a16-gchannel-asym", 65, 130), ("w2a16-g32-asym", 64, 160)]
DENSITIES = [0.0, 0.03, 0.5, 1.0]


def rows(scheme: str, n_out: int, n_in: int, mode) -> tuple[Int4Rows, torch.Tensor]:
    """Codes by rows, and the weight ``[out, in]`` that they stand for, in float64."""
    q = quantized(scheme, n_out, n_in)
    zero = q.zero if q.zero is not None else torch.full_like(q.scale, q.zero_point, dtype=torch.uint8)
    zero = None if int(zero.min()) == int(zero.max()) == 8 else zero
    return Int4Rows.pack(q.codes, q.scale, zero, mode), q.dequantize(torch.float64)


def check_input(kernel, weight: Int4Rows, w: torch.Tensor, tokens: int, density: float, dtype, bias: bool) -> None:
    x, b = draw(tokens, weight.lines, dtype=dtype), draw(weight.width, seed=2) if bias else None
    mask = mask_for(x, density)
    z = masked(x, mask)
    exact = z @ w.T + (0 if b is None else b.double())
    # codes and zeros are summed apart: sums are of the size of 15 steps, not of the weights
    scale = weight.scale.double().repeat_interleave(weight.group, dim=0)
    sizes = z.abs() @ (15 * scale.abs()) + (0 if b is None else b.double().abs())
    assert_close(kernel.input_product(x, weight, mask, b), exact, sizes, rounded=torch.zeros(()))


def check_output(kernel, weight: Int4Rows, w: torch.Tensor, tokens: int, density: float, dtype, bias: bool) -> None:
    x, gate = draw(tokens, weight.width, dtype=dtype), draw(tokens, weight.lines, dtype=dtype, seed=3)
    b = draw(weight.lines, seed=2) if bias else None
    mask = mask_for(gate, density)
    g = masked(gate, mask)
    scale = weight.scale.double().repeat_interleave(weight.group, dim=1)
    dots = x.double() @ w.T + (0 if b is None else b.double())
    sizes = (x.double().abs() @ (15 * scale.abs()).T + (0 if b is None else b.double().abs())) * g.abs()
    h = kernel.output_product(x, weight, gate, mask, b)
    assert_close(h, g * dots, sizes, rounded=2 * (x.double().abs() @ w.abs().T) * g.abs())  # the reference rounds rows
    assert (h[g == 0] == 0).all()


@pytest.mark.parametrize("mode", ["input", "output"])
@pytest.mark.parametrize(("scheme", "n_out", "n_in"), CASES)
def test_packing_and_dequantizing_is_exact(scheme, n_out, n_in, mode):
    weight, w = rows(scheme, n_out, n_in, mode)
    lines = w.T if mode == "input" else w
    assert torch.equal(weight.dequantize(), lines.float())
    some = torch.tensor([0, len(lines) - 1, 3])
    assert torch.equal(weight.dequantize(some), lines.float()[some])
    for dtype in (FP32, BF16):
        for kernel in [REFERENCE] + [NATIVE] * (NATIVE.supports(CPU_FLOAT) is None):
            assert torch.equal(kernel.dequantize(weight, dtype), lines.float().to(dtype))


@pytest.mark.parametrize("mode", ["input", "output"])
def test_the_layout_is_the_one_that_is_written_down(mode):
    codes = torch.randint(0, 16, (128, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    weight = Int4Rows.pack(codes, torch.ones(128, 2), None, mode)
    stored = codes.T if mode == "input" else codes
    words = weight.codes.view(torch.int32).view(len(stored), -1, 16)
    for column in (0, 1, 15, 16, 100, 127):
        word, nibble = words[:, 0, column % 16], column // 16
        assert torch.equal(word >> 4 * nibble & 15, stored[:, column].int())


@kernels
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize(("scheme", "n_out", "n_in"), CASES)
def test_products_equal_those_of_the_dequantized_weight(kernel, scheme, n_out, n_in, dtype):
    for check, mode in ((check_input, "input"), (check_output, "output")):
        weight, w = rows(scheme, n_out, n_in, mode)
        for density in DENSITIES:
            for tokens in (1, 3):
                check(kernel, weight, w, tokens, density, dtype, bias=tokens == 3)


@needs_native
@pytest.mark.parametrize("level", ["AVX2", "DEFAULT"])
def test_every_instruction_set_computes_the_same(level, monkeypatch):
    if level == "AVX2" and cpu_level() == "DEFAULT":
        pytest.skip("this processor has no AVX2")
    monkeypatch.setattr(native, "library", lambda: library(level))
    for scheme, n_out, n_in in CASES:
        for check, mode in ((check_input, "input"), (check_output, "output")):
            weight, w = rows(scheme, n_out, n_in, mode)
            check(NATIVE, weight, w, 2, 0.5, FP32, bias=True)
            assert torch.equal(NATIVE.dequantize(weight, BF16), REFERENCE.dequantize(weight, BF16))


@needs_native
def test_threads_and_an_empty_mask_change_no_bit():
    (weight, _), threads, x = rows("w4a16-g64-asym", 5000, 128, "input"), torch.get_num_threads(), draw(2, 128)
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results += [NATIVE.input_product(x, weight, mask, None) for mask in (None, Mask(torch.tensor([0.0])))]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(("n_in", "group"), [(128, 48), (512, 192), (100, 30)])
def test_groups_that_the_layout_does_not_take_have_a_reason(n_in, group):
    assert str(group) in str(int4_problem(n_in, group))
    assert int4_problem(384, 128) is int4_problem(96, 32) is int4_problem(130, 130) is None
