"""FP8 in blocks of 128 x 128 and MXFP8: read and run as compressed-tensors does, and written as it reads them."""

from __future__ import annotations

import json

import pytest
import torch
from command import refused, run_ptq
from safetensors.torch import load_file
from tiny_runs import edit_config, logits, plain_model, quantize, rewrite, tiny_checkpoint
from transformers import AutoModelForCausalLM

import ptq
from calibration.errors import PlanError, ToolkitError
from ptq.methods.rtn import round_to_nearest
from ptq.numerics.gptq import gptq_round
from ptq.numerics.grids import levels_of
from ptq.runtime.load import load_model
from ptq.scheme import QuantScheme, parse_scheme

BLOCKS = "fp8-e4m3fn-gblock-afp8-ag128"
PROJECTION = "model.layers.0.self_attn.k_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Keys and values have 64 rows, half a block."""
    return tiny_checkpoint(
        "llama", tmp_path_factory.mktemp("float"), hidden_size=128, intermediate_size=256, head_dim=32
    )


@pytest.fixture(scope="module")
def blocks(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("coded") / "blocks"
    words = ("quantize", model, "--method", "rtn", "--scheme", "FP8_BLOCK", "--format", "compressed-tensors")
    result = run_ptq(*words, "--out", out)
    assert result.code == 0, result.err
    return out


def test_texts_hold_them():
    assert str(parse_scheme("FP8_BLOCK")) == BLOCKS and str(parse_scheme("mxfp8-amxfp8")) == "mxfp8-amxfp8"
    for text in (BLOCKS, "fp8-e4m3fn-gblock", "mxfp8", "mxfp8-amxfp8"):
        assert QuantScheme.from_json(parse_scheme(text).to_json()) == parse_scheme(text)
    assert parse_scheme("FP8_BLOCK").bits_per_weight(256, 256) == 8 + 16 / 128**2
    for wrong in ("w8a16-gblock", "fp6-e3m2-gblock"):
        with pytest.raises(ToolkitError, match="gblock"):
            parse_scheme(wrong)


def test_a_block_shares_the_step_of_its_largest_weight():
    w = torch.randn(200, 256, generator=torch.Generator().manual_seed(1))
    scheme = parse_scheme("fp8-e4m3fn-gblock")
    q = round_to_nearest(w, scheme)
    for rows, columns in ((slice(0, 128), slice(0, 128)), (slice(128, 200), slice(128, 256))):
        step = (w[rows, columns].abs().max() / 448).bfloat16().float()
        found = q.scale[rows, columns.start // 128]
        assert found.eq(step).all()
        codes = (w[rows, columns] / step).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(q.codes[rows, columns], codes.view(torch.uint8))
    h = w.T @ w + torch.eye(256)
    rounded = gptq_round(w, h, scheme.weights)
    assert rounded.scale.shape == (200, 2)
    for rows in (slice(0, 128), slice(128, 200)):
        assert rounded.scale[rows].eq(rounded.scale[rows][:1]).all()
    values = levels_of(rounded.codes, None, scheme.weights) * rounded.scale.repeat_interleave(128, 1)
    plain = q.dequantize() - w
    assert (((values - w) @ h) * (values - w)).sum() < ((plain @ h) * plain).sum()


def test_powers_of_two_leave_the_largest_weight_whole():
    """448 is the largest E4M3: a group up to 448 has step 1, and the next value 2."""
    w = torch.zeros(3, 32)
    w[:, 0] = torch.tensor([256.0, 448.0, 449.0])
    q = round_to_nearest(w, parse_scheme("mxfp8"))
    assert q.scale.flatten().tolist() == [1.0, 1.0, 2.0] and q.dequantize()[:, 0].tolist() == [256.0, 448.0, 448.0]


def test_blocks_run_as_in_transformers(blocks, model):
    stored = load_file(blocks / "model.safetensors")
    assert stored[f"{PROJECTION}.weight"].dtype == torch.float8_e4m3fn
    assert stored[f"{PROJECTION}.weight_scale"].shape == (1, 1)
    ours = logits(load_model(blocks, dtype=torch.float32).model)
    assert torch.allclose(ours, logits(plain_model(blocks)), rtol=0, atol=1e-5 * float(ours.abs().max()))
    exact = logits(load_model(model, dtype=torch.float32).model)
    assert (ours - exact).abs().max() > 1e-3 * exact.abs().max()


def test_blocks_go_to_other_formats_and_are_a_float_source(blocks, tmp_path):
    ptq.export(blocks, format="native", out=tmp_path / "native")
    ptq.export(tmp_path / "native", format="compressed-tensors", out=tmp_path / "again")
    expected, found = load_file(blocks / "model.safetensors"), load_file(tmp_path / "again/model.safetensors")
    assert expected.keys() == found.keys() and all(torch.equal(expected[n], found[n]) for n in expected)
    assert run_ptq("export", blocks, "--format", "float", "--out", tmp_path / "float").code == 0
    quantize(blocks, tmp_path / "q4", method="rtn", scheme="w4a16-g32")
    quantize(tmp_path / "float", tmp_path / "q4f", method="rtn", scheme="w4a16-g32")
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("q4", "q4f"))
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert BLOCKS in run_ptq("inspect", blocks).out
    assert "describes weights only" in refused("export", blocks, "--format", "gptq", "--out", tmp_path / "gptq")


def test_blocks_of_other_shapes(blocks, tmp_path):
    """Scales that are missing a row are named; blocks of another size count as floats, which have 128 x 128 only."""
    config = json.loads((blocks / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((blocks / "model.safetensors").read_bytes())
    rewrite(tmp_path, lambda tensors: {**tensors, f"{PROJECTION}.weight_scale": torch.ones(2, 1)})
    with pytest.raises(ToolkitError, match=r"k_proj.weight_scale: float32 \(2, 1\).*\(1, 1\)"):
        load_model(tmp_path)
    settings = config["quantization_config"]
    settings["config_groups"]["group_0"]["weights"]["block_structure"] = [64, 64]
    edit_config(tmp_path, quantization_config=settings)
    with pytest.raises(ToolkitError, match="per block of 128"):
        load_model(tmp_path)


def test_mxfp8_runs_as_in_transformers(tmp_path):
    """It decompresses to bfloat16, which holds these products; what is compared runs in float32."""
    model, out = tiny_checkpoint("llama", tmp_path / "float", torch.bfloat16, hidden_size=64), tmp_path / "out"
    record = quantize(model, out, method="gptq", scheme="mxfp8-amxfp8", format="compressed-tensors")
    assert record.result["verified"] == 14
    stored = load_file(out / "model.safetensors")
    assert stored[f"{PROJECTION}.weight_scale"].dtype == torch.uint8
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()
    logits(theirs)  # decompresses
    ours = logits(load_model(out, dtype=torch.float32, kernel="reference").model)
    difference = ours - logits(torch.nn.Module.float(theirs))
    assert difference.abs().max() < 1e-4 * ours.abs().max()
    ptq.export(out, format="native", out=tmp_path / "native")
    again = logits(load_model(tmp_path / "native", dtype=torch.float32, kernel="reference").model)
    assert torch.equal(ours, again)


@pytest.mark.parametrize("scheme", ["mxfp8-afp8", "fp8-gchannel-amxfp8", "w8amxfp8"])
def test_half_of_mxfp8_is_refused_by_the_format(scheme, model, tmp_path):
    with pytest.raises(PlanError, match="MXFP8"):
        quantize(model, tmp_path / "out", method="rtn", scheme=scheme, format="compressed-tensors")
    quantize(model, tmp_path / scheme, method="rtn", scheme=scheme, format="native")
