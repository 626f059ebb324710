"""Tiny checkpoints with a tokenizer, quantized through the Python API, and plain models to compare the results with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import byte_tokenizer
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

import ptq
from calibration.record import RunRecord
from ptq.formats.native import WEIGHTS_KEY
from ptq.formats.readback import read_codes
from ptq.scheme import parse_scheme

VOCABULARY = 288  # 256 bytes, one special token, padding
IDS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(3))
TEXT = " ".join(f"line {i} of a text that says {i * i % 97} and nothing else\n" for i in range(60))
PACKED = {"compressed-tensors": ".weight_packed", "native": ".codes", "gptq": ".qweight", "awq": ".qweight"}


def tiny_checkpoint(family: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A tiny model of a family with a tokenizer of bytes beside it."""
    save_tiny(family, folder, dtype, **{"vocab_size": VOCABULARY, **changes})
    byte_tokenizer().save_pretrained(folder)
    return folder


def text_file(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def quantize(model: Path, out: Path, **settings: Any) -> RunRecord:
    """One run on a few samples, ``w4a16-g32`` by AWQ unless told otherwise."""
    defaults = {"method": "awq", "scheme": "w4a16-g32", "samples": 8, "seq_len": 32}
    return ptq.quantize(model, out=out, dataset=str(text_file(out.parent)), **{**defaults, **settings})


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """Change the tensors of a checkpoint of one file."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return folder


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def dense(folder: Path, to: Path, scheme_text: str = "w4a16-g32-sym", transposed: bool = False) -> Path:
    """The float checkpoint that a quantized one stands for, decoded with the independent reader."""
    scheme, tensors, quantized = parse_scheme(scheme_text), load_file(folder / "model.safetensors"), {}
    config = json.loads((folder / "config.json").read_text())
    method = config.pop("quantization_config")["quant_method"]
    config.pop(WEIGHTS_KEY, None)
    label = "native" if method == "ptq" else method
    for key in [key for key in tensors if key.endswith(PACKED[label])]:
        name = key.removesuffix(PACKED[label])
        parts = {k.removeprefix(name + "."): tensors.pop(k) for k in list(tensors) if k.startswith(name + ".")}
        bias = parts.pop("bias", None)
        if "weight_shape" in parts:
            out, columns = parts["weight_shape"].tolist()
        else:
            assert label == "native"
            out, columns = parts["codes"].shape[0], 32 * parts["scale"].shape[1]
        codes, scale, zero = read_codes(label, parts, scheme, (out, columns))
        shift = torch.from_numpy(zero).float() if zero is not None else torch.full((out, 1), 8.0)
        groups = torch.from_numpy(codes).float().view(out, -1, 32)
        w = ((groups - shift[..., None]) * torch.from_numpy(scale)[..., None]).view(out, columns)
        quantized[f"{name}.weight"] = (w.T if transposed else w).contiguous()
        if bias is not None:
            tensors[f"{name}.bias"] = bias
    to.mkdir()
    save_file({**tensors, **quantized}, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text(json.dumps(config))
    return to


def plain_model(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """Plain transformers, every tensor of the file used and none missing."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest logit."""
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
