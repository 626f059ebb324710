"""Files of ours opened by plain transformers: the logits are those of a dense model with the dequantized weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from calibration.model.checkpoint import CheckpointReader, save_tensors
from ptq.formats.readback import compare
from ptq.formats.registry import FORMATS, format_of
from ptq.linears import ModelLayout, PlannedLinear
from ptq.methods.rtn import round_to_nearest
from ptq.scheme import parse_scheme

SIZES = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 128, "head_dim": 32}


def logits(folder: Path, dtype: torch.dtype, **options: Any) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        return model.eval()(torch.arange(24).view(2, 12)).logits


def check(
    tmp_path: Path,
    family: str,
    rule: Callable[[str], str | None],
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> None:
    """Write a tiny model whose linears have the schemes of ``rule`` and load it with transformers in ``dtype``."""
    fmt = FORMATS["compressed-tensors"]
    sizes = SIZES if family == "llama" else {}
    linears, tensors, dense, written = [], {}, {}, {}
    with CheckpointReader(save_tiny(family, tmp_path / "float", **sizes)) as reader:
        for key, info in reader.infos.items():
            name, parts = key.removesuffix(".weight"), key.split(".")
            tensor = reader.tensor(key)
            tensors[key] = dense[key] = tensor
            if "layers" not in parts or len(info.shape) < 2 or parts[-2] == "gate":
                continue
            text = rule(name)
            scheme = parse_scheme(text) if text else None
            expert = int(parts[parts.index("experts") + 1]) if "experts" in parts else None
            linears.append(PlannedLinear(name, int(parts[2]), (info.shape[0], info.shape[1]), scheme, expert=expert))
            if scheme is not None:
                written[name] = q = round_to_nearest(tensor.float(), scheme)
                del tensors[key]
                dense[key] = q.dequantize(dtype)
                tensors |= {f"{name}.{suffix}": t for suffix, t in fmt.encode(q, torch.float32).items()}
        others = ["lm_head", *(key.removesuffix(".weight") for key in reader.infos if key.endswith(".gate.weight"))]
        layout = ModelLayout(reader.config, tuple(linears), tuple(others), "model.layers", False, "float32")
        config = dict(reader.config)
    assert fmt.check(layout) == []
    for kind, content, extra in (
        ("dense", dense, {}),
        ("packed", tensors, {"quantization_config": fmt.config(layout)}),
    ):
        (tmp_path / kind).mkdir()
        save_tensors(tmp_path / kind / "model.safetensors", content)
        (tmp_path / kind / "config.json").write_text(json.dumps({**config, **extra}))
    expected, found = logits(tmp_path / "dense", dtype), logits(tmp_path / "packed", dtype, **options)
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()
    with CheckpointReader(tmp_path / "packed") as reader:  # and by our own readers, from the files alone
        ours = format_of(reader.config)
        assert ours is fmt
        schemes = ours.schemes(reader.config, reader.infos, reader.tensor)
        assert schemes.keys() == written.keys()
        for name, (scheme, shape) in schemes.items():
            names = {s: f"{name}.{s}" for s in ours.suffixes if f"{name}.{s}" in reader.infos}
            parts_of = {s: reader.tensor(full) for s, full in names.items()}
            assert torch.equal(ours.decode(parts_of, scheme, shape).dequantize(), written[name].dequantize())
            compare(name, written[name], ours.name, parts_of)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_llama_symmetric(tmp_path, bits):
    check(tmp_path, "llama", lambda name: f"w{bits}a16-{'gchannel' if bits == 8 else 'g64'}-sym")


FP4 = [lambda name: "nvfp4", lambda name: "mxfp4", lambda name: "mxfp4" if "mlp" in name else "w8a16-g32-sym"]


@pytest.mark.parametrize("rule", FP4, ids=["nvfp4", "mxfp4", "mixed"])
def test_llama_fp4(tmp_path, rule):
    """transformers decompresses FP4 to bfloat16 and multiplies by nothing else."""
    check(tmp_path, "llama", rule, torch.bfloat16)


def test_llama_two_schemes_and_float_linears(tmp_path):
    def rule(name: str) -> str | None:
        return None if "o_proj" in name else "w3a16-g32-sym" if "mlp" in name else "w8a16-gchannel-sym"

    check(tmp_path, "llama", rule)


def test_llama_asymmetric_needs_dequantize(tmp_path):
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    check(tmp_path, "llama", lambda name: "w4a16-g32-asym", **options)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("attention", ["w4a16-g32-sym", "w8a16-gchannel-sym", None])
def test_experts(tmp_path, family, attention):
    check(tmp_path, family, lambda name: attention if "self_attn" in name else "w4a16-g32-sym")
