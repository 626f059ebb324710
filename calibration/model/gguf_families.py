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
        joined: q, k and v are one tensor, and so are gate and up.
    """

    architecture: str
    pairs: bool = False
    norm_shift: float = 0.0
    window: bool = False
    joined: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", pairs=True),
    "mistral": Family("llama", pairs=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma2": Family("gemma2", norm_shift=1.0, window=True),
    "gemma3_text": Family("gemma3", norm_shift=1.0, window=True),
    "phi3": Family("phi3", joined=True),
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
_JOINED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
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
    family = FAMILIES[model_type]
    table = _BLOCK | (_GEMMA if family.norm_shift else {}) | (_JOINED if family.joined else {})
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


def complete(
    config: Mapping[str, Any], keys: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """config.json as transformers reads it from a GGUF file, with what that reader leaves out.

    Args:
        keys: settings without the architecture's name.
        shapes: of the tensors, in GGUF's order ``[in, out]``.
    """
    made, heads = dict(config), int(keys["attention.head_count"])
    made["tie_word_embeddings"] = "output.weight" not in shapes
    made["vocab_size"] = shapes["token_embd.weight"][1]
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):  # where the file has none: those of another model
        if isinstance(made.get(key), int) and made[key] >= made["vocab_size"]:
            made[key] = None
    joined = FAMILIES[str(made["model_type"])].joined
    whole_width = int(keys["embedding_length"]) if joined else shapes["blk.0.attn_q.weight"][1]
    made["head_dim"] = width = int(keys.get("attention.key_length") or whole_width // heads)
    if made["model_type"] == "llama":
        made["attention_bias"] = "blk.0.attn_q.bias" in shapes
    if "attention.sliding_window" in keys:
        made["sliding_window"] = int(keys["attention.sliding_window"]) or None
    rope = {"rope_type": "default", **(made.get("rope_parameters") or {})}
    made["rope_parameters"] = rope if "rope.freq_base" not in keys else {**rope, "rope_theta": keys["rope.freq_base"]}
    if joined:
        made["partial_rotary_factor"] = int(keys.get("rope.dimension_count", width)) / width
        made["rope_parameters"]["partial_rotary_factor"] = made["partial_rotary_factor"]
    if FAMILIES[str(made["model_type"])].norm_shift:  # llama.cpp has these two in its code
        largest = int(keys["block_count"]) in (46, 62)  # the 27 B models
        made["query_pre_attn_scalar"] = int(keys["embedding_length"]) // heads if largest else width
        count = int(keys["block_count"])
        made["layer_types"] = window_pattern(str(made["model_type"]), count)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if FAMILIES[str(made["model_type"])].norm_shift:
            made[key] = keys.get(key)
    if made["model_type"] == "gemma3_text":
        whole = {k: v for k, v in made["rope_parameters"].items() if k not in ("full_attention", "sliding_attention")}
        local = {"rope_type": "default", "rope_theta": float(keys.get("rope.freq_base_swa", 10000.0))}
        made["rope_parameters"] = {"full_attention": whole, "sliding_attention": local}
    return made


def window_pattern(model_type: str, count: int) -> list[str]:
    """``layer_types`` that llama.cpp gives a Gemma of so many layers."""
    every = 2 if model_type == "gemma2" else 6
    return ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(count)]
