"""The architecture table: one small function per model family, data only."""

from __future__ import annotations

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


def check_family(model_type: str, names: Iterable[str]) -> None:
    """Refuse a model type that the table does not know, showing what its first block looks like.

    Args:
        model_type: of ``config.json``.
        names: tensor names of the checkpoint.
    """
    if model_type in FAMILIES:
        return
    first = sorted(n for n in names if ".0." in n and n.endswith(".weight"))[:40]
    listing = "\n        ".join(first) or "(no block tensors found)"
    raise ToolkitError(
        f"model_type '{model_type}' is not in the architecture table; its first block holds\n        {listing}",
        f"{nearest(model_type, FAMILIES)}known: {', '.join(FAMILIES)}. To add it, write a function like `llama` in "
        "calibration/architectures/llama_like.py that names the linears sharing an input and the norms before them, "
        "and list it in FAMILIES",
    )


def resolve(config: Any) -> ArchitectureSpec:
    """The spec for a transformers config whose ``model_type`` passed `check_family`."""
    return FAMILIES[config.model_type](config)


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
    "resolve",
]
