"""The architecture table: one small function per model family, data only; other types are derived from their class."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from calibration.architectures import layernorm, llama_like
from calibration.architectures.spec import (
    ArchitectureSpec,
    Balance,
    BlockSpec,
    Experts,
    Family,
    FeedForward,
    Heads,
    NormKind,
    Residual,
    SharedInput,
    described,
)
from calibration.errors import ToolkitError, nearest

FAMILIES: dict[str, Family] = {
    "llama": llama_like.llama,
    "mistral": llama_like.llama,
    "qwen2": llama_like.llama,
    "qwen3": llama_like.llama,
    "gemma2": llama_like.gemma2,
    "gemma3_text": llama_like.gemma3,
    "phi3": llama_like.phi3,
    "mixtral": llama_like.mixtral,
    "qwen3_moe": llama_like.qwen3_moe,
    "opt": layernorm.opt,
    "gpt2": layernorm.gpt2,
    "gpt_neox": layernorm.gpt_neox,
    "bloom": layernorm.bloom,
    "falcon": layernorm.falcon,
    "starcoder2": layernorm.starcoder2,
}


_derived: dict[tuple[type, str], ArchitectureSpec] = {}


def known_type(model_type: str) -> bool:
    """Whether the table names this type, or transformers has a class from which `resolve` derives its entry: one of its
    own, or one registered with its auto classes."""
    if model_type in FAMILIES:
        return True
    from transformers.models.auto import configuration_auto, modeling_auto

    registered = configuration_auto.CONFIG_MAPPING._extra_content.get(model_type)
    if registered is not None:
        return registered in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    wrappers = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or model_type in wrappers


def check_family(model_type: str, names: Iterable[str]) -> None:
    """Refuse a model type that neither the table nor transformers knows, showing what its first block looks like.

    Args:
        model_type: of ``config.json``.
        names: tensor names of the checkpoint.
    """
    if known_type(model_type):
        return
    first = sorted(n for n in names if ".0." in n and n.endswith(".weight"))[:40]
    listing = "\n        ".join(first) or "(no block tensors found)"
    raise ToolkitError(
        f"model_type '{model_type}' is not in the architecture table, and transformers has no language model of that "
        f"type; its first block holds\n        {listing}",
        f"{nearest(model_type, FAMILIES)}known: {', '.join(FAMILIES)}. To add it, write a function like `llama` in "
        "calibration/architectures/llama_like.py that names the linears sharing an input and the norms before them, "
        "and list it in FAMILIES",
    )


def resolve(config: Any) -> ArchitectureSpec:
    """The spec for a transformers config whose ``model_type`` passed `check_family`.

    Types that the table does not name are derived, once per process, class and config.

    Raises:
        ToolkitError: such a type whose class cannot be taken apart.
    """
    if config.model_type in FAMILIES:
        return FAMILIES[config.model_type](config)
    from calibration.architectures.derivation.entries import derive

    entries = {k: v for k, v in config.to_dict().items() if k not in ("quantization_config", "dtype", "_name_or_path")}
    key = type(config), json.dumps(entries, sort_keys=True, default=str)
    if key not in _derived:
        _derived[key] = derive(config)
    return _derived[key]


__all__ = [
    "FAMILIES",
    "ArchitectureSpec",
    "Balance",
    "BlockSpec",
    "Experts",
    "FeedForward",
    "Heads",
    "NormKind",
    "Residual",
    "SharedInput",
    "check_family",
    "described",
    "known_type",
    "resolve",
]
