"""The Triton program of Runtime Smooth in Triton's interpreter, against the integer kernel and the formula."""

from __future__ import annotations

import os

import pytest
import torch
from runtime_layers import FP32, inputs, quantized

os.environ.setdefault("TRITON_INTERPRET", "1")  # before the import of triton; there it needs no GPU
pytest.importorskip("triton", reason="needs the package triton")

from ptq.numerics.activations import fake_quantize_inputs, quantize_smoothed
from ptq.runtime.kernels.kernel import KernelQuery
from ptq.runtime.kernels.smoothed_triton import smoothed_product
from ptq.runtime.kernels.triton_smooth import TRITON_SMOOTH, pack_outputs
from ptq.runtime.linear import QuantLinear

DEVICE = torch.device("cpu")
SHAPES = [(1, 16, 32, 16), (16, 64, 64, 32), (3, 7, 50, 16), (17, 65, 96, 32), (5, 33, 130, 128), (20, 30, 40, 64)]


@pytest.mark.parametrize(("tokens", "out", "width", "group"), SHAPES)
def test_the_program_equals_the_sum_by_groups(tokens, out, width, group):
    """Every integer sum is exact; the float sum has the order of the groups."""
    generator = torch.Generator().manual_seed(tokens * width)
    codes = torch.randint(-8, 8, (tokens, width), generator=generator, dtype=torch.int8)
    weight = torch.randint(-8, 8, (out, width), generator=generator, dtype=torch.int8)
    order = torch.randperm(width, generator=generator)
    groups = -(-width // group)
    scales, steps, scale = (torch.rand(n, generator=generator) + 0.1 for n in (groups, tokens, out))
    expected = torch.zeros(tokens, out)
    for g in range(groups):
        columns = slice(g * group, (g + 1) * group)
        exact = codes[:, columns].double() @ weight[:, order[columns]].double().T
        expected += exact.float() * scales[g]
    found = smoothed_product(codes, pack_outputs(weight), order, scales, steps, scale, group)
    torch.testing.assert_close(found, expected * steps[:, None] * scale, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("scheme", ["w4a4-rs16", "w4a8-rs32", "w3a4-rs16n", "w4a4-rs16b4"])
def test_the_kernel_equals_the_integer_kernel(scheme):
    q = quantized(scheme, 21, 70)
    x, bias = inputs(9, 70, dtype=FP32), inputs(21)
    x[:, 5] *= 50
    query = KernelQuery.of(q.scheme, q.shape, FP32, "cpu", False)
    assert "not on cpu" in TRITON_SMOOTH.supports(query)
    packed = {**TRITON_SMOOTH.pack(q, FP32, DEVICE), "bias": bias}
    found = TRITON_SMOOTH.run(x, packed, query)
    expected = QuantLinear(q, bias, FP32, kernel="integer")(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_packing_keeps_every_code():
    codes = torch.randint(-8, 8, (5, 6), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    packed = pack_outputs(codes)
    assert packed.shape == (6, 3)
    found = torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)[:, :5].T.to(torch.int8) - 8
    assert torch.equal(found, codes)


def test_codes_in_order_are_those_of_the_simulation():
    quant = quantized("w4a4-rs16", 4, 50).scheme.inputs
    x = inputs(7, 50, dtype=FP32)
    codes, order, scales, step = quantize_smoothed(x, quant)
    back = torch.empty_like(x)
    back[:, order] = codes.float() * step * scales.repeat_interleave(16)[:50]
    torch.testing.assert_close(back, fake_quantize_inputs(x, quant))
