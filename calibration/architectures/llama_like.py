"""Pre-norm blocks with gated MLPs: Llama, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3, Phi-3, Mixtral, Qwen3-MoE."""

from __future__ import annotations

from typing import Any

from calibration.architectures.spec import (
    ArchitectureSpec,
    Balance,
    BlockSpec,
    Experts,
    FeedForward,
    Heads,
    NormKind,
    Residual,
    SharedInput,
)

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUT = "self_attn.o_proj"
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = "mlp.down_proj"
AROUND = Residual(("model.embed_tokens",), "model.norm")
POST_NORMS = "a norm with gains stands between each sublayer and the residual stream, and gains do not commute with it"


def _heads(config: Any) -> Heads:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Heads(config.num_attention_heads, config.num_key_value_heads, width)


def _activation(config: Any) -> str:
    """Gemma's configs call it ``hidden_activation``."""
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def _attention(config: Any) -> tuple[tuple[SharedInput, ...], tuple[Balance, ...]]:
    return (
        (SharedInput(QKV, 0), SharedInput((OUT,), 1)),
        (
            Balance("input_layernorm", QKV, "norm"),
            Balance("self_attn.v_proj", (OUT,), "value", heads=_heads(config)),
        ),
    )


def _gated(config: Any, mlp_norm: str) -> BlockSpec:
    inputs, balance = _attention(config)
    return BlockSpec(
        inputs=(*inputs, SharedInput(GATE_UP, 2), SharedInput((DOWN,), 3)),
        balance=(*balance, Balance(mlp_norm, GATE_UP, "norm"), Balance("mlp.up_proj", (DOWN,), "linear")),
        writes=(OUT, DOWN),
        scores=QKV[:2],
        feed_forward=(FeedForward("mlp.up_proj", DOWN, _activation(config), "mlp.act_fn", gate="mlp.gate_proj"),),
    )


def _spec(
    config: Any, norm: NormKind, mlp_norm: str, residual: Residual | str, attention: Any = "sdpa"
) -> ArchitectureSpec:
    return ArchitectureSpec(
        family=config.model_type,
        blocks="model.layers",
        n_blocks=config.num_hidden_layers,
        norm=norm,
        block=lambda index: _gated(config, mlp_norm),
        residual=residual,
        attention=attention,
    )


def llama(config: Any) -> ArchitectureSpec:
    """Llama, Mistral, Qwen2, Qwen3 (its q/k norms come after the projections and do not touch v or o)."""
    return _spec(config, "rms", "post_attention_layernorm", AROUND)


def gemma2(config: Any) -> ArchitectureSpec:
    """Gemma 2: norms store g - 1; refuses sdpa because of its logit soft cap."""
    return _spec(config, "rms_plus_one", "pre_feedforward_layernorm", POST_NORMS, "eager")


def gemma3(config: Any) -> ArchitectureSpec:
    """Gemma 3 text models: norms store g - 1."""
    return _spec(config, "rms_plus_one", "pre_feedforward_layernorm", POST_NORMS)


def phi3(config: Any) -> ArchitectureSpec:
    """Phi-3: fused qkv (v in the last rows) and fused gate_up (up in the last half)."""
    heads = _heads(config)
    first_value = (heads.query + heads.key_value) * heads.width
    qkv, gate_up = "self_attn.qkv_proj", "mlp.gate_up_proj"
    block = BlockSpec(
        inputs=(
            SharedInput((qkv,), 0),
            SharedInput((OUT,), 1),
            SharedInput((gate_up,), 2),
            SharedInput((DOWN,), 3),
        ),
        balance=(
            Balance("input_layernorm", (qkv,), "norm"),
            Balance(qkv, (OUT,), "value", rows=(first_value, first_value + heads.key_value * heads.width), heads=heads),
            Balance("post_attention_layernorm", (gate_up,), "norm"),
            Balance(gate_up, (DOWN,), "linear", rows=(config.intermediate_size, 2 * config.intermediate_size)),
        ),
        writes=(OUT, DOWN),
        scores=(qkv,),
        feed_forward=(FeedForward(gate_up, DOWN, config.hidden_act, "mlp.activation_fn", gate=gate_up),),
    )
    return ArchitectureSpec(
        family="phi3",
        blocks="model.layers",
        n_blocks=config.num_hidden_layers,
        norm="rms",
        block=lambda index: block,
        residual=AROUND,
    )


def _sparse_block(config: Any, prefix: str, router: str, experts: Experts) -> BlockSpec:
    """A block whose MLP is a mixture of experts. The router reads the balanced input, so it absorbs s as well."""
    inputs, balance = _attention(config)
    gates = [(f"{prefix}.{e}.{experts.gate}", f"{prefix}.{e}.{experts.up}") for e in range(experts.count)]
    downs = [f"{prefix}.{e}.{experts.down}" for e in range(experts.count)]
    return BlockSpec(
        inputs=(
            *inputs,
            *(SharedInput(pair, 2, expert=e) for e, pair in enumerate(gates)),
            *(SharedInput((down,), 3, expert=e) for e, down in enumerate(downs)),
        ),
        balance=(
            *balance,
            Balance("post_attention_layernorm", (*(n for pair in gates for n in pair), router), "norm"),
            *(Balance(up, (down,), "linear") for (_, up), down in zip(gates, downs, strict=True)),
        ),
        writes=(OUT, *downs),
        routers=(router,),
        scores=QKV[:2],
        feed_forward=tuple(
            FeedForward(up, down, experts.activation, f"{experts.module}.{e}.activation", gate=gate, expert=e)
            for e, ((gate, up), down) in enumerate(zip(gates, downs, strict=True))
        ),
    )


def mixtral(config: Any) -> ArchitectureSpec:
    """Mixtral: experts w1 (gate), w3 (up), w2 (down); the file says block_sparse_moe, the class says mlp."""
    experts = Experts(
        "mlp.experts",
        "w1",
        "w3",
        "w2",
        config.num_local_experts,
        config.hidden_size,
        config.intermediate_size,
        config.hidden_act,
    )
    block = _sparse_block(config, "block_sparse_moe.experts", "block_sparse_moe.gate", experts)
    return ArchitectureSpec(
        family="mixtral",
        blocks="model.layers",
        n_blocks=config.num_hidden_layers,
        norm="rms",
        block=lambda index: block,
        renames=(("block_sparse_moe.", "mlp."),),
        experts=lambda index: experts,
        residual=AROUND,
    )


def qwen3_moe(config: Any) -> ArchitectureSpec:
    """Qwen3-MoE: some layers may be dense (``mlp_only_layers``, ``decoder_sparse_step``)."""
    experts = Experts(
        "mlp.experts",
        "gate_proj",
        "up_proj",
        "down_proj",
        config.num_experts,
        config.hidden_size,
        config.moe_intermediate_size,
        config.hidden_act,
    )

    def sparse(index: int) -> bool:
        step = config.decoder_sparse_step
        return index not in config.mlp_only_layers and config.num_experts > 0 and (index + 1) % step == 0

    def block(index: int) -> BlockSpec:
        if sparse(index):
            return _sparse_block(config, "mlp.experts", "mlp.gate", experts)
        return _gated(config, "post_attention_layernorm")

    return ArchitectureSpec(
        family="qwen3_moe",
        blocks="model.layers",
        n_blocks=config.num_hidden_layers,
        norm="rms",
        block=block,
        experts=lambda index: experts if sparse(index) else None,
        residual=AROUND,
    )
