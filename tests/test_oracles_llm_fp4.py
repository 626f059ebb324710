"""The oracles of LLM-FP4 and of the hardware formats that share its values: numerics on tiny tensors."""

from __future__ import annotations

import pytest
import torch

from ptq.float_formats import E2M1, FloatFormat, float_formats
from ptq.methods.rtn import round_to_nearest
from ptq.numerics import floats
from ptq.numerics.gptq import gptq_round
from ptq.numerics.integers import fake_quantize as integer_fake_quantize
from ptq.numerics.objective import output_energy
from ptq.scheme import FLOAT_BITS, Grouping, QuantScheme, TensorQuant, parse_scheme

torch.set_num_threads(1)
FORMATS = [number for bits in FLOAT_BITS for number in float_formats(bits)]
EVERY = pytest.mark.parametrize("number", FORMATS, ids=str)
WHOLE = Grouping("channel")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def published(x: torch.Tensor, number: FloatFormat, b: float) -> torch.Tensor:
    """Q(x; E, M, b) as the paper has it, one value at a time."""
    e, m = number.exponent_bits, number.mantissa_bits
    top = (2 - 2.0**-m) * 2.0 ** (2**e - 1 - b)
    found = []
    for value in x.clamp(-top, top).tolist():
        p = 1 if value == 0 else max(int(torch.floor(torch.log2(torch.tensor(abs(value), dtype=x.dtype)) + b)), 1)
        step = 2.0 ** (p - m - b)
        found.append(step * round(value / step))  # Python rounds ties to even
    return torch.tensor(found, dtype=x.dtype)


@pytest.mark.parametrize(
    ("number", "positive"),
    [
        (FloatFormat(2, 1), [0, 0.5, 1, 1.5, 2, 3, 4, 6]),
        (FloatFormat(1, 2), [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]),
        (FloatFormat(3, 0), [0, 1, 2, 4, 8, 16, 32, 64]),
    ],
    ids=str,
)
def test_oracle_1_code_tables(number, positive):
    """1. Enumerating Q on a fine grid yields exactly the listed code sets (bias 1), with signs in the top bit."""
    grid = torch.linspace(-80, 80, 64001, dtype=torch.float64)
    expected = sorted({*positive, *(-v for v in positive)})
    assert floats.nearest_with_bias(grid, number, 1.0).unique().tolist() == expected
    scale = 2.0 ** (number.bias - 1)  # the format's own bias is 1 but for E3M0
    assert (floats.table(number) * scale).tolist() == [*positive, *(-v for v in positive)]
    assert number.largest * scale == positive[-1]


@EVERY
def test_oracle_1_every_format(number):
    """1. Q is idempotent, odd, monotone, and equals the published formula; codes and levels are inverse."""
    x = torch.cat((randn(2000) * number.largest / 3, torch.tensor([0.0, number.largest, 2 * number.largest])))
    q = floats.nearest(x, number)
    assert torch.equal(floats.nearest(q, number), q) and torch.equal(floats.nearest(-x, number), -q)
    assert bool((floats.nearest(x.sort().values, number).diff() >= 0).all())
    assert torch.equal(q, published(x, number, number.bias))
    table = floats.table(number)
    assert set(q.tolist()) <= set(table.tolist()) and len(table) == 2**number.bits
    nearest = (x.clamp(-number.largest, number.largest)[:, None] - table.double()).abs().amin(dim=1)
    assert torch.equal((q - x.clamp(-number.largest, number.largest)).abs(), nearest)
    code = floats.codes(table, number)
    expected = torch.arange(2**number.bits, dtype=torch.uint8)
    expected[2 ** (number.bits - 1)] = 0  # the second zero is never written
    assert torch.equal(code, expected) and torch.equal(floats.levels_of(code, number), table)
    assert torch.equal(floats.levels_of(floats.codes(q, number), number), q.float())


def test_oracle_1_ties_of_e2m1():
    """1. Ties go to the even code, and beyond 6 is 6."""
    ties = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5: 4, 6.01: 6, 1e9: 6}
    for dtype in (torch.float32, torch.float64):
        found = floats.nearest(torch.tensor(list(ties), dtype=dtype), E2M1)
        assert found.tolist() == list(ties.values())


@EVERY
def test_oracle_2_bias_and_maximum(number):
    """2. b(maxval(b)) = b; Q(2^k x; b - k) = 2^k Q(x; b), to the bit for whole k."""
    e, m = number.exponent_bits, number.mantissa_bits
    for b in (-3.6875, 0.0, 1.0, 5.25):
        maximum = torch.tensor((2 - 2.0**-m) * 2.0 ** (2**e - 1 - b), dtype=torch.float64)
        assert float(floats.bias_of(maximum, number)) == pytest.approx(b, abs=1e-9)
        x = randn(500) * maximum / 3
        q = floats.nearest_with_bias(x, number, b)
        for k in (-4, 1, 7):
            assert torch.equal(floats.nearest_with_bias(torch.ldexp(x, torch.tensor(k)), number, b - k), 2.0**k * q)
        other = floats.nearest_with_bias(2**0.3 * x, number, b - 0.3)
        assert ((other - 2**0.3 * q).abs() <= 1e-6 * other.abs()).float().mean() > 0.99  # but for values at ties


@pytest.mark.parametrize("bits", FLOAT_BITS)
def test_oracle_3_one_exponent_bit_is_an_integer_grid(bits):
    """3. E1My equals symmetric integer quantization with step 2^(-b) 2^(1-M) and 2^(M+1) - 1 positive levels."""
    number = FloatFormat(1, bits - 2)
    w, m = randn(16, 64), number.mantissa_bits
    maximum = w.abs().amax(dim=1, keepdim=True)
    step = torch.exp2(-floats.bias_of(maximum, number)) * 2.0 ** (1 - m)
    expected = (w / step).round().clamp(-(2 ** (m + 1) - 1), 2 ** (m + 1) - 1) * step
    found = floats.nearest_with_bias(w, number, floats.bias_of(maximum, number))
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-12)
    quant = TensorQuant(bits, WHOLE, "sym_restricted")
    floated = floats.fake_quantize(w, TensorQuant.of_floats(number, WHOLE))
    assert torch.allclose(floated, integer_fake_quantize(w, quant), atol=float(step.max()) / 64)


def mxfp4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q = round_to_nearest(w.float(), parse_scheme("mxfp4"))
    return q.codes, q.scale


def test_oracle_7_mxfp4():
    """7. Values are 2^k times codes; scaling by 2^t shifts k by t and keeps codes; amax 6.5 is clipped to 6."""
    w = randn(8, 64).float()
    codes, scale = mxfp4(w)
    exponents = torch.log2(scale)
    assert torch.equal(exponents, exponents.round()) and scale.shape == (8, 2)
    amax = w.view(8, 2, 32).abs().amax(dim=2)
    assert torch.equal(exponents, torch.floor(torch.log2(amax)) - 2)
    shifted, larger = mxfp4(w * 2.0**5)
    assert torch.equal(shifted, codes) and torch.equal(larger, scale * 2.0**5)
    w[0, :32] = 0
    w[0, 0], w[0, 40] = 6.5, -13.0
    q = round_to_nearest(w, parse_scheme("mxfp4"))
    assert q.scale[0].tolist() == [1, 2] and q.dequantize()[0, 0] == 6 and q.dequantize()[0, 40] == -12
    zero = round_to_nearest(torch.zeros(2, 32), parse_scheme("mxfp4"))
    assert (
        zero.scale.unique().tolist() == [2.0**-127] and not bool(zero.codes.any()) and not bool(zero.dequantize().any())
    )
    assert parse_scheme("mxfp4").bits_per_weight(128, 128) == 4.25


def test_oracle_8_nvfp4():
    """8. The block of the tensor's maximum has scale 448; zero blocks decode to 0; representable tensors round trip;
    both conventions of the global scale decode to the same tensor."""
    w = randn(8, 64).float()
    w[3, 16:32] = 0
    q = round_to_nearest(w, parse_scheme("nvfp4"))
    row, column = divmod(int(w.abs().argmax()), 64)
    assert q.scale[row, column // 16] == 448 and q.scale.shape == (8, 4)
    assert float(q.global_scale) == pytest.approx(6 * 448 / float(w.abs().max()))
    assert q.scale[3, 1] == 2.0**-9 and not bool(q.dequantize()[3, 16:32].any())
    assert torch.equal(q.scale.to(torch.float8_e4m3fn).float(), q.scale)
    levels = floats.levels_of(q.codes, E2M1).view(8, 4, 16)
    multiplied = levels * q.scale.unsqueeze(-1) * (1 / q.global_scale)
    assert torch.allclose(multiplied.view(8, 64), q.dequantize(), rtol=1e-6)
    exact = levels * q.scale.unsqueeze(-1) / 4096
    exact[..., 0] = 6 * q.scale / 4096  # every block has its largest level
    again = round_to_nearest(exact.view(8, 64), parse_scheme("nvfp4"))
    assert torch.allclose(again.dequantize(), exact.view(8, 64), rtol=1e-6)
    assert float(round_to_nearest(torch.zeros(2, 32), parse_scheme("nvfp4")).global_scale) == 1
    assert parse_scheme("nvfp4").bits_per_weight(128, 128) == pytest.approx(4.5 + 32 / 128**2)


def test_oracle_9_nvfp4_is_finer_than_mxfp4():
    """9. MSE(NVFP4) <= MSE(MXFP4) on Gaussian data."""
    w = randn(64, 256).float()
    errors = [
        float((round_to_nearest(w, parse_scheme(text)).dequantize() - w).square().mean()) for text in ("nvfp4", "mxfp4")
    ]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize(
    "text", ["mxfp4", "nvfp4", "fp4-e2m1-g32", "fp4-e3m0-gchannel", "fp6-e3m2-g64", "fp8-e4m3-ic32"]
)
@pytest.mark.parametrize(
    "settings", [{}, {"order": "activation", "static_groups": True}], ids=["natural", "activation"]
)
def test_gptq_on_float_grids(text, settings):
    """With H = I the column loop is rounding to nearest on the same grids; on correlated inputs it beats it."""
    scheme = parse_scheme(text)
    w, x = randn(64, 128).float(), randn(512, 128, seed=1)
    rtn = round_to_nearest(w, scheme)
    plain = gptq_round(w, torch.eye(128), scheme.weights, **settings)
    assert torch.equal(plain.codes, rtn.codes) and torch.equal(plain.scale, rtn.scale)
    gram = (x @ randn(128, 128, seed=2)).float()
    gram = gram.T @ gram
    rounded = gptq_round(w, gram, scheme.weights, **settings)
    codes, scale, zero = rounded.rows(0, 64, scheme.weights)
    assert zero is None
    q = type(rtn)(codes, scale, None, scheme, global_scale=rtn.global_scale)
    error, baseline = (float(output_energy(v.dequantize() - w, gram)) for v in (q, rtn))
    assert error < 0.8 * baseline


@pytest.mark.parametrize(
    "text", ["mxfp4", "nvfp4", "fp4-e2m1-g128", "fp5-e2m2-g64", "fp8-e5m2-gchannel", "fp6-e3m2-ic32"]
)
def test_names_round_trip(text):
    scheme = parse_scheme(text)
    assert str(scheme) == text and parse_scheme(str(scheme)) == scheme
    assert QuantScheme.from_json(scheme.to_json()) == scheme
    assert str(parse_scheme("fp4-e1m2")) == "fp4-e1m2-g128"
