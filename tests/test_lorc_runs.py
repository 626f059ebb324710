"""Low-rank corrections from the command line to the runtime, and as a PEFT adapter beside another format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import done, process, products, refused, run_ptq, text_file, tiny
from runtime_layers import BF16, FP32, inputs, quantized
from safetensors.torch import load_file
from tiny_runs import IDS, assert_close, logits

from calibration.record import read_record
from ptq.numerics.lowrank import low_rank, quantize_factors
from ptq.quantized import LORA, PARTS, QuantizedTensor
from ptq.runtime.linear import QuantLinear
from ptq.runtime.load import load_model

SMALL = ("--samples", "4", "--seq-len", "24", "--scheme", "w2a16-g32")
RANK = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lorc")
    text_file(folder / "text.txt")
    tiny(folder / "llama", intermediate_size=128)
    words = ["--method", "gptq+lorc", "--dataset", folder / "text.txt", *SMALL]
    out = done("quantize", folder / "llama", *words, "--out", folder / "native")
    assert "native" in out and "read back and compared: 14" in out
    return folder


def test_bits_are_those_of_the_file(place):
    """Bits per weight count the factors, in the plan, in every linear's record and in the file."""
    record, stored = read_record(place / "native"), load_file(place / "native/model.safetensors")
    kept = {n: t for n, t in stored.items() if not n.endswith(("norm.weight", "lm_head.weight", "embed_tokens.weight"))}
    total = 8 * sum(t.nbytes for t in kept.values())
    assert total == record.result["bits_per_weight"] * record.result["quantized_weights"]
    assert total == sum(e.bits_per_weight * e.shape[0] * e.shape[1] for e in record.linears)
    first = record.linears[0]
    assert first.bits_per_weight == 2 + 16 / 32 + RANK * (8 * sum(first.shape) + 32) / (first.shape[0] * first.shape[1])
    assert 0 < first.notes["lorc.error_left"] < 1
    assert set(PARTS) >= set(LORA)


def test_a_killed_run_resumes_to_the_same_bytes(place, monkeypatch):
    words = ["quantize", place / "llama", "--method", "gptq+lorc", "--dataset", place / "text.txt", *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr("ptq.run.pipeline.write_checkpoint", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run_ptq(*words, "--out", place / "again").code == 130
    last = place / "again.partial/blocks/block-00001.safetensors"
    last.unlink()
    done(*words, "--out", place / "again", "--resume")
    assert products(place / "again") == products(place / "native")


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("scheme", ["w4a16-g32-sym", "w8a16-gchannel-sym", "w2a16-g32-asym"])
def test_factors_beside_every_kernel_equal_the_folded_weight(scheme, dtype):
    q, bias = quantized(scheme, 48, 96), inputs(48, dtype=dtype)
    error = 0.05 * torch.randn(48, 96, generator=torch.Generator().manual_seed(2))
    for bits in (8, 16):
        parts = dict(zip(LORA, quantize_factors(*low_rank(error, 6, None), bits), strict=True))
        whole = QuantizedTensor(q.codes, q.scale, q.zero, q.scheme, q.group_index, parts)
        layer, x = QuantLinear(whole, bias, dtype), inputs(2, 5, 96, dtype=dtype)
        expected = x.float() @ whole.dequantize().T + bias.float()
        tolerance = 1e-5 if dtype == FP32 else 0.02
        assert (layer(x).float() - expected).abs().max() <= tolerance * expected.abs().max()
        assert (layer(x).float() - (x.float() @ q.dequantize().T + bias.float())).abs().max() > 0.05
        assert layer.weight_bytes > QuantLinear(q, bias, dtype).weight_bytes


def test_the_adapter_stands_beside_compressed_tensors(place):
    done("export", place / "native", "--format", "compressed-tensors", "--adapter", "--out", place / "ct")
    ours, beside = (logits(load_model(place / f, dtype=FP32).model) for f in ("native", "ct"))
    assert_close(beside, ours)
    config = json.loads((place / "ct/adapter/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == RANK and len(config["target_modules"]) == 14
    message = refused("export", place / "ct", "--format", "native", "--out", place / "back")
    assert "low-rank adapter" in message and "native checkpoint" in message


def test_peft_gives_the_logits_of_the_native_runtime(place):
    peft = pytest.importorskip("peft", reason="peft, which defines the adapter format, is not installed")
    from transformers import AutoModelForCausalLM

    if not (place / "ct").exists():
        done("export", place / "native", "--format", "compressed-tensors", "--adapter", "--out", place / "ct")
    base = AutoModelForCausalLM.from_pretrained(place / "ct", dtype=FP32)
    expected = logits(load_model(place / "native", dtype=FP32).model)
    assert (logits(base) - expected).abs().max() > 0.01 * expected.abs().max(), "the base alone is another model"
    model = peft.PeftModel.from_pretrained(base, place / "ct/adapter").eval()
    with torch.no_grad():
        assert_close(model(IDS % 260).logits, logits(load_model(place / "native", dtype=FP32).model))


REFUSALS = {
    "rank": ("rank = 400", "rank 400 is larger than the smaller side of the layer, 32", "use rank 32 or less"),
    "no rank": ("rank = 0", "lorc.rank: 0 is not positive", "use 8"),
    "bits": ("bits = 4", "4-bit factors have no layout", "use 8 or 16"),
    "weighting": ('weighting = "grams"', "unknown value 'grams'", "did you mean 'gram'?"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_settings_are_refused_in_the_plan(case, place, tmp_path):
    setting, *parts = REFUSALS[case]
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'scheme = "w2a16-g32"\n[[pass]]\nname = "rtn"\n[[pass]]\nname = "lorc"\n{setting}\n')
    message = refused("quantize", place / "llama", "--recipe", recipe, "--out", tmp_path / "out", "--dry-run")
    assert all(part in message for part in parts), message
    if case == "rank":
        recipe.write_text(recipe.read_text().replace("400", "32"))  # the fix
        done("quantize", place / "llama", "--recipe", recipe, "--out", tmp_path / "out", "--dry-run")


def test_formats_without_a_place_are_refused_with_a_way_out(place):
    words = ["quantize", place / "llama", "--method", "rtn+lorc", *SMALL, "--out", place / "no", "--dry-run"]
    message = refused(*words, "--format", "compressed-tensors")
    assert "lora_b" in message and "--format native" in message and "ptq export --adapter" in message
    assert "no place" in refused(*words, "--format", "gptq")
    assert "no place" in refused("export", place / "native", "--format", "compressed-tensors", "--out", place / "no")
    plain = place / "plain"
    done("quantize", place / "llama", "--method", "rtn", *SMALL, "--out", plain)
    message = refused("export", plain, "--format", "compressed-tensors", "--adapter", "--out", place / "no")
    assert "no low-rank parts" in message


def test_order(place):
    message = refused("quantize", place / "llama", "--method", "lorc+gptq", *SMALL, "--dry-run")
    assert "write gptq+lorc" in message


def test_in_a_process_of_its_own(place):
    result = process("export", "--help")
    assert result.returncode == 0 and "--adapter" in result.stdout
