"""Families with LayerNorm: OPT, GPT-2, GPT-NeoX, BLOOM, Falcon, StarCoder2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from calibration.architectures.spec import (
    ArchitectureSpec,
    Balance,
    BlockSpec,
    FeedForward,
    Heads,
    Residual,
    SharedInput,
)

WRAPPED = "{down}: its input passes {act}, which does not commute with a scale"
INTERLEAVED = "{dense}: values are interleaved per head inside the fused query_key_value"


def opt(config: Any) -> ArchitectureSpec:
    """OPT. In post-norm models (OPT-350m) a norm's output also feeds the residual: no scale can be absorbed there."""
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    heads = config.num_attention_heads
    balance = [
        Balance(
            "self_attn.v_proj", ("self_attn.out_proj",), "value", heads=Heads(heads, heads, config.hidden_size // heads)
        )
    ]
    unbalanced = []
    if config.do_layer_norm_before:
        balance.insert(0, Balance("self_attn_layer_norm", qkv, "norm"))
        balance.append(Balance("final_layer_norm", ("fc1",), "norm"))
    else:
        unbalanced.append("q/k/v and fc1: post-norm blocks, the norm's output also feeds the residual stream")
    if config.activation_function == "relu":
        balance.append(Balance("fc1", ("fc2",), "linear"))
    else:
        unbalanced.append(WRAPPED.format(down="fc2", act=config.activation_function))
    block = BlockSpec(
        inputs=(
            SharedInput(qkv, 0),
            SharedInput(("self_attn.out_proj",), 1),
            SharedInput(("fc1",), 2),
            SharedInput(("fc2",), 3),
        ),
        balance=tuple(balance),
        writes=("self_attn.out_proj", "fc2"),
        scores=qkv[:2],
        unbalanced=tuple(unbalanced),
        feed_forward=(FeedForward("fc1", "fc2", config.activation_function, "activation_fn"),),
    )
    residual: Residual | str = Residual(
        ("model.decoder.embed_tokens", "model.decoder.embed_positions"), "model.decoder.final_layer_norm"
    )
    if not config.do_layer_norm_before:
        residual = "post-norm blocks: the norms stand on the residual stream itself, and gains do not commute with it"
    elif config.word_embed_proj_dim != config.hidden_size or config._remove_final_layer_norm:
        residual = "projections stand between the embedding and the stream, or no norm between the stream and the head"
    return ArchitectureSpec(
        family="opt",
        blocks="model.decoder.layers",
        n_blocks=config.num_hidden_layers,
        norm="layer",
        block=lambda index: block,
        bias_switches={"enable_bias": block.linears},
        residual=residual,
    )


def gpt2(config: Any) -> ArchitectureSpec:
    """GPT-2: Conv1D linears, fused c_attn with v in the last third."""
    heads = Heads(config.n_head, config.n_head, config.n_embd // config.n_head)
    block = BlockSpec(
        inputs=(
            SharedInput(("attn.c_attn",), 0),
            SharedInput(("attn.c_proj",), 1),
            SharedInput(("mlp.c_fc",), 2),
            SharedInput(("mlp.c_proj",), 3),
        ),
        balance=(
            Balance("ln_1", ("attn.c_attn",), "norm"),
            Balance("attn.c_attn", ("attn.c_proj",), "value", rows=(2 * config.n_embd, 3 * config.n_embd), heads=heads),
            Balance("ln_2", ("mlp.c_fc",), "norm"),
        ),
        writes=("attn.c_proj", "mlp.c_proj"),
        scores=("attn.c_attn",),
        unbalanced=(WRAPPED.format(down="mlp.c_proj", act=config.activation_function),),
        feed_forward=(FeedForward("mlp.c_fc", "mlp.c_proj", config.activation_function, "mlp.act"),),
    )
    return ArchitectureSpec(
        family="gpt2",
        blocks="transformer.h",
        n_blocks=config.n_layer,
        norm="layer",
        block=lambda index: block,
        conv1d=True,
        residual=Residual(("transformer.wte", "transformer.wpe"), "transformer.ln_f"),
    )


def _plain(act: str, nonlinearity: str = "mlp.act") -> tuple[FeedForward, ...]:
    return (FeedForward("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", act, nonlinearity),)


def _fused(
    attention: str, first_norm: str, second_norm: str, act: str, parallel: bool, nonlinearity: str = "mlp.act"
) -> BlockSpec:
    """Fused query_key_value and a plain MLP; each norm feeds one linear."""
    qkv, dense = f"{attention}.query_key_value", f"{attention}.dense"
    return BlockSpec(
        inputs=(
            SharedInput((qkv,), 0),
            SharedInput((dense,), 1),
            SharedInput(("mlp.dense_h_to_4h",), 0 if parallel else 2),
            SharedInput(("mlp.dense_4h_to_h",), 1 if parallel else 3),
        ),
        balance=(
            Balance(first_norm, (qkv,), "norm"),
            Balance(second_norm, ("mlp.dense_h_to_4h",), "norm"),
        ),
        writes=(dense, "mlp.dense_4h_to_h"),
        scores=(qkv,),
        unbalanced=(INTERLEAVED.format(dense=dense), WRAPPED.format(down="mlp.dense_4h_to_h", act=act)),
        feed_forward=_plain(act, nonlinearity),
    )


def gpt_neox(config: Any) -> ArchitectureSpec:
    """GPT-NeoX and Pythia; the head is ``embed_out`` in the file."""
    block = _fused(
        "attention", "input_layernorm", "post_attention_layernorm", config.hidden_act, config.use_parallel_residual
    )
    return ArchitectureSpec(
        family="gpt_neox",
        blocks="gpt_neox.layers",
        n_blocks=config.num_hidden_layers,
        norm="layer",
        block=lambda index: block,
        root_renames=(("embed_out.", "lm_head."),),
        bias_switches={"attention_bias": ("attention.query_key_value", "attention.dense")},
        residual=Residual(("gpt_neox.embed_in",), "gpt_neox.final_layer_norm", "embed_out"),
    )


def bloom(config: Any) -> ArchitectureSpec:
    """BLOOM; with ``apply_residual_connection_post_layernorm`` the norms feed the residual and absorb nothing."""
    block = _fused("self_attention", "input_layernorm", "post_attention_layernorm", "gelu", False, "mlp.gelu_impl")
    if config.apply_residual_connection_post_layernorm:
        reason = "norms: their output also feeds the residual stream"
        block = replace(block, balance=(), unbalanced=(*block.unbalanced, reason))
    return ArchitectureSpec(
        family="bloom",
        blocks="transformer.h",
        n_blocks=config.n_layer,
        norm="layer",
        block=lambda index: block,
        tuple_output=True,
        attention="eager",
        residual="a norm with gains stands between the embedding and the stream, and gains do not commute with it",
    )


def falcon(config: Any) -> ArchitectureSpec:
    """Falcon: two norms in parallel (40B), one norm for both (7B, 11B), or sequential blocks (RW)."""
    act = config.activation
    two_norms = config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2)
    parallel = config.new_decoder_architecture or config.parallel_attn
    if two_norms:
        block = _fused("self_attention", "ln_attn", "ln_mlp", act, True)
    elif not parallel:
        block = _fused("self_attention", "input_layernorm", "post_attention_layernorm", act, False)
    else:
        qkv, up = "self_attention.query_key_value", "mlp.dense_h_to_4h"
        block = BlockSpec(
            inputs=(
                SharedInput((qkv, up), 0),
                SharedInput(("self_attention.dense",), 1),
                SharedInput(("mlp.dense_4h_to_h",), 1),
            ),
            balance=(Balance("input_layernorm", (qkv, up), "norm"),),
            writes=("self_attention.dense", "mlp.dense_4h_to_h"),
            scores=(qkv,),
            unbalanced=(
                INTERLEAVED.format(dense="self_attention.dense"),
                WRAPPED.format(down="mlp.dense_4h_to_h", act=act),
            ),
            feed_forward=_plain(act),
        )
    return ArchitectureSpec(
        family="falcon",
        blocks="transformer.h",
        n_blocks=config.num_hidden_layers,
        norm="layer",
        block=lambda index: block,
        tuple_output=True,
        bias_switches={"bias": block.linears},
        residual=Residual(("transformer.word_embeddings",), "transformer.ln_f"),
    )


def starcoder2(config: Any) -> ArchitectureSpec:
    """StarCoder2: Llama's attention with biases, and a plain MLP."""
    qkv, out = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj"
    width = config.hidden_size // config.num_attention_heads
    heads = Heads(config.num_attention_heads, config.num_key_value_heads, width)
    block = BlockSpec(
        inputs=(
            SharedInput(qkv, 0),
            SharedInput((out,), 1),
            SharedInput(("mlp.c_fc",), 2),
            SharedInput(("mlp.c_proj",), 3),
        ),
        balance=(
            Balance("input_layernorm", qkv, "norm"),
            Balance("self_attn.v_proj", (out,), "value", heads=heads),
            Balance("post_attention_layernorm", ("mlp.c_fc",), "norm"),
        ),
        writes=(out, "mlp.c_proj"),
        scores=qkv[:2],
        unbalanced=(WRAPPED.format(down="mlp.c_proj", act=config.hidden_act),),
        feed_forward=(FeedForward("mlp.c_fc", "mlp.c_proj", config.hidden_act, "mlp.act"),),
    )
    return ArchitectureSpec(
        family="starcoder2",
        blocks="model.layers",
        n_blocks=config.num_hidden_layers,
        norm="layer",
        block=lambda index: block,
        bias_switches={"use_bias": block.linears},
        residual=Residual(("model.embed_tokens",), "model.norm"),
    )
