"""What llama.cpp calls a model: its architecture, the keys of its settings, the names of its tensors.

Names come from the ``gguf`` package; what else differs from the checkpoint is in `calibration.model.gguf_families`.
Source: ``conversion/`` of llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from calibration.errors import Problem, ToolkitError
from calibration.model.gguf_families import FAMILIES, Family, window_pattern
from ptq.formats import checks
from ptq.linears import ModelLayout


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a checkpoint that passed `model_problems`."""
    return FAMILIES[str(config["model_type"])]


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters of full attention, from configs of transformers 4 and 5."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope = dict(rope.get("full_attention", rope))
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return rope | {"rope_type": rope.get("rope_type") or rope.get("type") or "default"}


def _rotated_share(config: Mapping[str, Any]) -> float:
    """The part of a head's channels that is rotated."""
    return float(_rope(config).get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)


def model_problems(layout: ModelLayout) -> list[Problem]:
    """Why llama.cpp cannot hold this model, or this toolkit does not write it there."""
    config = layout.config
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        return [Problem(f"model_type {kind}", f"is not written to 'gguf'; {', '.join(FAMILIES)} are", checks.NATIVE)]
    found = []
    if config.get("mlp_bias"):
        found.append(Problem("mlp_bias", "llama.cpp has no biases in the feed-forward part of llama", checks.NATIVE))
    types = config.get("layer_types")
    if FAMILIES[kind].window and types and list(types) != window_pattern(kind, len(types)):
        reason = f"llama.cpp has another pattern of windows for {kind} in its code"
        found.append(Problem("layer_types", reason, checks.NATIVE))
    rope = _rope(config)
    if rope["rope_type"] not in ("default", "linear", "llama3", "yarn"):
        reason = f"rope_type '{rope['rope_type']}' is not written to 'gguf'"
        found.append(Problem("rope_parameters", reason, checks.NATIVE))
    if _rotated_share(config) != 1.0 and not FAMILIES[kind].joined:
        reason = "llama.cpp rotates whole heads in this architecture"
        found.append(Problem("partial_rotary_factor", reason, checks.NATIVE))
    return found


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of the architecture and their values, as Python integers, floats and strings."""
    family, heads, rope = family_of(config), int(config["num_attention_heads"]), _rope(config)
    width = int(config.get("head_dim") or config["hidden_size"] // heads)
    context = int(config["max_position_embeddings"])
    if not family.window and config.get("sliding_window") and config.get("use_sliding_window", True):
        context = min(context, int(config["sliding_window"]))  # llama.cpp has no windows there: they agree up to it
    values: dict[str, Any] = {
        "context_length": context,
        "embedding_length": int(config["hidden_size"]),
        "block_count": int(config["num_hidden_layers"]),
        "feed_forward_length": int(config["intermediate_size"]),
        "attention.head_count": heads,
        "attention.head_count_kv": int(config.get("num_key_value_heads") or heads),
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(width * _rotated_share(config)),
        "vocab_size": int(config["vocab_size"]),
    }
    if rope["rope_type"] in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        values["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    if family.window and config.get("sliding_window"):
        values["attention.sliding_window"] = int(config["sliding_window"])
    local = (config.get("rope_parameters") or {}).get("sliding_attention", {}).get("rope_theta")
    if local is not None and family.architecture == "gemma3":
        values["rope.freq_base_swa"] = float(local)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key):
            values[key] = float(config[key])
    return {f"{family.architecture}.{key}": value for key, value in values.items()}


def rotary_factors(config: Mapping[str, Any]) -> torch.Tensor | None:
    """``rope_freqs.weight`` float32 ``[head_dim / 2]`` of Llama 3.1's scaling, by which frequencies are divided; None
    for other rotary embeddings. Wavelengths beyond the low bound are stretched by ``factor``, those below the high
    bound are kept, and those between blend."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    width = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    exponent = torch.arange(0, width, 2, dtype=torch.float32) / width
    turns = rope["original_max_position_embeddings"] * rope["rope_theta"] ** -exponent / (2 * math.pi)
    low, high, factor = float(rope["low_freq_factor"]), float(rope["high_freq_factor"]), float(rope["factor"])
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def tensor_names(config: Mapping[str, Any]) -> Any:
    """The ``gguf`` package's table of names for this architecture."""
    import gguf

    architecture = family_of(config).architecture
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(arch, int(config["num_hidden_layers"]))


def tensor_name(name: str, table: Any) -> str:
    """llama.cpp's name of a tensor of the checkpoint.

    Raises:
        ToolkitError: it has none.
    """
    found = table.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ToolkitError(
            f"{name}: llama.cpp has no tensor for it", f"this is a bug of ptq; meanwhile {checks.NATIVE}"
        )
    return str(found)


def require_gguf() -> None:
    """Refuse before any work where the package is missing.

    Raises:
        ToolkitError: the package ``gguf`` is not installed.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ToolkitError("--format gguf: the package 'gguf' is not installed", "pip install 'ptq[gguf]'") from None
