"""Steps of static KV caches, calibrated: against the keys and values of transformers' own cache, and read back."""

from __future__ import annotations

import json

import pytest
import torch
from command import refused, run_ptq
from safetensors.torch import load_file, save_file
from tiny_runs import logits, plain_model, quantize, text_file, tiny_checkpoint

import ptq
from calibration.errors import PlanError
from ptq.runtime.load import load_model

SAMPLES = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("float"), hidden_size=64, intermediate_size=96)


@pytest.fixture
def tokens(tmp_path):
    save_file({"input_ids": SAMPLES}, tmp_path / "tokens.safetensors")
    return tmp_path / "tokens.safetensors"


@pytest.mark.parametrize(("scheme", "largest"), [("w8a16kvfp8-g32-kvstatic", 448), ("w8a16kv8-g32-kvstatic", 127)])
def test_a_step_is_the_largest_magnitude_over_the_largest_code(scheme, largest, model, tokens, tmp_path):
    """Of the first layer, which reads the same in the float model; its cache holds keys behind the rotary embedding."""
    out = tmp_path / "out"
    ptq.quantize(model, out=out, method="ranges+rtn", scheme=scheme, dataset=str(tokens), samples=4, seq_len=24)
    stored = load_file(out / "model.safetensors")
    with torch.no_grad():
        cache = plain_model(model)(SAMPLES, use_cache=True).past_key_values.layers[0]
    for name, seen in (("k_scale", cache.keys), ("v_scale", cache.values)):
        step = stored[f"model.layers.0.self_attn.{name}"]
        assert step.shape == (1,) and torch.equal(step, (seen.abs().max() / largest).bfloat16().float().view(1))
    settings = json.loads((out / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert settings["strategy"] == "tensor" and settings["dynamic"] is False and settings["symmetric"]
    ours = logits(load_model(out, dtype=torch.float32, kernel="reference").model)
    assert torch.allclose(ours, logits(plain_model(out)), rtol=0, atol=1e-2 * float(ours.abs().max()))


def test_static_inputs_and_a_static_cache_on_the_command_line(model, tmp_path):
    words = ("quantize", model, "--method", "ranges+gptq", "--scheme", "w8a8kvfp8-astatic-kvstatic")
    text = ("--dataset", text_file(tmp_path), "--samples", "8", "--seq-len", "32")
    result = run_ptq(*words, *text, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    stored = load_file(tmp_path / "out/model.safetensors")
    assert sum(name.endswith(("k_scale", "v_scale")) for name in stored) == 4
    assert sum(name.endswith("input_scale") for name in stored) == 14
    assert run_ptq("eval", tmp_path / "out", "--dataset", text_file(tmp_path), "--seq-len", "32").code == 0
    message = refused("quantize", model, "--method", "rtn", "--scheme", "w8a8kvfp8-kvstatic", "--out", tmp_path / "x")
    assert "no pass calibrates its steps" in message and "ranges+rtn" in message


def test_keys_that_the_runtime_turns_are_seen_turned(model, tokens, tmp_path):
    """Rotation R3 spreads outliers of keys before they are cached; their step is that of turned keys."""
    settings = {"scheme": "w8a16kv8-g32-kvstatic", "dataset": str(tokens), "samples": 4, "seq_len": 24}
    for method in ("rotate+ranges+rtn", "ranges+rtn"):
        ptq.quantize(model, out=tmp_path / method, method=method, format="native", **settings)
    turned, plain = (load_file(next((tmp_path / m).glob("*.safetensors"))) for m in ("rotate+ranges+rtn", "ranges+rtn"))
    name = "model.layers.0.self_attn.{}_proj.{}_scale"
    assert not torch.equal(turned[name.format("k", "key")], plain[name.format("k", "key")])
    errors = [
        (logits(load_model(tmp_path / m, dtype=torch.float32).model) - logits(load_model(model).model)).norm()
        for m in ("rotate+ranges+rtn", "ranges+rtn")
    ]
    assert errors[0] < 2 * errors[1]


def test_a_place_for_the_steps(model, tmp_path):
    """compressed-tensors keeps them beside k_proj and v_proj, native files on any linear of the layer."""
    recipe = tmp_path / "recipe.toml"
    rules = '[[rule]]\nmatch = "*.k_proj"\nscheme = "float"\n'
    recipe.write_text('scheme = "w8a16kvfp8-g32-kvstatic"\nmethod = "ranges+rtn"\n' + rules)
    with pytest.raises(PlanError, match="beside quantized linears that make keys or values"):
        quantize(model, tmp_path / "ct", method=None, scheme=None, recipe=recipe, format="compressed-tensors")
    quantize(model, tmp_path / "native", method=None, scheme=None, recipe=recipe, format="native")
    assert load_model(tmp_path / "native").caches == ("kvfp8",)
