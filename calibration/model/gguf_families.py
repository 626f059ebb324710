"""What differs between a model's tensors in a Hugging Face checkpoint and in a GGUF file, by family, both ways.

llama.cpp rotates adjacent channels in ``llama`` models, so that rows of queries and keys are reordered from halves to
pairs, and Gemma's norms store 1 + gain. Source: ``conversion/`` of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Family:
    """How llama.cpp holds a ``model_type``.

    Attributes:
        architecture: ``general.architecture``.
        pairs: rows of q and k lie in pairs.
        norm_shift: added to the gains of norms.
        window: models whose layers see a window say how wide it is.
    """

    architecture: str
    pairs: bool = False
    norm_shift: float = 0.0
    window: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", pairs=True),
    "mistral": Family("llama", pairs=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma2": Family("gemma2", norm_shift=1.0, window=True),
    "gemma3_text": Family("gemma3", norm_shift=1.0, window=True),
}

_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def checkpoint_name(name: str, model_type: str) -> str | None:
    """The Hugging Face name of a tensor of a GGUF file, or None for one that the config says as well or nobody knows.

    Args:
        model_type: one of `FAMILIES`.
    """
    stem, _, kind = name.rpartition(".")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.{kind}"
    parts = stem.split(".")
    table = _BLOCK | (_GEMMA if FAMILIES[model_type].norm_shift else {})
    if len(parts) != 3 or parts[0] != "blk" or parts[2] not in table:
        return None
    return f"model.layers.{parts[1]}.{table[parts[2]]}.{kind}"


def paired_rows(name: str, config: Mapping[str, Any]) -> torch.Tensor | None:
    """The order in which rows of this tensor (full name, with or without ``.weight``) lie in a GGUF file, or None.

    In each head row i of the first half is followed by row i of the second.
    """
    parts = name.removesuffix(".weight").removesuffix(".bias").split(".")
    if not FAMILIES[str(config["model_type"])].pairs or parts[-1] not in ("q_proj", "k_proj"):
        return None
    heads = int(config["num_attention_heads"])
    width = int(config.get("head_dim") or config["hidden_size"] // heads)
    if parts[-1] == "k_proj":
        heads = int(config.get("num_key_value_heads") or heads)
    return torch.arange(heads * width).view(heads, 2, width // 2).transpose(1, 2).reshape(-1)


def norm_shift(name: str, config: Mapping[str, Any]) -> float:
    """What is added to this tensor (full name) in a GGUF file."""
    return FAMILIES[str(config["model_type"])].norm_shift if name.endswith("norm.weight") else 0.0
