"""Tiny models of every family in the architecture table, with random gains and biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

COMMON = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = {**COMMON, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GATED),
    "llama-tied-bias": ("llama", {**GATED, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-mha": ("llama", {**GATED, "num_key_value_heads": 4}),
    "mistral": ("mistral", {**GATED, "sliding_window": 8}),
    "qwen2": ("qwen2", {k: v for k, v in GATED.items() if k != "head_dim"}),
    "qwen3": ("qwen3", {**GATED, "head_dim": 24}),
    "gemma2": ("gemma2", {**GATED, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gemma3": (  # masks and rotary embeddings differ between the layers
        "gemma3_text",
        {
            **GATED,
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("phi3", {**{k: v for k, v in GATED.items() if k != "head_dim"}, "pad_token_id": 0}),
    "opt": ("opt", {**COMMON, "ffn_dim": 96, "max_position_embeddings": 64, "word_embed_proj_dim": 64}),
    "opt-post-norm": (
        "opt",
        {
            **COMMON,
            "ffn_dim": 96,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
            "do_layer_norm_before": False,
        },
    ),
    "gpt2": ("gpt2", {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("gpt_neox", {**COMMON, "intermediate_size": 96, "max_position_embeddings": 64}),
    "bloom": ("bloom", {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "falcon-7b": ("falcon", {**COMMON, "multi_query": True, "parallel_attn": True, "bias": True}),
    "falcon-40b": ("falcon", {**COMMON, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": False}),
    "falcon-rw": ("falcon", {**COMMON, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}),
    "starcoder2": (
        "starcoder2",
        {**COMMON, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 64},
    ),
    "mixtral": ("mixtral", {**GATED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3_moe": (
        "qwen3_moe",
        {**GATED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [1]},
    ),
}


LIKE_OTHERS = ("llama-tied-bias", "llama-mha", "mistral", "qwen2", "falcon-40b")
EVERY_FAMILY = [pytest.param(name, marks=pytest.mark.slow) if name in LIKE_OTHERS else name for name in FAMILIES]
"""For tests of whole runs, in which these find nothing that Llama, Qwen3 or Falcon-7B do not: they are slow."""


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model in which every norm gain and bias differs from its neutral value."""
    model_type, settings = FAMILIES[family]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**settings, "bos_token_id": 0, "eos_token_id": 0, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * (0.5 if "embed" in name or "wte" in name else 1.5) / parameter.shape[-1] ** 0.5)
    return model.to(dtype).eval()


def save_tiny(family: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Path:
    """Save a tiny model in the layout of the hub (per-expert tensors for mixtures of experts)."""
    tiny_model(family, dtype, seed, **changes).save_pretrained(folder)
    return folder
