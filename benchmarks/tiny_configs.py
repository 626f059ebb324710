"""Tiny configs of any causal type of transformers: whatever a type calls its sizes, they become small."""

from __future__ import annotations

from typing import Any

LAYERS = 2
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "d_model": 64, "n_embd": 64, "num_hidden_layers": LAYERS, "n_layer": LAYERS,
    "decoder_layers": LAYERS, "encoder_layers": LAYERS, "num_layers": LAYERS, "n_layers": LAYERS,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "decoder_attention_heads": 4, "num_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 16, "attention_head_dim": 16,
    "intermediate_size": 96, "ffn_dim": 96, "decoder_ffn_dim": 96, "encoder_ffn_dim": 96, "n_inner": 96,
    "encoder_attention_heads": 4, "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "top_k_experts": 2, "moe_k": 2, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48, "shared_intermediate_size": 48, "expert_ffn_hidden_size": 32,
    "moe_shared_expert_intermediate_size": 48, "moe_ffn_hidden_size": 32, "ffn_hidden_size": 96,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16, "v_head_dim": 16, "qk_head_dim": 32, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "sliding_window": 8,
    "mamba_d_state": 16, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_expand": 2, "mamba_n_groups": 1,
    "mamba_chunk_size": 16, "mamba_d_ssm": 128, "ssm_state_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 32,
    "state_size": 16, "n_groups": 1, "chunk_size": 16, "mamba_d_conv": 4, "time_step_rank": 8, "mamba_dt_rank": 8,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4, "query_pre_attn_scalar": 16,
    "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 16, "lru_width": 64, "attention_window_size": 8,
    "expert_dim": 32, "latent_dim": 32, "kv_channels": 16, "num_nextn_predict_layers": 0, "rotary_dim": 16,
    "embedding_size": 64, "word_embed_proj_dim": 64, "block_size": 16, "local_window_size": 8,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    "global_head_dim": 16, "num_global_key_value_heads": 2, "num_kv_shared_layers": 0, "max_window_layers": 1,
}  # fmt: skip
TOWER = {
    "depth": 2, "out_hidden_size": 64, "embed_dim": 64, "fullatt_block_indexes": [1], "image_size": 28,
    "patch_size": 14, "deepstack_visual_indexes": [1],
}  # fmt: skip
OPEN = (
    "head_dim", "num_key_value_heads", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
    "moe_intermediate_size",
)  # fmt: skip
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SPECIAL: dict[str, dict[str, Any]] = {
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zaya": {"num_experts_per_tok": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "longcat_flash": {"num_layers": 2, "num_hidden_layers": 4, "n_routed_experts": 4, "zero_expert_num": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": PLAIN_ROPE, "sliding_attention": PLAIN_ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note": {"per_layer_config": {}},
    "gemma3n": {"activation_sparsity_pattern": [0.0, 0.0], "layer_types": ["sliding_attention", "full_attention"]},
    "gemma4": {"per_layer_config": {}},
    "gemma4_unified": {"per_layer_config": {}},
    "gemma4_unified_assistant": {"per_layer_config": {}, "hidden_size_per_layer_input": 0},
    "gemma4_assistant": {"per_layer_config": {}, "hidden_size_per_layer_input": 0},
    "mamba2": {"num_heads": 8},
    "ministral3": {
        "rope_parameters": {
            **PLAIN_ROPE,
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 32,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "qwen2_5_vl": {"rope_parameters": {**PLAIN_ROPE, "mrope_section": [2, 3, 3]}},
    "xmod": {"default_language": "en_XX"},
}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A config of this type with small sizes.

    Raises:
        Whatever the config class raises: not every type can be made small so simply.
    """
    from transformers import AutoConfig

    plain = AutoConfig.for_model(model_type)
    text = plain.get_text_config(decoder=True)
    sizes = {k: v for k, v in SIZES.items() if _takes(text, k)}
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        kinds = getattr(text, name, None) if _takes(text, name) else None
        if kinds:
            sizes[name] = one_of_each(kinds)
            sizes["num_hidden_layers"] = len(sizes[name])
    lengths = {len(v) for k, v in sizes.items() if isinstance(v, list)}
    if len(lengths) > 1:
        for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
            if name in sizes:
                sizes[name] = (sizes[name] * 4)[: max(lengths)]
        sizes["num_hidden_layers"] = max(lengths)
    rope = getattr(text, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("rope_type") in ("longrope", "yarn"):
        sizes["rope_parameters"] = PLAIN_ROPE
    if "kv_lora_rank" in sizes:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    sizes |= SPECIAL.get(model_type, {}) | changes
    if isinstance(rope, dict) and "mrope_section" in rope:
        sizes["rope_parameters"] = {**rope, "mrope_section": [2, 3, 3]}
    if "vocab_size_per_layer_input" in sizes:
        sizes["vocab_size_per_layer_input"] = sizes["vocab_size"]
    if text is plain or type(text) is type(plain):
        return AutoConfig.for_model(model_type, **sizes)
    towers = {}
    for name in plain.sub_configs:
        tower = getattr(plain, name, None)
        if tower is not None and tower is not text:
            towers[name] = {k: v for k, v in {**SIZES, **TOWER}.items() if _takes(tower, k)}
    return AutoConfig.for_model(model_type, **{**towers, "text_config": {**text.to_diff_dict(), **sizes}})


def _takes(config: Any, name: str) -> bool:
    """Whether a config has this size and lets it be set."""
    stored = getattr(type(config), "attribute_map", {}).get(name, name)
    if isinstance(getattr(type(config), stored, None), property):
        return False
    try:
        value = getattr(config, name, None)
    except (AttributeError, RuntimeError):  # one value per layer
        return False
    return value is not None or (name in OPEN and hasattr(config, name))


def one_of_each(kinds: list[str]) -> list[str]:
    """At least two layers, with every kind among them."""
    found = list(dict.fromkeys(kinds))
    return found if len(found) > 1 else found * 2
