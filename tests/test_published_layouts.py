"""Checkpoints as they are published: a text model inside a wrapper, experts in four bits, and tensors of which the
model class keeps several as one."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from test_derived import tiny
from tiny_runs import assert_close, edit_config, logits, quantize, rewrite

import ptq
from calibration.errors import ToolkitError
from calibration.model.classes import auto_class
from calibration.model.mxfp4 import dequantized
from calibration.model.opening import open_model
from ptq.runtime.load import load_model


def right(model, out):
    """The quantized folder has the float model's logits nearly, and in transformers the same as here."""
    with torch.no_grad():
        plain, ours = logits(model), logits(load_model(out).model)
        theirs = auto_class(model.config).from_pretrained(out, dtype=torch.float32)
        assert type(theirs) is type(model)
        assert_close(logits(theirs), ours)
    assert (ours - plain).abs().mean() < 0.1 * plain.abs().mean()
    return ours


@pytest.mark.parametrize(
    ("model_type", "part", "whole"),
    [
        ("olmo_hybrid", "linear_attn.q_conv1d.weight", "linear_attn.conv1d.weight"),
        ("nemotron_h", "mixer.experts.1.up_proj.weight", "mixer.experts.up_proj"),
        ("longcat_flash", "mlp.experts.1.up_proj.weight", "mlp.experts.gate_up_proj"),
    ],
)
def test_parts_that_the_class_keeps_as_one(model_type, part, whole, tmp_path):
    model = tiny(model_type, tmp_path / "float")
    assert any(name.endswith(part) for name in load_file(tmp_path / "float/model.safetensors"))
    reader, _, _ = open_model(tmp_path / "float")
    names = [name for name in reader.infos if name.endswith(whole)]
    assert names and all(torch.equal(reader.tensor(name), model.state_dict()[name]) for name in names)


@pytest.mark.parametrize("model_type", ["olmo_hybrid", "nemotron_h"])
def test_what_is_read_as_one_is_written_as_one(model_type, tmp_path):
    model = tiny(model_type, tmp_path / "float")
    quantize(tmp_path / "float", tmp_path / "out", method="gptq", scheme="w8a16-gchannel")
    right(model, tmp_path / "out")


def test_a_text_model_inside_a_wrapper(tmp_path):
    """Gemma 3 from 4B on: the text tower is quantized; vision tower and projector are copied and named in the ignore
    list; quantized, measured, exported, and loaded in the wrapper's own class."""
    model = tiny("gemma3", tmp_path / "float")
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    record = quantize(tmp_path / "float", tmp_path / "out", method="awq+gptq", scheme="w8a16-gchannel")
    ours = right(model, tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("float", "out"))
    towers = {name for name in before if "vision_tower" in name or "multi_modal_projector" in name}
    assert towers and all(torch.equal(before[name], after[name]) for name in towers)
    assert all("language_model" in linear.name for linear in record.linears)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert any("vision_tower" in name for name in config["quantization_config"]["ignore"])
    assert config["architectures"] == ["Gemma3ForConditionalGeneration"] and "vision_config" in config
    ptq.export(tmp_path / "out", format="native", out=tmp_path / "native")
    with torch.no_grad():
        assert_close(logits(load_model(tmp_path / "native").model), ours)
    found = [
        ptq.evaluate(tmp_path / n, dataset=str(tmp_path / "text.txt"), seq_len=32).perplexity for n in ("float", "out")
    ]
    assert 0.9 < found[0] / found[1] < 1.1


def four_bits(tensors):
    """Experts of gpt-oss as its checkpoints store them, at random; and what transformers makes of them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored, meant, generator = dict(tensors), dict(tensors), torch.Generator().manual_seed(5)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inside, out = tensors[name].shape
        shape = (experts, out, inside // 32)
        codes = torch.randint(0, 256, (*shape, 16), generator=generator).to(torch.uint8)
        scales = torch.randint(121, 124, shape, generator=generator).to(torch.uint8)
        stored |= {f"{name}_blocks": codes, f"{name}_scales": scales}
        del stored[name]
        meant[name] = convert_moe_packed_tensors(codes, scales, dtype=torch.float32).contiguous()
        assert torch.equal(dequantized(codes, scales), meant[name])
    return stored, meant


def test_a_checkpoint_as_openai_publishes_them(tmp_path):
    """Sinks, biases everywhere, and experts in one tensor of four bits a value: multiplied out, they stay float."""
    model = tiny("gpt_oss", tmp_path / "float")
    stored, meant = four_bits(load_file(tmp_path / "float/model.safetensors"))
    model.load_state_dict(meant)
    rewrite(tmp_path / "float", lambda _: stored)
    edit_config(tmp_path / "float", quantization_config={"quant_method": "mxfp4"})
    with torch.no_grad():
        found = logits(load_model(tmp_path / "float").model)
        assert (found - logits(model)).abs().max() < 0.02 * found.abs().max()  # read as bfloat16
    quantize(tmp_path / "float", tmp_path / "out", method="awq+gptq", scheme="w8a16-gchannel")
    ours = right(model, tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(written["model.layers.0.self_attn.sinks"], stored["model.layers.0.self_attn.sinks"])
    assert torch.equal(
        written["model.layers.1.mlp.experts.down_proj"].float(), meant["model.layers.1.mlp.experts.down_proj"]
    )
    assert not any(name.endswith(("_blocks", "_scales")) for name in written)
    ptq.export(tmp_path / "out", format="native", out=tmp_path / "native")
    with torch.no_grad():
        assert_close(logits(load_model(tmp_path / "native").model), ours)
    assert ptq.evaluate(tmp_path / "out", dataset=str(tmp_path / "text.txt"), seq_len=32).perplexity > 1


def test_four_bits_without_their_scales_are_refused(tmp_path):
    tiny("gpt_oss", tmp_path / "float")
    stored, _ = four_bits(load_file(tmp_path / "float/model.safetensors"))
    lost = "model.layers.0.mlp.experts.down_proj_scales"
    rewrite(tmp_path / "float", lambda _: {n: t for n, t in stored.items() if n != lost})
    with pytest.raises(ToolkitError, match=f"no {lost} of one byte per group"):
        open_model(tmp_path / "float")
