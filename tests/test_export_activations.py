"""Quantized inputs and KV caches in compressed-tensors, opened by plain transformers and by our own reader."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_runs import logits, plain_model, quantize, text_file, tiny_checkpoint

import ptq
from calibration.errors import PlanError, ToolkitError
from ptq.runtime.load import load_model

CASES = {
    "w8a8": ("rtn", "int-quantized"),
    "w8a8-asym": ("gptq", "int-quantized"),
    "w8a8-astatic-wtensor": ("ranges+rtn", "int-quantized"),
    "w6a6": ("rtn", "pack-quantized"),
    "w4a8-g32": ("rtn", "pack-quantized"),
    "w4a4-astatic": ("ranges+gptq", "pack-quantized"),
    "w8a8-ag32": ("rtn", "int-quantized"),
    "w8a8kv8": ("rtn", "int-quantized"),
    "w8a16kv4-gchannel": ("rtn", "pack-quantized"),
    "w8a16kvfp8-gchannel": ("rtn", "pack-quantized"),
    "fp8": ("rtn", "float-quantized"),
    "fp8-wtensor-astatic": ("ranges+rtn", "float-quantized"),
    "fp8-a16": ("gptq", "float-quantized"),
}
LIBRARY_STEP = ("w8a8", "w8a8-asym", "w6a6", "w4a8-g32", "w8a8-ag32", "w8a8kv8")
"""Dynamic integer inputs, whose step is the reader's."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("float"), hidden_size=64, intermediate_size=96)


@pytest.mark.parametrize("scheme", CASES)
def test_transformers_computes_what_we_do(scheme, model, tmp_path):
    """The same grids, but for dynamic integers: the library takes max / 127.5 for a step, and we max / 127."""
    method, layout = CASES[scheme]
    out = tmp_path / "out"
    record = quantize(model, out, method=method, scheme=scheme, format="compressed-tensors")
    assert record.result["verified"] == 14
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == layout
    theirs = logits(plain_model(out))
    ours, exact = (
        logits(load_model(out, dtype=torch.float32, kernel="reference").model),
        logits(load_model(model).model),
    )
    difference = (theirs - ours).abs() / ours.abs().max()
    quantization = float((ours - exact).square().mean().sqrt() / ours.abs().max())
    if scheme in LIBRARY_STEP:
        assert difference.square().mean().sqrt() <= quantization, "less than what quantization itself costs"
    else:  # an input at a rounding boundary goes the other way now and then, and that is a whole step
        assert difference.quantile(0.25) <= 1e-5 and difference.mean() <= 1e-3


@pytest.mark.parametrize("scheme", CASES)
def test_our_reader_gets_the_same_model_as_from_native(scheme, model, tmp_path):
    method, _ = CASES[scheme]
    quantize(model, tmp_path / "ct", method=method, scheme=scheme, format="compressed-tensors")
    ptq.export(tmp_path / "ct", format="native", out=tmp_path / "native")
    expected, found = (load_model(tmp_path / name, dtype=torch.float32) for name in ("ct", "native"))
    assert torch.equal(logits(expected.model), logits(found.model)) and expected.path == found.path
    if "wtensor" not in scheme:  # one step per tensor is written as one per row
        layers = json.loads((tmp_path / "native/config.json").read_text())["quantization_config"]["layers"]
        names = {str(ptq.scheme.QuantScheme.from_json(entry)) for entry in layers.values()}
        assert names == {str(ptq.scheme.parse_scheme(scheme))}


def test_perplexity_is_that_of_transformers(model, tmp_path):
    """A random model magnifies the other step of dynamic integers; on trained ones three digits agree."""
    for scheme, method, equal in (("w8a8", "rtn", 1e-2), ("fp8", "rtn", 1e-4), ("w8a8-astatic", "ranges+rtn", 1e-4)):
        out = tmp_path / scheme
        quantize(model, out, method=method, scheme=scheme)  # the default format holds them
        theirs, ours = plain_model(out), load_model(out, dtype=torch.float32).model
        ids = torch.randint(0, 256, (4, 48), generator=torch.Generator().manual_seed(8))
        losses = [float(network(ids, labels=ids).loss.exp()) for network in (theirs, ours)]
        assert losses[0] == pytest.approx(losses[1], rel=equal)


@pytest.mark.parametrize(
    ("scheme", "method", "reason"),
    [
        ("w4a4-rs16", "rtn", "smoothed at run time"),
        ("w8a8-azp", "rtn", "zero points"),
        ("w8a8-achannel", "ranges+rtn", "a step per channel"),
        ("w8afp8", "rtn", "integers on one side"),
        ("fp8-g32", "rtn", "a scale per group"),
        ("w4afp4", "rtn", "4-bit float inputs"),
    ],
)
def test_what_the_format_does_not_know_is_refused_with_a_way_out(scheme, method, reason, model, tmp_path):
    with pytest.raises(PlanError, match=reason) as caught:
        quantize(model, tmp_path / "out", method=method, scheme=scheme, format="compressed-tensors")
    assert "--format native" in str(caught.value)
    quantize(model, tmp_path / "native", method=method, scheme=scheme, format="native")


def test_experts_and_different_caches_are_refused(model, tmp_path):
    experts = tiny_checkpoint("mixtral", tmp_path / "experts")
    with pytest.raises(PlanError, match="quantizes no inputs of experts"):
        quantize(experts, tmp_path / "out", method="rtn", scheme="w8a8", format="compressed-tensors")
    recipe = tmp_path / "recipe.toml"
    rule = '[[rule]]\nmatch = "*.layers.1.self_attn.[qkv]_proj"\nscheme = "w8a8kv4"\n'
    recipe.write_text(f'method = "rtn"\nscheme = "w8a8"\nformat = "compressed-tensors"\n{rule}')
    with pytest.raises(PlanError, match="describes one for all layers"):
        quantize(model, tmp_path / "out", method=None, scheme=None, recipe=recipe)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}},
            "kv_cache_scheme",
        ),
        ({"input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": False}}, "activations"),
    ],
)
def test_files_of_others_that_are_not_run_here_are_refused(change, reason, model, tmp_path):
    quantize(model, tmp_path / "out", method="rtn", scheme="w8a8")
    path = tmp_path / "out/config.json"
    config = json.loads(path.read_text())
    target = config["quantization_config"]
    (target if "kv_cache_scheme" in change else target["config_groups"]["group_0"]).update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(ToolkitError, match=reason):
        load_model(tmp_path / "out")
    assert text_file(tmp_path)
