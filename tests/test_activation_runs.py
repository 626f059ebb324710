"""Quantized inputs and KV caches from the command to the logits, on tiny models; and what plans refuse."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_runs import IDS, logits, quantize, text_file, tiny_checkpoint

import ptq
from calibration.errors import PlanError
from calibration.model.checkpoint import CheckpointReader
from calibration.progress import Silent
from ptq.formats.reading import read_linear
from ptq.formats.registry import format_of
from ptq.numerics.activations import fake_quantize_inputs
from ptq.runtime.linear import QuantLinear
from ptq.runtime.load import load_model

SMALL = {"hidden_size": 64, "intermediate_size": 96}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("float"), **SMALL)


def run(model, out, scheme, method="rtn", **settings):
    quantize(model, out, method=method, scheme=scheme, **settings)
    return out


def by_hand(folder, model) -> torch.Tensor:
    """The float model with the dequantized weights, and hooks that quantize what enters its linears."""
    plain = load_model(model, dtype=torch.float32).model
    with CheckpointReader(folder) as reader:
        fmt = format_of(reader.config)
        for name, (scheme, shape) in fmt.schemes(reader.config, reader.infos, reader.tensor).items():
            q = read_linear(reader, fmt, name, scheme, shape)
            linear = plain.get_submodule(name)
            linear.weight.data = q.dequantize()
            if scheme.inputs is not None:
                grid = [q.parts.get(part) for part in ("input_scale", "input_zero")]
                linear.register_forward_pre_hook(
                    lambda _, args, quant=scheme.inputs, grid=grid: (fake_quantize_inputs(args[0], quant, *grid),)
                )
    return logits(plain)


@pytest.mark.parametrize(
    ("scheme", "method"),
    [
        ("w8a8", "rtn"),
        ("w8a8-wtensor-atensor", "gptq"),
        ("w4a4", "gptq"),
        ("w8a8-astatic", "ranges+rtn"),
        ("w8a8-astatic-azp-asym", "ranges+gptq"),
        ("w8a8-achannel", "ranges+rtn"),
        ("w4a4-rs16", "rtn"),
        ("w4a8-g32-ag32", "rtn"),
        ("w8afp8", "rtn"),
    ],
)
def test_runs_equal_the_model_with_quantized_inputs(model, tmp_path, scheme, method):
    out = run(model, tmp_path / "out", scheme, method, format="native")
    expected = by_hand(out, model)
    for kernel in (None, "reference"):
        loaded = load_model(out, dtype=torch.float32, kernel=kernel)
        difference = (logits(loaded.model) - expected).abs() / expected.abs().max()
        # sums in another order move an input across a rounding boundary now and then, and that is a whole step
        assert difference.mean() <= 1e-3 and difference.quantile(0.25) <= 1e-5, (kernel, loaded.path)
    assert "simulated x 14" in loaded.path and (expected - logits(load_model(model).model)).abs().max() > 1e-3
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert {entry["scheme"] for entry in config["layers"].values()} == {str(ptq.scheme.parse_scheme(scheme))}


def test_eval_says_which_path_it_scored(model, tmp_path):
    out = run(model, tmp_path / "out", "w8a8", format="native")
    text = str(text_file(tmp_path))
    paths, perplexities = [], []
    for kernel in (None, "reference"):
        score = ptq.evaluate(out, dataset=text, seq_len=32, kernel=kernel)
        paths.append(score.path)
        perplexities.append(score.perplexity)
    assert paths == ["integer x 14; inputs integer x 14", "reference x 14; inputs simulated x 14"]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-4)


def test_static_ranges_are_those_of_the_calibration_inputs(model, tmp_path):
    """The first block's q_proj sees the same inputs in the float model."""
    out = run(model, tmp_path / "out", "w8a8-astatic", "ranges+rtn", format="native")
    job = ptq.plan(model, method="gptq", scheme="w8a8", dataset=str(text_file(tmp_path)), samples=8, seq_len=32)
    tokens = job.windows(Silent())
    seen = []
    plain = load_model(model, dtype=torch.float32).model
    plain.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for ids in tokens.batches(8):
        plain(ids)
    with CheckpointReader(out) as reader:
        step = reader.tensor("model.layers.0.self_attn.q_proj.input_scale")
    assert step.shape == (1,) and step.item() == pytest.approx(float(torch.cat(seen).abs().max()) / 127, rel=2**-8)


def test_later_blocks_are_calibrated_behind_quantized_inputs(model, tmp_path):
    """GPTQ in block 0 sees what it sees with a16; from block 1 on it works on what quantized inputs left."""
    folders = {s: run(model, tmp_path / s, s, "gptq", format="native") for s in ("w8a4-gchannel", "w8a16-gchannel")}
    codes = {}
    for scheme, folder in folders.items():
        with CheckpointReader(folder) as reader:
            codes[scheme] = [reader.tensor(f"model.layers.{i}.mlp.down_proj.codes") for i in (0, 1)]
    quantized, plain = codes.values()
    assert torch.equal(quantized[0], plain[0]) and not torch.equal(quantized[1], plain[1])


# --- the KV cache -------------------------------------------------------------------------------------------------


LIKE_LLAMA = [pytest.param(family, marks=pytest.mark.slow) for family in ("qwen2", "opt", "gpt_neox", "qwen3_moe")]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", *LIKE_LLAMA])
def test_a_quantized_cache_changes_little_at_8_and_more_at_4_bits(family, tmp_path):
    folder = tiny_checkpoint(family, tmp_path / "float")
    results = {}
    for kv in ("", "kv8", "kv4", "kvfp8"):
        out = run(folder, tmp_path / f"out{kv}", f"w8a16{kv}-gchannel", format="native")
        loaded = load_model(out, dtype=torch.float32, kernel="reference")
        assert (f"{kv} simulated" in loaded.path) == bool(kv)
        results[kv] = logits(loaded.model)
    size = results[""].abs().max()
    errors = {kv: float((results[kv] - results[""]).abs().max() / size) for kv in ("kv8", "kv4", "kvfp8")}
    assert 0 < errors["kv8"] < errors["kvfp8"] < errors["kv4"] < 1, errors


def test_a_quantized_cache_equals_quantized_keys_and_values(model, tmp_path):
    """Against the eager attention of the model class with keys and values replaced on their way in."""
    from transformers.models.llama import modeling_llama

    from ptq.activations import ActivationQuant

    out = run(model, tmp_path / "out", "w8a8kv4", format="native")
    found = logits(load_model(out, dtype=torch.float32, kernel="reference").model)
    quantize(model, tmp_path / "plain", method="rtn", scheme="w8a8", format="native")
    plain = load_model(tmp_path / "plain", dtype=torch.float32, kernel="reference").model
    plain.set_attn_implementation("eager")
    eager, grid = modeling_llama.eager_attention_forward, ActivationQuant(4, symmetric=False)

    def attention(module, query, key, value, *args, **options):
        return eager(module, query, *(fake_quantize_inputs(x, grid) for x in (key, value)), *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_llama, "eager_attention_forward", attention)
        expected = logits(plain)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (logits(plain) - expected).abs().max() > 1e-3 * expected.abs().max()


def test_generation_with_a_quantized_cache_equals_the_full_forward(model, tmp_path):
    out = run(model, tmp_path / "out", "w8a8kv4", format="native")
    network = load_model(out, dtype=torch.float32).model
    full = network(IDS[:1], use_cache=False).logits
    first = network(IDS[:1, :12], use_cache=True)
    rest = network(IDS[:1, 12:], past_key_values=first.past_key_values).logits
    assert (torch.cat([first.logits, rest], 1) - full).abs().max() <= 1e-4 * full.abs().max()


# --- what plans refuse --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings", "reasons"),
    [
        ("llama", {"scheme": "w8a8", "format": "awq"}, ["has quantized inputs", "describes weights only"]),
        ("llama", {"scheme": "w4a8-g32", "format": "gptq"}, ["has quantized inputs"]),
        ("llama", {"scheme": "w8a8-g32", "format": "gptq_v2"}, ["has quantized inputs"]),
        ("llama", {"scheme": "w4a16kv8-g32", "format": "gptq"}, ["has a quantized KV cache"]),
        ("llama", {"scheme": "w8a8-astatic"}, ["static inputs, and no pass calibrates", "ranges+rtn"]),
        ("llama", {"scheme": "w8a8", "method": "ranges+rtn"}, ["no scheme has static inputs"]),
        ("llama", {"scheme": "w8a8-ag40"}, ["not a multiple of the 40"]),
        ("falcon-rw", {"scheme": "w8a8kv8"}, ["attention is not exchangeable"]),
        ("bloom", {"scheme": "w8a8kv8"}, ["attention is not exchangeable"]),
    ],
)
def test_plans_refuse_what_cannot_be(family, settings, reasons, tmp_path):
    folder = tiny_checkpoint(family, tmp_path / "float")
    with pytest.raises(PlanError) as caught:
        quantize(folder, tmp_path / "out", **{"method": "rtn", **settings})
    for reason in reasons:
        assert reason in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("percentile = 20.0", "20.0 is outside (50, 100]"),
        ("percentile = 100.5", "100.5 is outside (50, 100]"),
        ("percentile = 0.999", "it is in percent"),
        ("percentile = nan", "nan is not within"),
        ('estimator = "entropy"', None),
        ('estimator = "mse"\nscheme = "w8a8-achannel"', "needs a histogram"),
        ('estimator = "entropy"\nscheme = "w8afp8-astatic"', "merges bins to integer levels"),
    ],
)
def test_settings_of_ranges(lines, reason, model, tmp_path):
    scheme = lines.partition("scheme = ")[2] or '"w8a8-astatic"'
    table = lines.partition("\nscheme")[0]
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'scheme = {scheme}\nformat = "native"\n[[pass]]\nname = "ranges"\n{table}\n')
    if reason is None:
        quantize(model, tmp_path / "out", method=None, scheme=None, recipe=recipe)
        return
    with pytest.raises(PlanError, match=r".*") as caught:
        quantize(model, tmp_path / "out", method=None, scheme=None, recipe=recipe)
    assert reason in str(caught.value)


def test_rules_must_agree_on_the_cache_of_a_layer(model, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('method = "rtn"\nscheme = "w8a8"\n[[rule]]\nmatch = "*.k_proj"\nscheme = "w8a8kv8"\n')
    with pytest.raises(PlanError, match="disagree about the KV cache"):
        quantize(model, tmp_path / "out", method=None, scheme=None, recipe=recipe)


def test_layers_hold_their_own_grids(model, tmp_path):
    recipe = tmp_path / "recipe.toml"
    rule = '[[rule]]\nmatch = "*.layers.1.self_attn.[qkv]_proj"\nscheme = "w8a8kv4"\n'
    recipe.write_text(f'method = "rtn"\nscheme = "w8a8"\nformat = "native"\n{rule}')
    quantize(model, tmp_path / "out", method=None, scheme=None, recipe=recipe)
    loaded = load_model(tmp_path / "out", dtype=torch.float32)
    assert loaded.caches == ("kv4",) and isinstance(loaded.model.model.layers[0].mlp.up_proj, QuantLinear)
