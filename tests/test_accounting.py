"""Every tensor of a source is quantized, kept, converted, or refused by name; none vanishes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_derived import tiny
from tiny_runs import assert_close, edit_config, logits, quantize, rewrite, tiny_checkpoint

import ptq
from calibration.errors import ToolkitError
from calibration.model.classes import auto_class
from calibration.model.opening import open_model
from ptq.planning.job import prepare
from ptq.runtime.load import load_model

ATTENTION = "model.layers.0.self_attn."
LOST = {
    "sinks": {f"{ATTENTION}sinks": torch.ones(4)},
    "bias": {f"{ATTENTION}q_proj.bias": torch.ones(64)},
    "norm": {f"{ATTENTION}q_norm.weight": torch.ones(16)},
    "scale": {f"{ATTENTION}q_proj.weight_scale_inv": torch.ones(1, 1)},
}


@pytest.mark.parametrize("kind", LOST)
@pytest.mark.parametrize("command", ["quantize", "eval"])
def test_block_tensors_without_a_place_are_refused(kind, command, tmp_path):
    folder = rewrite(tiny_checkpoint("llama", tmp_path / "float"), lambda tensors: {**tensors, **LOST[kind]})
    with pytest.raises(ToolkitError, match=next(iter(LOST[kind])) + ".*LlamaForCausalLM.*would be lost"):
        quantize(folder, tmp_path / "out", method="rtn") if command == "quantize" else load_model(folder)
    assert not (tmp_path / "out").exists()


def layers(count, **entries):
    """A folder that stores further layers than its config counts, or fewer, and entries of its config."""

    def change(folder):
        def rewritten(tensors):
            kept = {n: t for n, t in tensors.items() if count > 1 or "layers.1." not in n}
            more = [
                (n, n.replace("layers.1.", f"layers.{i}.")) for n in kept if "layers.1." in n for i in range(2, count)
            ]
            return {**kept, **{new: kept[old].clone() for old, new in more}}

        edit_config(rewrite(folder, rewritten), **entries)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (layers(3), "counts 2 layers, the checkpoint stores 3"),
        (layers(1), "counts 2 layers, the checkpoint stores 1"),
        (layers(4, num_nextn_predict_layers=1), "counts 2 layers, the checkpoint stores 4"),
        (layers(2, num_hidden_layers=1), "counts 1 layers, the checkpoint stores 2"),
    ],
)
@pytest.mark.parametrize("command", ["quantize", "eval"])
def test_other_layer_counts_are_refused(change, said, command, tmp_path):
    folder = tiny_checkpoint("llama", tmp_path / "float")
    change(folder)
    with pytest.raises(ToolkitError, match=said):
        quantize(folder, tmp_path / "out", method="rtn") if command == "quantize" else load_model(folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, torch.uint8], ids=str)
@pytest.mark.parametrize("command", ["quantize", "eval"])
def test_weights_that_are_no_floats_are_refused(dtype, command, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    folder = rewrite(
        tiny_checkpoint("llama", tmp_path / "float"), lambda tensors: {**tensors, name: tensors[name].to(dtype)}
    )
    with pytest.raises(ToolkitError, match=name.replace(".", "[.]")):
        quantize(folder, tmp_path / "out", method="rtn") if command == "quantize" else load_model(folder)


def test_further_layers_are_copied_and_said(tmp_path):
    """Multi-token prediction: a layer behind those that the config counts."""

    def third(tensors):
        more = {n.replace("layers.1.", "layers.2."): t.clone() for n, t in tensors.items() if "layers.1." in n}
        return {**tensors, **more}

    folder = rewrite(tiny_checkpoint("llama", tmp_path / "float"), third)
    edit_config(folder, num_nextn_predict_layers=1)
    quantize(folder, tmp_path / "out", method="rtn")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    extra = {n for n in before if "layers.2." in n}
    assert extra and all(torch.equal(before[n], after[n]) for n in extra)
    said = prepare(folder, method="rtn", scheme="w4a16-g32").plan.remarks
    assert "copied as they are: 9 tensors of layer 2, behind the 2 that config.json counts" in said
    load_model(tmp_path / "out")


def test_stored_buffers_of_blocks_are_kept(tmp_path):
    """Apertus has constants of its activation in buffers."""
    model = tiny("apertus", tmp_path / "float")
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "act_fn" in name:
                buffer.mul_(1.5)
        model.save_pretrained(tmp_path / "float")
        quantize(tmp_path / "float", tmp_path / "out", method="rtn", scheme="w8a16-gchannel")
        assert any("act_fn.beta" in n for n in load_file(tmp_path / "out/model.safetensors"))
        plain, ours = logits(model), logits(load_model(tmp_path / "out").model)
    assert (plain - ours).abs().max() < 0.1 * plain.abs().max()


def float8(tensors, how):
    """E4M3 codes and scales for the linears of the blocks, and what they stand for in bfloat16."""
    stored, meant = dict(tensors), dict(tensors)
    for name in [n for n in tensors if "_proj.weight" in n]:
        w = tensors[name].float()
        rows, columns = w.shape
        if how == "block":
            padded = torch.zeros(-(-rows // 128) * 128, -(-columns // 128) * 128)
            padded[:rows, :columns] = w
            scale = padded.view(-(-rows // 128), 128, -1, 128).abs().amax((1, 3)) / 448
            wide = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        else:
            scale = (w.abs().amax(1, keepdim=True) if how == "row" else w.abs().amax()) / 448
            wide = scale
        stored[name] = (w / wide).to(torch.float8_e4m3fn)
        stored[name + ("_scale_inv" if how == "block" else "_scale")] = scale
        meant[name] = (stored[name].float() * wide).to(torch.bfloat16)
    return stored, meant


@pytest.mark.parametrize(("how", "named"), [("block", True), ("row", False), ("tensor", False), ("block", False)])
def test_float8_sources_are_multiplied_by_their_scales(how, named, tmp_path):
    sizes = {"hidden_size": 192, "intermediate_size": 160}
    coded, plain = (tiny_checkpoint("llama", tmp_path / n, torch.bfloat16, **sizes) for n in ("coded", "plain"))
    stored, meant = float8(load_file(plain / "model.safetensors"), how)
    rewrite(coded, lambda _: stored)
    rewrite(plain, lambda _: meant)
    if named:
        edit_config(coded, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    with torch.no_grad():
        assert_close(logits(load_model(coded).model), logits(load_model(plain).model))
    for source in (coded, plain):
        quantize(source, tmp_path / f"{source.name}-out", method="gptq")
    ours, theirs = (load_file(tmp_path / f"{n}-out/model.safetensors") for n in ("coded", "plain"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    config = json.loads((tmp_path / "coded-out/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_blocks_of_llm_compressor_are_float8_sources(tmp_path):
    coded, plain = (tiny_checkpoint("llama", tmp_path / n, torch.bfloat16) for n in ("coded", "plain"))
    stored, meant = float8(load_file(plain / "model.safetensors"), "block")
    rewrite(coded, lambda _: {name.replace("weight_scale_inv", "weight_scale"): t for name, t in stored.items()})
    rewrite(plain, lambda _: meant)
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128], "dynamic": False}
    inputs = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}
    settings = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}
    edit_config(coded, quantization_config=settings)
    with torch.no_grad():
        assert_close(logits(load_model(coded).model), logits(load_model(plain).model))
    groups["group_1"] = {"targets": ["re:.*o_proj"], "weights": {**weights, "strategy": "channel"}}
    edit_config(coded, quantization_config=settings)
    with pytest.raises(ToolkitError, match="groups of 128 in lines of 96"):
        load_model(coded)


def test_float8_without_scales_is_refused(tmp_path):
    folder = tiny_checkpoint("llama", tmp_path / "float")
    name = f"{ATTENTION}q_proj.weight"
    rewrite(folder, lambda tensors: {**tensors, name: tensors[name].to(torch.float8_e4m3fn)})
    for refused in (lambda: open_model(folder), lambda: ptq.evaluate(folder, dataset="builtin")):
        with pytest.raises(ToolkitError, match=r"float8 codes, and no .*_scale_inv.* their scales are lost"):
            refused()


def test_a_checkpoint_as_deepseek_publishes_them(tmp_path):
    """Latent attention, shared and routed experts, float8 blocks, and a layer that predicts the token after next."""
    model = tiny("deepseek_v3", tmp_path / "float")
    stored, meant = float8(load_file(tmp_path / "float/model.safetensors"), "block")
    last = model.config.num_hidden_layers
    more = {n.replace(f"layers.{last - 1}.", f"layers.{last}."): t for n, t in stored.items()}
    stored |= {n: t.clone() for n, t in more.items() if f"layers.{last}." in n}
    rewrite(tmp_path / "float", lambda _: stored)
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    edit_config(tmp_path / "float", quantization_config=blocks, num_nextn_predict_layers=1)
    record = quantize(tmp_path / "float", tmp_path / "out", method="awq+gptq", scheme="w8a16-gchannel")
    assert any("experts.3.down_proj" in linear.name for linear in record.linears)
    model.load_state_dict(auto_class(model.config).from_pretrained(_plain(tmp_path, meant)).state_dict())
    with torch.no_grad():
        ours, plain = logits(load_model(tmp_path / "out").model), logits(model)
        theirs = auto_class(model.config).from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert_close(logits(theirs), ours)
    assert (ours - plain).abs().mean() < 0.1 * plain.abs().mean()  # a token may choose another expert
    written = load_file(tmp_path / "out/model.safetensors")
    assert f"model.layers.{last}.self_attn.kv_b_proj.weight" in written
    assert not any("scale_inv" in name or t.dtype == torch.float8_e4m3fn for name, t in written.items())
    ptq.export(tmp_path / "out", format="native", out=tmp_path / "native")
    with torch.no_grad():
        assert_close(logits(load_model(tmp_path / "native").model), ours)


def _plain(place, tensors):
    """The folder of a float checkpoint with these tensors."""
    folder = place / "plain"
    folder.mkdir()
    config = json.loads((place / "float/config.json").read_text())
    config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    save_file({n: t.float() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
