"""Where a model comes from: a local folder, the built-in demo, or the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from calibration.architectures import ArchitectureSpec, check_family, known_type, resolve
from calibration.errors import ToolkitError, foreign
from calibration.model import mxfp4
from calibration.model.checkpoint import CheckpointReader, read_config
from calibration.model.classes import empty_model, joined, renaming, text_config
from calibration.model.float8 import FLOATS, check_dtypes, has_whole_blocks, is_float8, with_scales
from calibration.model.gguf import SUFFIX, folder_of, open_reader, said

META = torch.device("meta")
DEMO = "demo"
DEMO_FOLDER = Path(__file__).parents[1] / "demo"
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*"]  # never pickles
NOT_FILES = ["consolidated*.safetensors", "*/*"]  # the same weights once more, in other layouts


def locate(model: str | Path) -> Path:
    """The folder of a checkpoint; a hub id is downloaded into the hub cache first, and a GGUF file gets one.

    Raises:
        ToolkitError: no such folder, or the hub does not give it.
    """
    if str(model) == DEMO:
        return DEMO_FOLDER
    path = Path(model)
    if path.is_dir():
        if not any(path.iterdir()):
            raise ToolkitError(f"{path}: the folder is empty", "name a folder with config.json and *.safetensors")
        return path
    if path.suffix.lower() == SUFFIX and path.is_file():
        return folder_of(path)
    if path.exists():
        raise ToolkitError(f"{path}: is a file", "name the folder that holds config.json and *.safetensors, or a .gguf")
    if len(path.parts) > 2 or str(model).startswith((".", "/", "~")):
        raise ToolkitError(f"{path}: no such folder", "check the path, or use a hub id such as org/name")
    return _download(str(model))


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(model, allow_patterns=FILES, ignore_patterns=NOT_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ToolkitError(
            f"{model}: neither a local folder nor to be had from the hub ({reason})",
            "check the spelling and the network, log in for gated models (hf auth login), or name a local folder",
        ) from None


def open_model(
    folder: Path, trust_remote_code: bool = False, coded: bool = False
) -> tuple[CheckpointReader, Any, ArchitectureSpec]:
    """Headers, transformers config and architecture of a checkpoint; no tensor is read.

    Args:
        coded: float8 blocks of compressed-tensors stay the codes of a quantized checkpoint, where whole blocks divide
            the rows; otherwise they count as the float weights that they stand for.

    Raises:
        ToolkitError: broken folder, unknown architecture, code of the checkpoint's own without permission.
    """
    data = read_config(folder)
    if "auto_map" in data and not trust_remote_code and not known_type(str(data.get("model_type"))):
        raise ToolkitError(
            f"{folder}: model_type '{data.get('model_type')}' needs Python code that comes with the checkpoint",
            "read that code, then pass --trust-remote-code",
        )
    if (folder / "adapter_config.json").exists():
        raise ToolkitError(
            f"{folder}: a model with an adapter beside it (adapter_config.json), which would be lost",
            "merge the adapter into the model first, or move its files away to work on the base model alone",
        )
    reader = open_reader(folder)
    quantized = data.get("quantization_config")
    if not isinstance(quantized, dict | None):
        what = f"quantization_config is {str(quantized)[:80]!r}, not an object"
        raise ToolkitError(f"{folder}/config.json: {what}", "fetch config.json again, or remove that key")
    floats = quantized is None or (is_float8(quantized) and not (coded and has_whole_blocks(quantized, reader.infos)))
    if floats or (quantized or {}).get("quant_method") == mxfp4.METHOD:
        reader.infos = with_scales(mxfp4.with_blocks(reader.infos, _named_dtype(data)), _named_dtype(data))
        reader.config = {key: value for key, value in data.items() if key != "quantization_config"}
    check_family(str(data.get("model_type")), reader.infos)
    from transformers import AutoConfig

    fix = "compare it with the model's original config"
    with foreign(said(folder, "config.json"), fix):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if "quantization_config" not in reader.config and hasattr(config, "quantization_config"):
        del config.quantization_config
    with foreign(f"{said(folder, 'config.json')}: describes no model that can be built", fix):
        spec = resolve(config)
        if "quantization_config" not in reader.config:
            check_dtypes(reader.infos, spec.blocks)
        if spec.derived:
            _as_the_class_names(reader, empty_model(config, torch.float32, META, spec.attention), spec)
    reader.add_base_prefix(spec.base_prefix, (*(stored for stored, _ in spec.root_renames), "lm_head."))
    _check_blocks(reader, spec)
    return reader, config, spec


def _as_the_class_names(reader: CheckpointReader, model: Any, spec: ArchitectureSpec) -> None:
    """Names of the class in place of the file's; what the class keeps as one is read as one, but for experts that the
    spec takes apart."""
    rename, known = renaming(model), {name: tensor.shape for name, tensor in model.state_dict().items()}
    reader.rename(lambda name: name if name in known else rename(name))
    experts = {f"{spec.prefix(i)}{found.module}" for i in range(spec.n_blocks) if (found := spec.experts(i))}
    for target, parts in joined(model, [name for name in reader.infos if name not in known]).items():
        if target in known and target.rpartition(".")[0] not in experts:
            reader.join(target, parts, known[target])


def _check_blocks(reader: CheckpointReader, spec: ArchitectureSpec) -> None:
    """Refuse a config that counts other blocks than are stored: half a model would pass for a whole one. Layers that
    predict further tokens lie behind the counted ones, and the config says how many they are."""
    pattern = re.compile(rf"{re.escape(spec.blocks)}\.(\d+)\.")
    stored = 1 + max((int(m[1]) for name in reader.infos if (m := pattern.match(name))), default=-1)
    further = reader.config.get("num_nextn_predict_layers")
    most = spec.n_blocks + (further if isinstance(further, int) else 0)
    if spec.n_blocks < 1 or (stored and not spec.n_blocks <= stored <= most):
        raise ToolkitError(
            f"{said(reader.folder, 'config.json')}: counts {spec.n_blocks} layers, the checkpoint stores {stored}",
            "compare it with the model's original config, and fetch shards that are missing",
        )


def _named_dtype(data: dict[str, Any]) -> torch.dtype:
    """The dtype that ``config.json`` gives; bfloat16 where it gives none."""
    named = str(data.get("dtype") or data.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    found = getattr(torch, named, torch.bfloat16)
    return found if found in FLOATS else torch.bfloat16


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        ToolkitError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    with foreign(f"{said(folder)}: no usable tokenizer", "copy the tokenizer files of the model into the folder"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def fingerprint(reader: CheckpointReader) -> str:
    """sha256 (first 16 hex digits) over config, tensor names, shapes and dtypes, and the sizes of the files."""
    tensors = sorted((n, str(i.dtype), i.shape, i.shard) for n, i in reader.infos.items())
    sizes = sorted((s, (reader.folder / s).stat().st_size) for s in {i.shard for i in reader.infos.values()})
    blob = json.dumps([reader.config, tensors, sizes], sort_keys=True, default=str)
    return hashlib.sha256(blob.encode()).hexdigest()[:16]


def weights_fingerprint(reader: CheckpointReader) -> str:
    """sha256 (first 16 hex digits) over names, shapes, dtypes and the first bytes of all tensors.

    It tells fine-tuned models of one shape apart, which `fingerprint` does not, and stays the same when the config is
    edited or the shards are cut anew. A page of each tensor is read.
    """
    digest = hashlib.sha256()
    for name, info in sorted(reader.infos.items()):
        digest.update(f"{name} {info.dtype} {info.shape} ".encode())
        digest.update(reader.first_bytes(name, 4096))
    reader.close()
    return digest.hexdigest()[:16]


def forward_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of calibration forwards: the checkpoint's own where the machine multiplies it fast, else float32."""
    if device.type == "cuda":
        return stored if stored in (torch.bfloat16, torch.float16) else torch.float32
    fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if stored == torch.bfloat16 and fast else torch.float32


def context_length(config: Any) -> int:
    """The longest window that a model takes; 2048 where its config names none (ALiBi, XLNet)."""
    for name in ("max_position_embeddings", "n_positions", "seq_length"):
        value = getattr(text_config(config), name, None)
        if value and int(value) > 0:
            return int(value)
    return 2048
