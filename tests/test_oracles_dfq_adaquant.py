"""The oracles of DFQ (equalization, bias correction) and AdaQuant, and whole runs of their passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import done, refused, text_file, tiny
from safetensors.torch import load_file
from test_exactness import wide_inside
from test_statistics import inputs_of, new_context, open_block, scheme

from calibration.record import read_record
from calibration.walk.statistics import Gram, Mean
from ptq.methods import AdaQuant, BiasCorrect, Equalize, Gptq, Rtn
from ptq.methods.bias_correct import expected_inputs
from ptq.methods.equalize import channel_ranges
from ptq.methods.rtn import round_to_nearest
from ptq.numerics.adaquant import adaquant, quantize_through
from ptq.numerics.dfq import equalizing_scales, expected_relu, mean_error
from ptq.numerics.integers import grid_parameters
from ptq.numerics.integers import quantize as integer_codes
from ptq.scheme import Grouping, QuantScheme, TensorQuant

torch.set_num_threads(1)
WORDS = ("--samples", "6", "--seq-len", "24")


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def output(segment, states) -> torch.Tensor:
    segment.sync()
    with torch.no_grad():
        return torch.cat([states.output(segment.module, segment.index, b) for b in range(len(states.batches))])


# equalization --------------------------------------------------------------------------------------------------------


def test_ranges_meet_at_their_geometric_mean():
    r1, r2 = randn(0, 20).abs(), randn(1, 20).abs()
    s = equalizing_scales(r1, r2)
    assert torch.allclose(r1 / s, (r1 * r2).sqrt()) and torch.allclose(r2 * s, (r1 * r2).sqrt())
    assert torch.allclose(equalizing_scales(r1 / s, r2 * s), torch.ones(20, dtype=torch.float64))
    dead = equalizing_scales(torch.tensor([0.0, 1.0, 1e9]), torch.tensor([1.0, 0.0, 1e-9]))
    assert dead.tolist() == [1.0, 1.0, 100.0]


@pytest.mark.parametrize("family", ["llama", "llama-tied-bias", "opt", "gpt2", "phi3", "mixtral", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equalization_keeps_the_block_and_evens_its_ranges(family, dtype, tmp_path):
    """Attention values (tied across query heads that share one), gated MLPs, ReLU; value biases move."""
    with wide_inside(dtype):
        segment, states = open_block(family, tmp_path, dtype=dtype)
        before, weights = output(segment, states), {n: w.clone() for n, w in segment.masters.items()}
        Equalize().apply(segment, new_context(segment, states))
        after = output(segment, states)
    assert (after - before).abs().max() <= (1e-9 if dtype == torch.float64 else 1e-5) * before.abs().max()
    pairs = [group for group in segment.spec.balance if group.kind != "norm"]
    assert any(not torch.equal(weights[n], segment.masters[n]) for n in weights) == bool(pairs)
    for group in pairs:
        produced, consumed = channel_ranges(segment, group)
        assert torch.allclose(produced, consumed, rtol=1e-3)
    assert segment.edits == 0, "statistics stay valid"


@pytest.mark.parametrize(("family", "bias"), [("opt", "self_attn.v_proj"), ("gpt2", "attn.c_attn")])
def test_value_biases_move_into_the_output_projection(family, bias, tmp_path):
    segment, states = open_block(family, tmp_path)
    group = next(g for g in segment.spec.balance if g.heads is not None)
    rows = slice(*group.rows) if group.rows else slice(None)
    assert segment.masters[f"{bias}.bias"][rows].abs().min() > 0
    still = segment.masters[f"{group.consumers[0]}.bias"].clone()
    Equalize(values=False).apply(segment, new_context(segment, states))
    assert torch.equal(segment.masters[f"{group.consumers[0]}.bias"], still)
    Equalize().apply(segment, new_context(segment, states))
    assert not segment.masters[f"{bias}.bias"][rows].any()
    assert not torch.equal(segment.masters[f"{group.consumers[0]}.bias"], still)


def test_codes_of_the_producer_do_not_change():
    w1, w2 = randn(2, 24, 32) * randn(3, 24, 1).exp(), randn(4, 16, 24)
    quant = TensorQuant(4, Grouping("channel"), "sym_full")
    s = equalizing_scales(w1.abs().amax(1), w2.abs().amax(0))

    def codes(w: torch.Tensor) -> torch.Tensor:
        scale, zero = grid_parameters(w, quant, exact_scale=True)
        return integer_codes(w, scale.unsqueeze(-1), zero, quant)

    assert torch.equal(codes(w1), codes(w1 / s[:, None]))
    assert not torch.equal(codes(w2), codes(w2 * s))


# bias correction -----------------------------------------------------------------------------------------------------


def test_mean_error_leaves_and_the_square_error_falls_by_its_square():
    w, x = randn(5, 12, 32), randn(6, 200, 32) + 0.5
    rounded = round_to_nearest(w, QuantScheme(TensorQuant(2, Grouping("group", 16)))).dequantize(torch.float64)
    shift = mean_error(w, rounded, x.mean(0))
    y, yq = x @ w.T, x @ rounded.T
    assert torch.allclose((yq - shift).mean(0), y.mean(0), rtol=1e-9, atol=1e-9)
    before, after = (yq - y).square().mean(0), (yq - shift - y).square().mean(0)
    assert torch.allclose(before - after, shift.square()) and (after <= before).all() and shift.abs().max() > 0.05


def test_expected_relu_is_the_mean_of_a_clipped_normal():
    mean, std = torch.tensor([-1.0, 0.0, 0.5, 2.0]).double(), torch.tensor([1.0, 2.0, 0.3, 0.0]).double()
    x = mean + std * randn(7, 400_000, 4)
    assert torch.allclose(expected_relu(mean, std), x.clamp(min=0).mean(0), atol=5e-3)


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama-tied-bias"])
def test_corrected_layers_have_the_float_mean(family, tmp_path):
    segment, states = open_block(family, tmp_path, scheme=scheme(2))
    segment.keep_originals = True
    inputs = {name: inputs_of(segment, states, name) for name in segment.spec.linears}
    context = new_context(segment, states, (Gram, Mean))
    Rtn().apply(segment, context)
    BiasCorrect().apply(segment, context)
    for name, x in inputs.items():
        y = x @ segment.original(name).double().T + segment.originals[f"{name}.bias"].double()
        found = x @ segment.weight(name).double().T + segment.masters[f"{name}.bias"].double()
        scale = (found - y).abs().max()
        assert (found.mean(0) - y.mean(0)).abs().max() <= 1e-5 * scale
        assert segment.notes[name]["bias-correct.moved"] > 0


def test_means_without_data(tmp_path):
    """Behind LayerNorm, attention and ReLU of OPT, for normal inputs whose mean and deviation are bias and gain."""
    segment, _ = open_block("opt", tmp_path)
    segment.keep_originals = True
    found, kept = expected_inputs(segment), {n: m.double() for n, m in segment.masters.items()}
    assert set(found) == set(segment.spec.linears)
    assert torch.equal(found["self_attn.k_proj"], segment.masters["self_attn_layer_norm.bias"])
    value = kept["self_attn.v_proj.weight"] @ kept["self_attn_layer_norm.bias"] + kept["self_attn.v_proj.bias"]
    assert torch.allclose(found["self_attn.out_proj"].double(), value, atol=1e-5)
    x = kept["final_layer_norm.bias"] + kept["final_layer_norm.weight"] * randn(11, 100_000, 64)
    hidden = (x @ kept["fc1.weight"].T + kept["fc1.bias"]).clamp(min=0)
    assert torch.allclose(found["fc2"].double(), hidden.mean(0), atol=0.03)
    segment.transform_input("fc2")
    assert set(expected_inputs(segment)) == set(found) - {"fc2"}, "weights do not tell what a rotation makes of it"
    plain, _ = open_block("llama", tmp_path / "llama")
    plain.keep_originals = True
    assert not any(mean.any() for mean in expected_inputs(plain).values()), "RMSNorm has mean 0"


# AdaQuant ------------------------------------------------------------------------------------------------------------

QUANTS = [
    TensorQuant(2, Grouping("group", 16), "asym_zero_in"),
    TensorQuant(3, Grouping("channel"), "sym_gptq"),
    TensorQuant(3, Grouping("group", 16), "sym_restricted"),
    TensorQuant(2, Grouping("group", 8, "out"), "sym_gptq"),
]


@pytest.mark.parametrize("quant", QUANTS, ids=str)
def test_no_iterations_are_rounding_to_nearest_and_more_are_better(quant):
    w, x = randn(8, 16, 32).float(), (randn(9, 100, 32) @ (torch.eye(32) + 0.5 * randn(10, 32, 32))).float()
    gram, rtn = x.T @ x, round_to_nearest(w, QuantScheme(quant))
    codes, scale, zero, left = adaquant(w, gram, quant, 0, 0.002, 0.03)
    assert torch.equal(codes, rtn.codes) and torch.equal(scale, rtn.scale) and left == 1
    assert zero is None if rtn.zero is None else torch.equal(zero, rtn.zero)
    losses = [adaquant(w, gram, quant, n, 0.002, 0.03)[3] for n in (5, 20, 80)]
    assert losses[2] <= losses[1] <= losses[0] <= 1 and losses[2] < 0.85
    q = round_to_nearest(w, QuantScheme(quant))
    codes, scale, zero, left = adaquant(w, gram, quant, 80, 0.002, 0.03)
    learned = type(q)(codes, scale, zero, QuantScheme(quant)).dequantize()
    error = [(((v - w) @ gram) * (v - w)).sum() for v in (learned, q.dequantize())]
    assert float(error[0] / error[1]) == pytest.approx(left, rel=1e-4), "the loss is that of what is stored"


def test_gradient_is_straight_through_inside_the_range():
    quant, scale = TensorQuant(3, Grouping("channel")), torch.full((1, 1), 0.5)
    u = torch.tensor([[[-5.3, -2.2, 0.4, 2.7, 6.1]]]).requires_grad_()
    rounded, _, _, _ = quantize_through(u, torch.zeros(1, 1), scale, None, quant)
    assert rounded.detach().flatten().tolist() == [-2.0, -1.0, 0.0, 1.5, 1.5]
    rounded.backward(torch.tensor([[[1.0, 2.0, 3.0, 4.0, 5.0]]]))
    assert u.grad is not None
    assert u.grad.flatten().tolist() == [0.0, 1.0, 1.5, 2.0, 0.0], "the gradient of W, times the step"


def test_adaquant_on_a_block_beats_rounding(tmp_path):
    errors = []
    for i, method in enumerate((Rtn(), AdaQuant(), Gptq())):
        segment, states = open_block("llama", tmp_path / str(i), scheme=scheme(2))
        method.apply(segment, new_context(segment, states))
        errors.append([segment.errors[n]["output"] for n in segment.spec.linears])
    assert all(learned < 0.9 * nearest for nearest, learned in zip(errors[0], errors[1], strict=True))


# whole runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dfq")
    text_file(folder / "text.txt")
    tiny(folder / "opt", "opt")
    tiny(folder / "llama")
    return folder


def quantize(place: Path, model: str, method: str, out: str) -> dict[str, torch.Tensor]:
    words = ["--method", method, "--scheme", "w2a16-g32", "--dataset", place / "text.txt", *WORDS]
    done("quantize", place / model, *words, "--out", place / out)
    return load_file(place / out / "model.safetensors")


def test_runs_in_legal_orders(place):
    plain = quantize(place, "opt", "rtn", "plain")
    corrected = quantize(place, "opt", "rtn+bias-correct", "corrected")
    changed = {n for n in plain if not torch.equal(plain[n].float(), corrected[n].float())}
    assert len(changed) == 12 and all(n.endswith(("proj.bias", "fc1.bias", "fc2.bias")) for n in changed)
    record = read_record(place / "corrected")
    assert record.recipe["method"] == "rtn+bias-correct" and "bias-correct.moved" in record.linears[0].notes
    for method in ("equalize+awq+adaquant+bias-correct+norm-tweak", "equalize+gptq+lorc+bias-correct"):
        quantize(place, "opt", method, method)
        record = read_record(place / method)
        assert record.recipe["method"] == method and record.result["verified"] == 12


REFUSALS = {
    "rtn+equalize": ("'equalize' (TRANSFORM) cannot follow 'rtn' (ROUND)", "write equalize+rtn"),
    "bias-correct+gptq": ("'gptq' (ROUND) cannot follow 'bias-correct' (REPAIR)", "write gptq+bias-correct"),
    "awq+norm-tweak+gptq": ("'gptq' (ROUND) cannot follow 'norm-tweak' (REPAIR)", "write gptq+norm-tweak"),
    "gptq+adaquant": ("more than one pass rounds the weights", "keep one of gptq, adaquant"),
    "rtn+bias-correct": ("no quantized linear of this model has a bias", "leave bias-correct out"),
}


@pytest.mark.parametrize("method", REFUSALS)
def test_illegal_orders_and_models_are_refused(method, place):
    message = refused("quantize", place / "llama", "--method", method, "--scheme", "w2a16-g32", "--dry-run")
    assert all(part in message for part in REFUSALS[method]), message


@pytest.mark.parametrize(
    ("setting", "part"), [("iterations = -1", "-1 is negative"), ("step_rate = 2.0", "2.0 is outside [0, 1)")]
)
def test_bad_settings_are_refused(setting, part, place, tmp_path):
    (tmp_path / "r.toml").write_text(f'[[pass]]\nname = "adaquant"\n{setting}\n')
    assert part in refused("quantize", place / "llama", "--recipe", tmp_path / "r.toml", "--dry-run")


def test_adaquant_refuses_float_grids(place):
    message = refused("quantize", place / "llama", "--method", "adaquant", "--scheme", "mxfp4", "--dry-run")
    assert "adaquant learns integer grids only" in message
