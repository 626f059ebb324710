"""The oracles of RepQuant's reparameterization (arXiv 2402.05628, section A of RepQ-ViT), and the pass from plan to
runtime."""

from __future__ import annotations

import json

import pytest
import torch
from command import done, refused, text_file, tiny
from safetensors.torch import load_file, save_file
from test_oracles_awq import outputs, randn
from test_statistics import inputs_of, new_context, open_block
from tiny_runs import logits, plain_model, quantize, tiny_checkpoint

from calibration.record import read_record
from calibration.walk.ranges import Extremes
from ptq.activations import ActivationQuant
from ptq.methods import RepQuant
from ptq.numerics.activations import encode, step_and_zero
from ptq.numerics.repquant import BOUND, FRACTIONS, channel_factors, clipping_errors, tensor_grid
from ptq.runtime.load import load_model
from ptq.scheme import parse_scheme

torch.set_num_threads(1)
W8A8 = parse_scheme("w8a8")
SMALL = ("--samples", "4", "--seq-len", "24")


def grid(bits: int = 8, symmetric: bool = True) -> ActivationQuant:
    return ActivationQuant(bits, "int", "tensor", dynamic=False, symmetric=symmetric)


def channels(width: int = 48, tokens: int = 300) -> torch.Tensor:
    """x ``[tokens, width]`` float32 whose channels differ in size and lie off zero."""
    return (randn(tokens, width, seed=1) * randn(width, seed=2).exp() + 2 * randn(width, seed=3)).float()


def reparameterized(family, folder, step, scheme=W8A8, dtype=torch.float32):
    segment, states = open_block(family, folder, scheme=scheme, dtype=dtype)
    expected = outputs(segment, states)
    step.apply(segment, new_context(segment, states, (Extremes,)))
    return segment, states, expected


@torch.no_grad()
@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neox", "bloom", "falcon-7b", "llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("step", [RepQuant(), RepQuant("minmax", shift=True, down=True, values=True)], ids=str)
def test_oracle_1_the_block_is_unchanged(family, step, tmp_path):
    """1. Step A without quantizers: norm + linear output unchanged to 1e-5 (LayerNorm with and without bias; RMSNorm
    with r2 = 0; Gemma, whose norms store g - 1)."""
    segment, states, expected = reparameterized(family, tmp_path, step)
    assert (outputs(segment, states) - expected).abs().max() <= 1e-5 * expected.abs().max() and segment.edits == 0
    found = set(step.calibrated(segment.spec)) & set(segment.schemes)
    assert found and {n for n, s in segment.schemes.items() if not s.inputs.dynamic} == found == set(segment.parts)
    shifted = {n for n in found if "input_zero" in segment.parts[n]}
    fed = {n for g in segment.spec.balance if g.kind == "norm" for n in g.consumers} & found
    assert shifted == (fed if step.shift and segment.architecture.norm == "layer" else set())
    assert all(segment.schemes[n].inputs.symmetric == (n not in shifted) for n in found)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_oracle_2_codes_are_those_of_the_channels(bits, symmetric):
    """2. With integer z~: codes of x' under (s~, z~) equal codes of x under (s_c, z_c), including clipping."""
    x, quant = channels(), grid(bits, symmetric)
    low, high = 0.7 * x.amin(0), 0.7 * x.amax(0)
    s, z = step_and_zero(low, high, quant)
    expected = encode(x, s, z, quant)
    assert (expected == quant.bounds[1]).any() and (expected == quant.bounds[0]).any(), "something is clipped"
    r1 = channel_factors(low, high, quant)
    step, zeros, zero = tensor_grid(low / r1, high / r1, quant)
    assert torch.allclose(r1 * step, s, rtol=1e-5) and (r1 > 1 / BOUND).all() and (r1 < BOUND).all()
    moved = x / r1 + (0 if zeros is None else (zeros - zero) * step)
    if not symmetric:
        assert torch.equal(zeros, z) and zero == zero.round() and abs(float(zero - z.mean())) <= 0.5
    assert (encode(moved, step, zero, quant) != expected).float().mean() < 1e-3  # ties in float32


@torch.no_grad()
def test_oracle_2_in_the_block(tmp_path):
    """The same through norm, bias and parts of an OPT block."""
    step = RepQuant("minmax", shift=True)
    segment, states = open_block("opt", tmp_path, scheme=W8A8)
    before = {n: inputs_of(segment, states, n).float() for n in ("self_attn.q_proj", "fc1")}
    step.apply(segment, new_context(segment, states, (Extremes,)))
    for name, x in before.items():
        quant, parts = segment.schemes[name].inputs, segment.parts[name]
        expected = encode(x, *step_and_zero(x.amin(0), x.amax(0), quant), quant)
        after = inputs_of(segment, states, name).float()
        found = encode(after, parts["input_scale"], parts["input_zero"], quant)
        assert (found != expected).float().mean() < 0.01 and (found - expected).abs().max() <= 1


@pytest.mark.parametrize("symmetric", [True, False])
def test_oracle_3_equal_channels_stay(symmetric):
    """3. All channels equal: r1 = 1, r2 = 0, nothing changes."""
    low, high, quant = torch.full((16,), -1.5), torch.full((16,), 127 / 64), grid(8, symmetric)
    r1 = channel_factors(low, high, quant)
    step, zeros, zero = tensor_grid(low / r1, high / r1, quant)
    assert torch.allclose(r1, torch.ones(16), atol=2**-7) and torch.allclose(
        step * r1, step_and_zero(low, high, quant)[0]
    )
    assert zeros is None or (zeros == zero).all()


def test_factors_are_bounded_and_no_range_is_cut():
    """A dead channel and one that is a thousand times larger than all others."""
    high = torch.cat([torch.ones(2000), torch.tensor([0.0, 1000.0])])
    r1 = channel_factors(-high, high, grid())
    assert r1.max() == BOUND and r1.min() == 1 / BOUND and torch.isfinite(r1).all()
    step, *_ = tensor_grid(-high / r1, high / r1, grid())
    assert (high / r1 <= 127 * step * (1 + 1e-5)).all()
    usual = channel_factors(-high[:2000], high[:2000], grid())
    assert (usual > 0.98).all() and (usual < 1.02).all()


def test_the_fraction_of_least_error_is_that_of_a_slow_search():
    x = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0)) ** torch.tensor([1.0, 3.0, 5.0])
    low, high = x.amin(0), x.amax(0)
    errors = clipping_errors(x, low, high, grid(4))
    slow = torch.empty_like(errors)
    for i, fraction in enumerate(FRACTIONS):
        for c in range(3):
            s = max(-float(low[c]), float(high[c])) * fraction / 7
            slow[i, c] = ((x[:, c] / s).round().clamp(-8, 7) * s - x[:, c]).square().sum()
    assert torch.allclose(errors, slow, rtol=1e-4)
    assert errors[:, 0].argmin() > 0 and errors.argmin(0).unique().numel() > 1


@torch.no_grad()
def test_clipping_is_chosen_per_channel_on_the_calibration_inputs(tmp_path):
    """With 4 bits some channels are clipped, and the sum of squared errors of all is no larger than without."""
    errors = {}
    for estimator in ("minmax", "mse"):
        segment, states = open_block("llama", tmp_path / estimator, scheme=parse_scheme("w8a4"))
        x = inputs_of(segment, states, "self_attn.q_proj").float()
        RepQuant(estimator).apply(segment, new_context(segment, states, (Extremes,)))
        after, parts = inputs_of(segment, states, "self_attn.q_proj").float(), segment.parts["self_attn.q_proj"]
        codes = encode(after, parts["input_scale"], None, segment.schemes["self_attn.q_proj"].inputs)
        r1 = (x.square().sum(0) / after.square().sum(0)).sqrt()
        errors[estimator] = float(((codes * parts["input_scale"] - after) * r1).square().sum())
    assert errors["mse"] < errors["minmax"]


@torch.no_grad()
def test_values_are_tied_across_query_heads(tmp_path):
    segment, states, expected = reparameterized("llama", tmp_path, RepQuant(down=True, values=True))
    assert {"self_attn.o_proj", "mlp.down_proj"} <= set(segment.parts)
    assert (outputs(segment, states) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_from_the_command_to_the_runtime(tmp_path):
    """compressed-tensors holds the scale alone; zero points are native. What is not reparameterized: per token, or
    ranges of its own behind it."""
    text_file(tmp_path / "text.txt")
    tiny(tmp_path / "opt", "opt")
    words = ["quantize", tmp_path / "opt", "--dataset", tmp_path / "text.txt", *SMALL]
    done(*words, "--method", "repquant", "--out", tmp_path / "plain")
    record = read_record(tmp_path / "plain")
    assert record.result["format"] == "compressed-tensors"
    static = {r.name.rpartition(".")[2]: "astatic" in r.scheme for r in record.linears}
    assert static == {"q_proj": True, "k_proj": True, "v_proj": True, "fc1": True, "out_proj": False, "fc2": False}
    (tmp_path / "r.toml").write_text('scheme = "w8a8"\n[[pass]]\nname = "repquant"\nshift = true\n')
    done(*words, "--recipe", tmp_path / "r.toml", "--out", tmp_path / "shift")
    assert read_record(tmp_path / "shift").result["format"] == "native"
    done(*words, "--method", "repquant+ranges+gptq", "--scheme", "w8a8-astatic", "--out", tmp_path / "all")
    assert all("astatic" in r.scheme for r in read_record(tmp_path / "all").linears)
    ids = torch.tensor([list((tmp_path / "text.txt").read_bytes()[:24])])  # random ones lie beyond the static ranges
    expected = plain_model(tmp_path / "opt")(ids).logits
    for name in ("plain", "shift", "all"):
        for kernel in (None, "reference"):
            found = load_model(tmp_path / name, dtype=torch.float32, kernel=kernel).model(ids).logits
            assert (found - expected).norm() < 0.15 * expected.norm(), (name, kernel)


def test_ranges_leaves_steps_of_earlier_passes(tmp_path):
    folder = tiny_checkpoint("llama", tmp_path / "float")
    settings = {"scheme": "w8a8-astatic", "format": "native"}
    quantize(folder, tmp_path / "alone", method="ranges+rtn", **settings)
    quantize(folder, tmp_path / "both", method="repquant+ranges+rtn", **settings)
    alone, both = (load_file(tmp_path / n / "model.safetensors") for n in ("alone", "both"))
    names = ("self_attn.q_proj", "self_attn.o_proj")
    same = [torch.equal(alone[k], both[k]) for k in (f"model.layers.0.{n}.input_scale" for n in names)]
    assert same == [False, True]


def test_it_is_better_than_one_range_where_channels_differ(tmp_path):
    """Usefulness: gains of norms and columns behind them trade a factor of 60 on some channels."""
    folder = tiny_checkpoint("llama", tmp_path / "float")
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith("layernorm.weight")]:
        tensors[name][:4] *= 60
        linears = ("q_proj", "k_proj", "v_proj") if "input" in name else ("gate_proj", "up_proj")
        for n in tensors:
            if n.startswith(name.split("input_l")[0].split("post_a")[0]) and n.split(".")[-2] in linears:
                tensors[n][:, :4] /= 60
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    exact, errors = logits(load_model(folder).model), {}
    for method in ("ranges+rtn", "repquant+ranges+rtn"):
        quantize(folder, tmp_path / method, method=method, scheme="w8a8-astatic", format="native")
        errors[method] = (logits(load_model(tmp_path / method, dtype=torch.float32).model) - exact).square().mean()
    assert errors["repquant+ranges+rtn"] < 0.2 * errors["ranges+rtn"], errors


def test_bad_input(tmp_path):
    tiny(tmp_path / "float")
    tiny(tmp_path / "post", "opt-post-norm")
    words = ["quantize", tmp_path / "float", "--dry-run", "--method"]
    assert "no integer inputs" in refused(*words, "repquant", "--scheme", "w8a16-gchannel")
    assert "no integer inputs" in refused(*words, "repquant", "--scheme", "fp8")
    assert "no integer inputs" in refused(*words, "repquant", "--scheme", "w4a4-rs128")
    for method in ("repquant", "outliertune"):
        message = refused(*words, method, "--scheme", "w8a8-astatic")
        assert "down_proj" in message and "no pass calibrates their range" in message and "q_proj" not in message
    assert "no place where a channel's step can move" in refused(
        "quantize", tmp_path / "post", "--dry-run", "--method", "repquant"
    )
    recipe = tmp_path / "r.toml"
    head = 'scheme = "w8a8-astatic"\n[[pass]]\nname = "rotate"\n[[pass]]\nname = "repquant"\nvalues = true\n'
    recipe.write_text(head + "down = true\n")
    message = refused("quantize", tmp_path / "float", "--dry-run", "--recipe", recipe)
    assert "mlp.down_proj" in message and "o_proj" not in message, "the input of down is transformed at run time"
    recipe.write_text('scheme = "w8a8"\n[[pass]]\nname = "repquant"\nestimator = "entropy"\n')
    assert "entropy" in refused("quantize", tmp_path / "float", "--dry-run", "--recipe", recipe)
    recipe.write_text('scheme = "w8a8"\nformat = "native"\n[[pass]]\nname = "repquant"\nshift = true\n')
    assert "cannot shift" in done("quantize", tmp_path / "float", "--dry-run", "--recipe", recipe)


@pytest.mark.parametrize("family", ["falcon-40b", "gpt_neox"])
def test_new_biases_take_the_shift(family, tmp_path):
    text_file(tmp_path / "text.txt")
    changes = {"attention_bias": False} if family == "gpt_neox" else {}
    tiny(tmp_path / "float", family, **changes)
    (tmp_path / "r.toml").write_text('scheme = "w8a8"\n[[pass]]\nname = "repquant"\nshift = true\n')
    words = ["--recipe", tmp_path / "r.toml", "--dataset", tmp_path / "text.txt", *SMALL]
    done("quantize", tmp_path / "float", *words, "--out", tmp_path / "out")
    switch = "attention_bias" if family == "gpt_neox" else "bias"
    assert json.loads((tmp_path / "out/config.json").read_text())[switch] is True
    after = load_file(tmp_path / "out/model.safetensors")
    made = [n for n in after if n.endswith(".bias") and n not in load_file(tmp_path / "float/model.safetensors")]
    assert made and any((after[n] != 0).any() for n in made)
