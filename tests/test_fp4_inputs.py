"""Inputs in NVFP4, MXFP4 and MXFP8, beside weights of the same kind: against the library that the files belong to."""

from __future__ import annotations

import json

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp, generate_gparam
from safetensors.torch import load_file, save_file
from tiny_runs import logits, quantize, tiny_checkpoint
from transformers import AutoModelForCausalLM

import ptq
from calibration.errors import PlanError, ToolkitError
from ptq.formats.config_groups import input_arguments
from ptq.numerics.activations import fake_quantize_inputs, step_and_zero
from ptq.numerics.bitstream import unpack
from ptq.runtime.load import load_model
from ptq.scheme import QuantScheme, parse_scheme

SCHEMES = {"nvfp4-anvfp4": "ranges+rtn", "mxfp4-amxfp4": "rtn"}
VALUES = (*SCHEMES, "mxfp8-amxfp8", "fp8-gblock-ag128")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("float"), hidden_size=64, intermediate_size=96)


def wide_inputs() -> torch.Tensor:
    """``[2, 64, 128]`` over five decades, with groups of zeros and a massive token."""
    x = torch.randn(2, 64, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 128)
    x[0, :, :32] = 0
    x[1, 3] *= 1000
    return x


@pytest.mark.parametrize("scheme", VALUES)
def test_every_value_is_the_library_s(scheme):
    quant, x = parse_scheme(scheme).inputs, wide_inputs()
    arguments = QuantizationArgs.model_validate(input_arguments(quant))
    tensor_scale = generate_gparam(x.min()[None], x.max()[None]) if quant.kind == "nvfp4" else None
    scale, zero = compute_dynamic_scales_and_zp(x, arguments, None, global_scale=tensor_scale)
    theirs = fake_quantize(x, scale, zero, arguments, global_scale=tensor_scale)
    step = None if tensor_scale is None else step_and_zero(x.min(), x.max(), quant)[0].view(1)
    ours = fake_quantize_inputs(x, quant, step)
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=0)
    assert float((ours - x).norm() / x.norm()) < 0.15 and not torch.equal(ours, x)


def test_a_power_of_two_that_clips_less():
    """Step 2^e for a largest value of 4 to 7 times it: 6.9 becomes 6, and 7 takes the next step."""
    quant = parse_scheme("mxfp4-amxfp4").inputs
    x = torch.zeros(2, 32)
    x[0, 0], x[1, 0] = 6.9, 7.0
    assert fake_quantize_inputs(x, quant)[:, 0].tolist() == [6.0, 8.0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_texts_and_records_hold_them(scheme):
    parsed = parse_scheme(scheme)
    assert str(parsed) == scheme and QuantScheme.from_json(parsed.to_json()) == parsed
    assert str(parse_scheme("w4anvfp4-g32")).startswith("w4anvfp4-g32")
    with pytest.raises(ToolkitError, match="fixed groups"):
        parse_scheme(f"{scheme}-atoken")


@pytest.mark.parametrize(("scheme", "method"), SCHEMES.items())
def test_transformers_loads_what_is_written(scheme, method, model, tmp_path):
    """It multiplies in bfloat16; its inputs are then rounded elsewhere now and then."""
    out = tmp_path / "out"
    assert quantize(model, out, method=method, scheme=scheme, format="compressed-tensors").result["verified"] == 14
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()
    ours = logits(load_model(out, dtype=torch.bfloat16, kernel="reference").model).float()
    exact = logits(load_model(model, dtype=torch.float32).model)
    distance = (logits(theirs).float() - ours).square().mean().sqrt()
    assert distance < (ours - exact).square().mean().sqrt()
    ptq.export(out, format="native", out=tmp_path / "native")
    again = logits(load_model(tmp_path / "native", dtype=torch.bfloat16, kernel="reference").model).float()
    if method == "rtn":
        assert torch.equal(again, ours)
    else:  # the calibrated step goes through its reciprocal
        assert (again - ours).square().mean() <= (ours - exact).square().mean()


def test_nvfp4_steps_come_from_calibration(model, tmp_path):
    quantize(model, tmp_path / "out", method="ranges+rtn", scheme="nvfp4-anvfp4", format="compressed-tensors")
    stored = load_file(tmp_path / "out/model.safetensors")
    layer = "model.layers.0.self_attn"
    scales = [stored[f"{layer}.{name}_proj.input_global_scale"] for name in "qkv"]
    assert scales[0].shape == (1,) and torch.equal(scales[0], scales[1]) and torch.equal(scales[0], scales[2])
    with pytest.raises(PlanError, match="ranges"):
        quantize(model, tmp_path / "no", method="rtn", scheme="nvfp4-anvfp4", format="compressed-tensors")


def test_other_pairs_are_refused_by_the_format(model, tmp_path):
    for scheme, method in (("nvfp4-amxfp4", "rtn"), ("w4amxfp4", "rtn"), ("w4afp4", "rtn")):
        with pytest.raises(PlanError, match="only as those of its weights"):
            quantize(model, tmp_path / "out", method=method, scheme=scheme, format="compressed-tensors")
        quantize(model, tmp_path / scheme, method=method, scheme=scheme, format="native")


def test_four_bit_codes_one_per_byte(model, tmp_path):
    """llm-compressor writes W4AFP8 so, and says ``int-quantized``."""
    quantize(model, tmp_path / "packed", method="rtn", scheme="w4afp8-g32", format="compressed-tensors")
    file = tmp_path / "packed/model.safetensors"
    stored = load_file(file)
    for name in [full.removesuffix(".weight_packed") for full in stored if full.endswith(".weight_packed")]:
        words, (out, columns) = stored.pop(f"{name}.weight_packed"), stored.pop(f"{name}.weight_shape").tolist()
        stored[f"{name}.weight"] = (unpack(words, 4, columns).to(torch.int16) - 8).to(torch.int8)
        assert stored[f"{name}.weight"].shape == (out, columns)
    expected = logits(load_model(tmp_path / "packed", dtype=torch.float32).model)
    save_file(stored, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "packed/config.json").read_text())
    config["quantization_config"]["format"] = "int-quantized"
    for group in config["quantization_config"]["config_groups"].values():
        group["format"] = "int-quantized"
    (tmp_path / "packed/config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load_model(tmp_path / "packed", dtype=torch.float32).model), expected)
