"""KV caches with one calibrated step per layer, as vLLM and llm-compressor store them: read, run, written again."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import logits, plain_model, quantize, tiny_checkpoint

import ptq
from calibration.errors import PlanError, ToolkitError
from ptq.runtime.load import load_model
from ptq.scheme import QuantScheme, parse_scheme

STEPS = {"k_scale": 0.05, "v_scale": 0.002}
STATIC = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A file as llm-compressor writes it."""
    place = tmp_path_factory.mktemp("static")
    model = tiny_checkpoint("llama", place, hidden_size=64, intermediate_size=96)
    quantize(model, place / "out", method="rtn", scheme="w8a16-g32-sym", format="compressed-tensors")
    file, config_file = place / "out/model.safetensors", place / "out/config.json"
    tensors = load_file(file)
    for layer in (0, 1):
        tensors |= {f"model.layers.{layer}.self_attn.{name}": torch.tensor([s]) for name, s in STEPS.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads(config_file.read_text())
    config["quantization_config"]["kv_cache_scheme"] = STATIC
    config_file.write_text(json.dumps(config))
    return place / "out"


def test_it_computes_what_transformers_does_and_the_steps_count(folder):
    ours = logits(load_model(folder, dtype=torch.float32, kernel="reference").model)
    assert torch.allclose(ours, logits(plain_model(folder)), rtol=0, atol=1e-5 * float(ours.abs().max()))
    without = folder.parent / "without"
    without.mkdir(exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = None
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if n.rpartition(".")[2] not in STEPS}, without / "model.safetensors")
    (without / "config.json").write_text(json.dumps(config))
    assert (logits(load_model(without, dtype=torch.float32, kernel="reference").model) - ours).abs().max() > 1e-4


def test_other_formats_and_back(folder, tmp_path):
    ptq.export(folder, format="native", out=tmp_path / "native")
    ptq.export(tmp_path / "native", format="compressed-tensors", out=tmp_path / "again")
    expected, found = load_file(folder / "model.safetensors"), load_file(tmp_path / "again/model.safetensors")
    assert expected.keys() == found.keys() and all(torch.equal(expected[n], found[n]) for n in expected)
    for name in ("native", "again"):
        assert torch.equal(*(logits(load_model(f, dtype=torch.float32).model) for f in (folder, tmp_path / name)))
    with pytest.raises(ToolkitError, match="KV cache"):
        ptq.export(folder, format="gptq", out=tmp_path / "gptq")


def test_older_names_of_the_steps_are_read_and_written_as_they_are_now(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    older = {n: re.sub(r"\.([kv])_scale$", r".\1_proj.output_scale", n) for n in tensors}
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file({older[n]: t for n, t in tensors.items()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(*(logits(load_model(f, dtype=torch.float32).model) for f in (folder, tmp_path)))
    ptq.export(tmp_path, format="native", out=tmp_path / "native")
    ptq.export(tmp_path / "native", format="compressed-tensors", out=tmp_path / "again")
    found = load_file(tmp_path / "again/model.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[n], tensors[n]) for n in found)
    stranger = {"model.layers.0.self_attn.q_proj.output_scale": torch.ones(1)}
    save_file(tensors | stranger, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ToolkitError, match="output_scale: no tensor of a linear"):
        load_model(tmp_path)


def test_steps_that_are_missing_or_of_another_shape_are_named(folder, tmp_path):
    tensors, config = load_file(folder / "model.safetensors"), (folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    step = "model.layers.1.self_attn.v_scale"
    for changed, reason in (({step: torch.ones(2)}, "v_scale"), ({}, "layer 1: a static KV cache without its steps")):
        save_file({n: t for n, t in tensors.items() if n != step} | changed, tmp_path / "model.safetensors")
        with pytest.raises(ToolkitError, match=reason):
            load_model(tmp_path)


def test_texts_hold_it_and_some_pass_has_to_calibrate_it(folder, tmp_path):
    for text in ("w8a16kvfp8-g32-sym-kvstatic", "w8a8kv8-gchannel-sym-atoken-kvstatic", "nvfp4-anvfp4-kvfp8-kvstatic"):
        assert str(parse_scheme(text)) == text and QuantScheme.from_json(parse_scheme(text).to_json()) == parse_scheme(
            text
        )
    with pytest.raises(ToolkitError, match="none is"):
        parse_scheme("w8a8-kvstatic")
    with pytest.raises(PlanError, match="no pass calibrates"):
        quantize(folder.parent, tmp_path / "out", method="rtn", scheme="w8a8kvfp8-kvstatic")
