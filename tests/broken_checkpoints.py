"""Ways to break the checkpoint in the folder ``m``, and what the refusal must say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def missing_folder(place: Path) -> None:
    shutil.rmtree(place / "m")


def empty_folder(place: Path) -> None:
    missing_folder(place)
    (place / "m").mkdir()


def a_file(place: Path) -> None:
    missing_folder(place)
    (place / "m").write_text("")


def only_pickles(place: Path) -> None:
    (place / "m/model.safetensors").rename(place / "m/pytorch_model.bin")


def no_weights(place: Path) -> None:
    (place / "m/model.safetensors").unlink()


def truncated(place: Path) -> None:
    path = place / "m/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def empty_shard(place: Path) -> None:
    (place / "m/model.safetensors").write_bytes(b"")


def corrupt_header(place: Path) -> None:
    path = place / "m/model.safetensors"
    data = bytearray(path.read_bytes())
    data[10:40] = b"#" * 30
    path.write_bytes(data)


def huge_header(place: Path) -> None:
    path = place / "m/model.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def missing_shard(place: Path) -> None:
    names = load_file(place / "m/model.safetensors")
    (place / "m/model.safetensors").rename(place / "m/model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00002.safetensors") | {"x": "model-00002-of-00002.safetensors"}
    (place / "m/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def corrupt_index(place: Path) -> None:
    (place / "m/model.safetensors").rename(place / "m/model-00001-of-00001.safetensors")
    (place / "m/model.safetensors.index.json").write_text('{"weight_map": ')


def no_config(place: Path) -> None:
    (place / "m/config.json").unlink()


def corrupt_config(place: Path) -> None:
    (place / "m/config.json").write_text('{"model_type": "llama",')


def list_config(place: Path) -> None:
    (place / "m/config.json").write_text("[]")


def config_changes(**changes: object) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        path = place / "m/config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def tensor_changes(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(place: Path) -> None:
        tensors = load_file(place / "m/model.safetensors")
        change(tensors)
        save_file(tensors, place / "m/model.safetensors", metadata={"format": "pt"})

    return rewrite


def value(name: str, number: float) -> Callable[[Path], None]:
    return tensor_changes(lambda tensors: tensors[name].view(-1)[7:9].fill_(number))


def without(*names: str) -> Callable[[Path], None]:
    return tensor_changes(lambda tensors: [tensors.pop(name) for name in names])


def without_tokenizer(place: Path) -> None:
    for path in (place / "m").glob("tokenizer*"):
        path.unlink()


def adapter_alone(place: Path) -> None:
    missing_folder(place)
    (place / "m").mkdir()
    (place / "m/adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')


def adapter_beside(place: Path) -> None:
    (place / "m/adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')


def tokenizer_alone(place: Path) -> None:
    (place / "m/model.safetensors").unlink()
    (place / "m/config.json").unlink()


DOWN = "model.layers.1.mlp.down_proj.weight"
MODELS = {
    "missing folder": (missing_folder, "m: no such folder", "check the path"),
    "empty folder": (empty_folder, "m: the folder is empty", "config.json and *.safetensors"),
    "a file": (a_file, "m: is a file", "name the folder"),
    "only pickles": (only_pickles, "only pickle files (pytorch_model.bin)", "convert them first"),
    "no weights": (no_weights, "no safetensors files", "name a folder"),
    "truncated shard": (truncated, "model.safetensors: truncated or corrupt", "expected", "fetch this file again"),
    "empty shard": (empty_shard, "model.safetensors: corrupt safetensors header", "fetch this file again"),
    "corrupt header": (corrupt_header, "model.safetensors: corrupt safetensors header", "fetch this file again"),
    "huge header": (huge_header, "model.safetensors: truncated or corrupt", "fetch this file again"),
    "missing shard": (missing_shard, "model-00002-of-00002.safetensors: missing shard", "fetch the missing file"),
    "corrupt index": (corrupt_index, "index.json: not readable as JSON", "fetch this file again"),
    "no config": (no_config, "config.json: no such file", "Hugging Face checkpoint"),
    "adapter alone": (adapter_alone, "m: an adapter of org/base, not a model", "merge it first"),
    "adapter beside the model": (adapter_beside, "adapter beside it", "would be lost", "merge the adapter"),
    "tokenizer alone": (tokenizer_alone, "m: a tokenizer without a model", "Hugging Face checkpoint"),
    "corrupt config": (corrupt_config, "config.json: not readable as JSON", "fetch this file again"),
    "config is no object": (list_config, "config.json: holds a list", "fetch this file again"),
    "config of a wrong type": (config_changes(hidden_size="wide"), "config.json", "wide", "original config"),
    "config of another size": (config_changes(hidden_size=128), "128", "config.json"),
    "NaN weight": (value(DOWN, float("nan")), f"{DOWN} in model.safetensors: 2 of 6144 values are NaN or Inf"),
    "Inf weight": (value("model.norm.weight", float("inf")), "model.norm.weight in model.safetensors: 2 of 64 values"),
    "missing linear": (without(DOWN), DOWN, "not in the checkpoint"),
    "missing embedding": (without("model.embed_tokens.weight"), "model.embed_tokens.weight"),
    "missing norm": (without("model.layers.0.input_layernorm.weight"), "model.layers.0.input_layernorm.weight"),
    "unknown linear": (
        tensor_changes(lambda t: t.update({"model.layers.0.mlp.extra.weight": torch.ones(32, 32)})),
        "model.layers.0.mlp.extra", "does not name",
    ),
    "other tensors": (tensor_changes(lambda t: (t.clear(), t.update(x=torch.ones(2)))), "in the architecture table"),
    "unknown architecture": (
        config_changes(model_type="llamo"),
        "model_type 'llamo' is not in the architecture table, and transformers has no",
        "model.layers.0.mlp.down_proj.weight",
        "did you mean 'llama'?", "To add it", "FAMILIES",
    ),
    "quantized already": (
        config_changes(quantization_config={"quant_method": "awq"}), "already quantized (quant_method 'awq')", "float",
    ),
    "no tokenizer": (without_tokenizer, "no usable tokenizer", "copy the tokenizer files"),
}  # fmt: skip
