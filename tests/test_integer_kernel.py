"""The integer product against the simulation: within the rounding bound that its file derives, and by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from runtime_layers import BF16, FP32, inputs, quantized

from ptq.methods.rtn import round_to_nearest
from ptq.numerics.activations import fake_quantize_inputs, quantize_inputs, ranges, step_and_zero
from ptq.quantized import QuantizedTensor
from ptq.runtime.kernels.dispatch import select
from ptq.runtime.kernels.fp8 import FP8
from ptq.runtime.kernels.integer import INTEGER, _float_product, _product
from ptq.runtime.kernels.kernel import KernelQuery
from ptq.runtime.linear import QuantLinear
from ptq.scheme import parse_scheme

U = 2.0**-24
SCHEMES = ["w8a8", "w8a8-atensor", "w8a8-azp", "w8a8-asym", "w8a8-asym-azp-atensor", "w8a8-astatic"]
SCHEMES += ["w8a8-astatic-azp-asym", "w6a6", "w4a8", "w4a4", "w3a4-asym-azp", "w8a8-wtensor"]


def calibrated(q: QuantizedTensor, x: torch.Tensor) -> QuantizedTensor:
    """With the static grid of x where the scheme has one."""
    grid = q.scheme.inputs
    if grid.dynamic:
        return q
    scale, zero = step_and_zero(*ranges(x, grid), grid)
    parts = {"input_scale": scale.view(-1)} | ({} if zero is None else {"input_zero": zero.view(-1)})
    return replace(q, parts=parts)


@pytest.mark.parametrize("columns", [7, 1024, 3000])
def test_products_of_bytes_by_floats_are_exact(columns):
    """Also of the largest bytes, whose sums float32 just holds."""
    generator = torch.Generator().manual_seed(columns)
    codes, weight = (torch.randint(-128, 128, (rows, columns), generator=generator).to(torch.int8) for rows in (40, 9))
    codes[0], weight[0] = -128, -128
    expected = (codes.long() @ weight.long().T).int()
    assert torch.equal(_float_product(codes, weight), expected) and torch.equal(_product(codes, weight), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("out", "width", "tokens"), [(16, 128, 17), (7, 50, 3), (131, 277, 1)])
def test_integers_equal_the_simulation_within_the_bound(scheme, out, width, tokens):
    x = inputs(tokens, width, dtype=FP32)
    q = calibrated(quantized(scheme, out, width), x)
    bias = inputs(out, dtype=FP32)
    layer = QuantLinear(q, bias, FP32)
    assert (layer.kernel, layer.activations) == ("integer", "integer")
    simulated = QuantLinear(q, bias, FP32, kernel="reference")
    assert simulated.activations == "simulated"
    grid = [q.parts.get(name) for name in ("input_scale", "input_zero")]
    seen, weight = fake_quantize_inputs(x, q.scheme.inputs, *grid).double(), q.dequantize(torch.float64)
    bound = U * ((width + 6) * (seen.abs() @ weight.abs().T) + (seen @ weight.T + bias).abs())
    assert ((layer(x).double() - simulated(x).double()).abs() <= bound).all()
    assert ((layer(x).double() - (seen @ weight.T + bias)).abs() <= bound).all()


def test_the_sum_is_the_integer_sum():
    """Small whole numbers: every step is exact, so both paths give the same bits as the sum by hand."""
    scheme = parse_scheme("w8a8")
    codes = torch.tensor([[128 + 3, 128 - 2, 128 + 127], [0, 128, 129]], dtype=torch.uint8)
    q = QuantizedTensor(codes, torch.tensor([[0.5], [2.0]]), None, scheme)
    x = torch.tensor([[127.0, -4.0, 10.0], [0.0, 1.0, -127.0]])
    expected = torch.tensor([[0.5 * (381 + 8 + 1270), 2 * (-128 * 127 + 10.0)], [0.5 * (-2 - 127 * 127), -2 * 127.0]])
    for kernel in ("integer", "reference"):
        assert torch.equal(QuantLinear(q, None, FP32, kernel=kernel)(x), expected)


@pytest.mark.parametrize("smooth", ["rs16", "rs16n", "rs7", "rs16b4", "rs64"])
@pytest.mark.parametrize("scheme", ["w4a4", "w8a8-asym"])
@pytest.mark.parametrize(("out", "width", "tokens"), [(16, 64, 9), (9, 50, 5), (5, 33, 1)])
def test_runtime_smooth_in_integers_equals_the_simulation(scheme, smooth, out, width, tokens):
    """Oracle 4: the blocked product in the order of the maxima, against fake quantization without any reorder."""
    q = quantized(f"{scheme}-{smooth}", out, width)
    x = inputs(2, tokens, width, dtype=FP32)
    x[0, :, 3] *= 40
    layer = QuantLinear(q, None, FP32)
    assert layer.kernel == "integer"
    seen, weight = fake_quantize_inputs(x, q.scheme.inputs), q.dequantize(torch.float64)
    bound = U * (2 * width + 9) * (seen.double().abs() @ weight.abs().T)
    if "asym" in scheme:  # the correction by the offset cancels a part of the sum
        shift = (q.zero.double() - 128).abs() * q.scale.double()
        bound += U * (2 * width + 9) * 2 * seen.double().abs().sum(-1, keepdim=True) * shift.T
    assert ((layer(x).double() - seen.double() @ weight.T).abs() <= bound).all()
    assert ((layer(x) - QuantLinear(q, None, FP32, kernel="reference")(x)).double().abs() <= 2 * bound).all()


def test_switched_off_runtime_smooth_is_the_plain_product():
    """Oracle 2: with codes fine enough to be exact, smoothing in groups leaves x Wᵀ."""
    q = quantized("w8a8-rs16", 12, 48)
    x = torch.ones(3, 48) * torch.tensor([1.0, 0.5, -1.0])[:, None]
    x = x * 2.0 ** torch.arange(48).remainder(3)  # smoothed by 1, 2 or 4 in groups of equal maxima
    exact = x.double() @ q.dequantize(torch.float64).T
    assert ((QuantLinear(q, None, FP32)(x).double() - exact).abs() <= 1e-5 * exact.abs().max()).all()


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a4-rs8", "w8a8-azp"])
def test_shapes_dtypes_and_casts(scheme, dtype):
    q = quantized(scheme, 48, 96)
    layer, x = QuantLinear(q, inputs(48), dtype), inputs(2, 5, 96, dtype=dtype)
    y = layer(x)
    assert y.shape == (2, 5, 48) and y.dtype == dtype
    assert layer(x[0, 0]).shape == (48,) and layer(x[:0]).shape == (0, 5, 48)
    torch.testing.assert_close(layer(x[1]), y[1])
    assert layer(x.to(torch.float64)).dtype == torch.float64, "one packing serves every dtype"


def test_products_keep_the_dtype_of_float32_codes_for_outliers():
    q = quantized("w8a8", 8, 32)
    x = inputs(4, 32, dtype=FP32) * 1e4
    codes, step, _ = quantize_inputs(x, q.scheme.inputs)
    exact = (codes.double() @ (q.codes.double() - 128).T) * step.double() * q.scale.double().T
    torch.testing.assert_close(QuantLinear(q, None, FP32)(x).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("scheme", "width", "reason"),
    [
        ("w8afp8", 64, "inputs are floats"),
        ("w8a8-achannel", 64, "per channel of inputs"),
        ("w4a4-rs1", 64, "per channel does not leave"),
        ("w8a8-ag32", 64, "per group of inputs"),
        ("w4a8-g32", 64, "not groups of 32"),
        ("w8a8", 2**17, "may leave int32"),
    ],
)
def test_refusals_say_why(scheme, width, reason):
    query = KernelQuery.of(parse_scheme(scheme), (16, width), FP32, "cpu", False)
    assert select(query).name == "reference"
    assert reason in INTEGER.supports(query)


# --- FP8 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["fp8", "fp8-atensor", "fp8-astatic-wtensor"])
@pytest.mark.parametrize(("out", "width", "tokens"), [(16, 128, 17), (7, 50, 3), (33, 77, 1)])
def test_fp8_codes_multiply_to_the_simulation_within_the_bound(scheme, out, width, tokens):
    """Products of E4M3 are exact in float32, so the bound is that of the integers with a float sum on both sides."""
    x = inputs(2, tokens, width, dtype=FP32)
    q = calibrated(quantized_floats(scheme, out, width), x)
    bias = inputs(out, dtype=FP32)
    assert QuantLinear(q, bias, FP32).kernel == "reference", "slow on CPUs, so only where it is asked for"
    layer, simulated = (QuantLinear(q, bias, FP32, kernel=k) for k in ("fp8", "reference"))
    assert (layer.activations, simulated.activations) == ("fp8", "simulated")
    seen, weight = (
        fake_quantize_inputs(x, q.scheme.inputs, q.parts.get("input_scale")).double(),
        q.dequantize(torch.float64),
    )
    bound = U * (2 * (width + 6) * (seen.abs() @ weight.abs().T) + (seen @ weight.T + bias).abs())
    assert ((layer(x).double() - simulated(x).double()).abs() <= bound).all()


def quantized_floats(scheme: str, out: int, width: int) -> QuantizedTensor:
    w = torch.randn(out, width, generator=torch.Generator().manual_seed(out)) * 0.05
    return round_to_nearest(w, parse_scheme(scheme))


def test_fp8_refuses_integers():
    assert "E4M3 with E4M3" in FP8.supports(KernelQuery.of(parse_scheme("w8afp8"), (16, 64), FP32, "cpu", False))
    reasons = QuantLinear(quantized_floats("fp8", 16, 64), None, FP32).reasons
    assert "slow on cpu" in reasons["fp8"] and "floats" in reasons["integer"]
