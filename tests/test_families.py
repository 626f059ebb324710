"""Every family through the whole pipeline: what is written is what runs, here and in plain transformers."""

from __future__ import annotations

import json

import pytest
from tiny_models import EVERY_FAMILY
from tiny_runs import assert_close, dense, logits, plain_model, quantize, tiny_checkpoint
from transformers import CompressedTensorsConfig

import ptq
from calibration.errors import PlanError
from ptq.runtime.load import load_model

DEQUANTIZE = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
CONV1D = ("gpt2",)  # linears that no reader of compressed-tensors replaces
OWN_LINEAR = ("falcon-7b", "falcon-40b", "falcon-rw")  # linears that plain transformers must dequantize


def attention_of(family: str) -> dict[str, str]:
    """The implementation that load_model takes: BLOOM and Gemma 2 know no other than eager."""
    return {"attn_implementation": "eager" if family in ("bloom", "gemma2") else "sdpa"}


def plain_logits(folder, family):
    """Logits of our compressed-tensors output by nothing but transformers."""
    options = DEQUANTIZE if family in OWN_LINEAR else {}
    return logits(plain_model(folder, **options, **attention_of(family)))


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_awq_into_the_default_format(family, tmp_path):
    source, out = tiny_checkpoint(family, tmp_path / "float"), tmp_path / "out"
    record = quantize(source, out)
    assert record.result["format"] == ("native" if family in CONV1D else "compressed-tensors")
    reference = plain_model(dense(out, tmp_path / "dense", transposed=family in CONV1D), **attention_of(family))
    expected = logits(reference)
    assert_close(logits(load_model(out).model), expected)
    unchanged = logits(plain_model(source, **attention_of(family)))
    assert (unchanged - expected).abs().max() > 1e-3 * expected.abs().max()
    if family not in CONV1D:
        assert_close(plain_logits(out, family), expected)
        says = record.result["loads_in"]["transformers"]
        assert says.startswith("yes") and ("dequantize=True" in says) == (family in OWN_LINEAR)
        ptq.export(out, format="native", out=tmp_path / "native")
        assert_close(logits(load_model(tmp_path / "native").model), expected)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_gptq_into_the_native_format(family, tmp_path):
    out, packed = tmp_path / "out", tmp_path / "packed"
    record = quantize(tiny_checkpoint(family, tmp_path / "float"), out, method="gptq", format="native")
    expected = logits(plain_model(dense(out, tmp_path / "dense", transposed=family in CONV1D), **attention_of(family)))
    assert_close(logits(load_model(out).model), expected)
    assert record.result["verified"] == record.result["quantized_linears"] == len(record.linears) > 0
    assert all(entry.relative_error is not None and entry.relative_error < 0.1 for entry in record.linears)
    if family in CONV1D:
        with pytest.raises(PlanError, match="is a Conv1D"):
            ptq.export(out, format="compressed-tensors", out=packed)
    else:
        ptq.export(out, format="compressed-tensors", out=packed)
        assert_close(plain_logits(packed, family), expected)


@pytest.mark.parametrize("family", ["opt-post-norm", "qwen3_moe", "gpt_neox"])
def test_what_stays_in_float_is_named(family, tmp_path):
    """Linears outside the blocks are in ``ignore``; without it transformers would look for packed ones."""
    quantize(tiny_checkpoint(family, tmp_path / "float"), tmp_path / "out", method="rtn")
    ignored = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]
    others = {
        "opt-post-norm": ["lm_head", "model.decoder.project_in", "model.decoder.project_out"],
        "qwen3_moe": ["lm_head", "model.layers.0.mlp.gate"],  # layer 1 is dense
        "gpt_neox": ["lm_head"],
    }
    assert ignored == others[family]
