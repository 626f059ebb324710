"""Folders of other tools, and every quantized folder back as floats."""

from __future__ import annotations

import json

import pytest
import torch
from command import refused, run_ptq
from tiny_runs import assert_close, edit_config, logits, plain_model, quantize, tiny_checkpoint

from ptq.runtime.load import load_model
from sparsity.files import load_sparsity


@pytest.mark.parametrize(
    ("format", "scheme", "packing"),
    [
        ("gptq", "w4a16-g32-sym", "auto_gptq"),
        ("awq", "w4a16-g32-asym", "auto_awq"),
        ("awq", "w4a16-g32-sym", "auto_awq"),
    ],
)
def test_auto_round_holds_the_layouts_of_gptq_and_awq(format, scheme, packing, tmp_path):
    folder = tmp_path / "quantized"
    quantize(tiny_checkpoint("llama", tmp_path / "model"), folder, method="rtn", scheme=scheme, format=format)
    expected = logits(load_model(folder, dtype=torch.float32).model)
    settings = {"bits": 4, "group_size": 32, "sym": scheme.endswith("-sym"), "data_type": "int", "iters": 200}
    names = {"quant_method": "auto-round", "packing_format": f"auto_round:{packing}", "autoround_version": "0.16.1"}
    edit_config(folder, quantization_config={**settings, **names, "block_name_to_quantize": "model.layers"})
    assert torch.equal(logits(load_model(folder, dtype=torch.float32).model), expected)


def test_other_layouts_of_auto_round_are_refused(tmp_path):
    folder = tmp_path / "quantized"
    quantize(tiny_checkpoint("llama", tmp_path / "model"), folder, method="rtn", format="gptq")
    edit_config(folder, quantization_config={"quant_method": "auto-round", "packing_format": "auto_round:fp8"})
    assert "auto_round:fp8" in refused("eval", folder, "--dataset", "builtin")


@pytest.mark.parametrize("format", ["native", "gptq", "compressed-tensors", "gguf"])
def test_back_to_floats(format, tmp_path):
    source = tmp_path / ("quantized.gguf" if format == "gguf" else "quantized")
    settings = {"embeddings": "float", "head": "float"} if format == "gguf" else {}
    model = tiny_checkpoint("llama", tmp_path / "model")
    quantize(model, source, method="rtn", scheme="w4a16-g32-sym", format=format, **settings)
    result = run_ptq("export", source, "--format", "float", "--out", tmp_path / "float")
    assert result.code == 0, result.err
    config = json.loads((tmp_path / "float" / "config.json").read_text())
    assert not {"quantization_config", "transformers_weights"} & set(config)
    dtype = torch.bfloat16 if format == "gguf" else torch.float32  # a GGUF file does not tell what it was made of
    expected = logits(load_model(source, dtype=dtype).model.float())
    assert_close(logits(plain_model(tmp_path / "float").float()), expected)
    assert "a float checkpoint already" in refused(
        "export", tmp_path / "float", "--format", "float", "--out", tmp_path / "x"
    )


def test_thresholds_go_with_the_floats_and_have_no_place_in_gguf(tmp_path):
    model = tiny_checkpoint("llama", tmp_path / "model")
    quantize(
        model, tmp_path / "sparse", method="rtn+scap", target=0.5, scheme="w4a16-g32-sym", format="native", samples=40
    )
    words = ["export", tmp_path / "sparse", "--format"]
    assert run_ptq(*words, "float", "--out", tmp_path / "float").code == 0
    before, after = load_sparsity(tmp_path / "sparse"), load_sparsity(tmp_path / "float")
    assert before is not None and after is not None and before.base != after.base
    assert [s.name for s in before.sites] == [s.name for s in after.sites] and before.reached == after.reached
    assert "has activation thresholds, for which 'gguf' has no place" in refused(
        *words, "gguf", "--out", tmp_path / "m.gguf"
    )
