"""Schemes with quantized activations as text, and the grids of inputs (SmoothQuant, arXiv 2211.10438; OCP E4M3)."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from calibration.errors import ToolkitError
from ptq.activations import ActivationQuant, CacheQuant, RuntimeSmooth
from ptq.numerics.activations import fake_quantize_inputs, quantize_inputs, ranges, step_and_zero
from ptq.numerics.integers import fake_quantize
from ptq.scheme import Grouping, QuantScheme, TensorQuant, parse_scheme

CHANNEL = TensorQuant(8, Grouping("channel"))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- text ---------------------------------------------------------------------------------------------------------

SCHEMES = {
    "w8a8": QuantScheme(CHANNEL, ActivationQuant()),
    "w6a6": QuantScheme(TensorQuant(6, Grouping("channel"), "sym_signed"), ActivationQuant(6)),
    "w4a8": QuantScheme(TensorQuant(4, Grouping("channel"), "sym_signed"), ActivationQuant(8)),
    "w4a4": QuantScheme(TensorQuant(4, Grouping("channel"), "sym_signed"), ActivationQuant(4)),
    "w4a4kv4": QuantScheme(TensorQuant(4, Grouping("channel"), "sym_signed"), ActivationQuant(4), CacheQuant(4)),
    "w4a16kvfp8-g128": QuantScheme(
        TensorQuant(4, Grouping("group", 128), "sym_signed"), None, CacheQuant(8, "fp8-e4m3")
    ),
    "w8afp8-astatic": QuantScheme(CHANNEL, ActivationQuant(8, "fp8-e4m3", "tensor", dynamic=False)),
    "w8a8-atensor-wtensor": QuantScheme(TensorQuant(8, Grouping("tensor")), ActivationQuant(8, granularity="tensor")),
    "w8a8-achannel": QuantScheme(CHANNEL, ActivationQuant(8, granularity="channel", dynamic=False)),
    "w8a8-azp-atoken-asym": QuantScheme(
        TensorQuant(8, Grouping("channel"), "asym_zero_in"), ActivationQuant(symmetric=False)
    ),
    "w4a8-ag64-g32": QuantScheme(
        TensorQuant(4, Grouping("group", 32), "sym_signed"), ActivationQuant(8, granularity="group", group_size=64)
    ),
    "w4a4-rs128": QuantScheme(
        TensorQuant(4, Grouping("channel"), "sym_signed"), ActivationQuant(4, smooth=RuntimeSmooth())
    ),
    "w4a4-rs32nb64": QuantScheme(
        TensorQuant(4, Grouping("channel"), "sym_signed"), ActivationQuant(4, smooth=RuntimeSmooth(32, False, 64))
    ),
}


@pytest.mark.parametrize("text", SCHEMES)
def test_schemes_round_trip_through_their_name(text):
    scheme = parse_scheme(text)
    assert scheme == SCHEMES[text]
    assert parse_scheme(str(scheme)) == scheme and str(parse_scheme(str(scheme))) == str(scheme)
    assert QuantScheme.from_json(json.loads(json.dumps(scheme.to_json()))) == scheme


def test_names_are_canonical_and_suffixes_commute():
    assert str(parse_scheme("w8a8")) == "w8a8-gchannel-sym-atoken"
    assert str(parse_scheme("W4A4KV4")) == "w4a4kv4-gchannel-sym-atoken"
    assert str(parse_scheme("w4a4-rs64b8")) == "w4a4-gchannel-sym-atoken-rs64b8"
    assert parse_scheme("w8a8-astatic-wtensor-azp") == parse_scheme("w8a8-azp-wtensor-sym-astatic")
    assert str(parse_scheme("w4a16-wtensor")) == "w4a16-gtensor-sym"
    assert QuantScheme.from_json(parse_scheme("w4a16-wtensor").to_json()) == parse_scheme("w4a16-wtensor")


@pytest.mark.parametrize(
    ("text", "reason", "fix"),
    [
        ("w8a8-atokens", "unknown suffix 'atokens'", "did you mean 'atoken'?"),
        ("w8a5", "5-bit inputs", "4, 6, 8, fp8"),
        ("w4a16-atoken", "a16 leaves them alone", "w4a8"),
        ("w4a4kv3", "3-bit KV cache", "4, 8 or fp8"),
        ("w8a8-atoken-astatic", "exclude each other", "keep one"),
        ("w4a4-rs64-rs128", "exclude each other", "keep one"),
        ("w4a4-rs128-atensor", "Runtime Smooth goes with", "leave 'rs128' out"),
        ("w8afp8-azp", "floats have no zero points", "leave 'azp' out"),
        ("w4a4-rs0", "groups of 0", "positive"),
        ("w7a8", "7-bit weights", "w{2,3,4,5,6,8}"),
        ("w8a8-g48", "group 'g48'", "gchannel"),
    ],
)
def test_bad_schemes_name_what_is_wrong_and_a_fix(text, reason, fix):
    with pytest.raises(ToolkitError) as caught:
        parse_scheme(text)
    assert reason in caught.value.message and f"'{text}'" in caught.value.message and fix in caught.value.fix


# --- grids --------------------------------------------------------------------------------------------------------


def test_per_token_codes_by_hand():
    x = torch.tensor([[1.0, -1.75, 0.4, 0.0], [0.0, 0.0, 0.0, 0.0]])
    codes, scale, zero = quantize_inputs(x, ActivationQuant(4))
    assert zero is None and scale[0].item() == 0.25 and torch.isfinite(scale).all()
    assert codes.tolist() == [[4.0, -7.0, 2.0, 0.0], [0.0] * 4]


def test_zero_points_by_hand():
    x = torch.tensor([[0.0, 15.0, 7.4, 3.0], [-1.0, 2.0, 0.0, 0.5], [5.0, 20.0, 5.0, 5.0]])
    codes, scale, zero = quantize_inputs(x, ActivationQuant(4, symmetric=False))
    assert codes[0].tolist() == [-8.0, 7.0, -1.0, -5.0] and (scale[0], zero[0]) == (1.0, -8.0)
    assert scale[1].item() == pytest.approx(0.2) and zero[1].item() == -3.0
    assert scale[2].item() == pytest.approx(20 / 15), "the range is widened to hold 0"
    assert fake_quantize_inputs(x, ActivationQuant(4, symmetric=False))[1, 2] == 0, "zero is exact"


def test_e4m3_by_hand():
    """Values of E4M3 with the largest at 448: 448 = 1.75 * 2^8, the next below 416; the smallest subnormal is 2^-9."""
    x = torch.tensor([[448.0, 430.0, 433.0, 2.0**-9, 2.0**-10, -17.0]])
    found = fake_quantize_inputs(x, ActivationQuant(8, "fp8-e4m3"))
    assert found.tolist() == [[448.0, 416.0, 448.0, 2.0**-9, 0.0, -16.0]]
    assert fake_quantize_inputs(x * 2, ActivationQuant(8, "fp8-e4m3")).equal(found * 2), "the step follows the range"


@pytest.mark.parametrize("quant", [ActivationQuant(b, symmetric=s) for b in (4, 6, 8) for s in (True, False)])
@pytest.mark.parametrize("shared", ["token", "tensor", "group"])
def test_rounding_is_within_half_a_step_and_idempotent(quant, shared):
    quant = replace(quant, granularity=shared, group_size=16 if shared == "group" else None)
    x = random(3, 5, 48) * torch.rand(5, 1, generator=torch.Generator().manual_seed(1)) + 0.2
    once = fake_quantize_inputs(x, quant)
    _, scale, _ = quantize_inputs(x, quant)
    step = scale.expand(3, 5, 3, 16).reshape(x.shape) if shared == "group" else scale.expand_as(x)
    assert ((once - x).abs() <= step * (0.5 if quant.symmetric else 1.0) * (1 + 1e-5)).all()
    again = fake_quantize_inputs(once, quant)
    assert (again - once).abs().max() <= 1e-5 * once.abs().max()


def test_granularities_share_what_they_say():
    x = random(2, 3, 32)
    x[0, 0, 0] = 50.0
    token, tensor, group = (
        fake_quantize_inputs(x, ActivationQuant(8, granularity=g, group_size=s))
        for g, s in (("token", None), ("tensor", None), ("group", 8))
    )
    error = [(v - x).abs() for v in (token, tensor, group)]
    assert error[0][1].max() < 0.02 < error[1][1].max(), "an outlier spoils the tensor's grid, not another token's"
    assert error[2][0, 0, 8:].max() < 0.02 < error[0][0, 0, 8:].max(), "nor another group's of its own token"


def test_static_grids_use_the_calibrated_range_and_clamp():
    quant = ActivationQuant(8, granularity="tensor", dynamic=False)
    scale, zero = step_and_zero(torch.tensor([-1.0]), torch.tensor([1.0]), quant)
    x = torch.tensor([[0.5, 10.0, -10.0]])
    codes, _, _ = quantize_inputs(x, quant, scale, zero)
    assert codes.tolist() == [[64.0, 127.0, -128.0]], "an input of ten times the range has the last code"
    channel = ActivationQuant(8, granularity="channel", dynamic=False)
    y = random(7, 6) * torch.tensor([1.0, 10.0, 0.1, 1.0, 100.0, 0.0])
    scale, zero = step_and_zero(*ranges(y, channel), channel)
    assert scale.shape == (6,) and (quantize_inputs(y, channel, scale)[0].abs() <= 127).all()
    assert ((fake_quantize_inputs(y, channel, scale) - y).abs() <= 0.5001 * scale).all()


def test_dtype_shape_and_empty_inputs_are_kept():
    x = random(2, 3, 32).to(torch.bfloat16)
    for text in ("w8a8", "w8a8-ag16", "w4a4-rs8", "w8a8-atensor"):
        quant = parse_scheme(text).inputs
        assert fake_quantize_inputs(x, quant).shape == x.shape and fake_quantize_inputs(x, quant).dtype == x.dtype
        assert fake_quantize_inputs(x[:0], quant).shape == (0, 3, 32)


def test_a_step_for_the_whole_weight_is_the_largest_of_its_rows():
    w = random(6, 32) * torch.arange(1, 7)[:, None]
    found = fake_quantize(w, TensorQuant(4, Grouping("tensor"), "sym_full"), exact_scale=True)
    step = w.abs().max() / 7
    assert torch.allclose(found, (w / step).round() * step)
