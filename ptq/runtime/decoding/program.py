"""The list of operations of one decoding step, read off a transformers model.

What is looked for are the names and the order that most decoders share: RMS norms, attention with rotary positions over
grouped keys, a gated MLP, norms in front of each part (Llama and its kin), behind it as well (Gemma 2 and 3) or only
behind (OLMo 2). Anything else, and whatever else such a model may do between these parts, is not known here: the first
step is therefore compared with the model's own, see `stepper`. What only later positions would show is refused here:
rotary frequencies that depend on the length, or queries that are scaled by their position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ptq.runtime.decoding.builder import ATTEND, ROTATE, Builder, Unsupported, fitting, part
from ptq.runtime.decoding.native import Inputs, Op, pointer
from sparsity.attach import PhaseWatch
from sparsity.decode import GatedFeedForward, Phase
from sparsity.kernels.build import cpu_level

PAIRS = {"AVX512": 32, "AVX2": 16}
"""Two vectors of an instruction set, of which widths of heads are multiples; 8 elsewhere."""
WIDEST = 1024
"""Of a head, as ``step.cpp`` has it."""
PLAIN_ATTENTION = ("eager", "sdpa")
"""Names of transformers; ours quantize the cache, or have another softmax."""
ROTATIONS = ("default", "linear", "yarn", "llama3")
"""Types of rotary positions whose angles depend on the position alone."""
ROTARY_KEYS = {
    "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
    "beta_slow", "low_freq_factor", "high_freq_factor", "partial_rotary_factor", "mscale", "mscale_all_dim", "truncate",
}  # fmt: skip


@dataclass
class Program:
    """Operations, and what they point to.

    Attributes:
        ops: an array of `Op`.
        blocks: how many of them are done behind each decoder block; what is left is the head's.
        work: float32 workspace.
        hidden, logits: parts of it: where the state of the residual stream lies, and the result.
        keys, values: of each layer ``[key heads, positions, width]``, in the model's dtype.
        kept: tensors that nothing else keeps alive.
        phase: of a model with thresholds of activation sparsity, as they applied when it was read.
    """

    ops: Any
    blocks: list[int]
    work: torch.Tensor
    hidden: torch.Tensor
    logits: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    kept: list[torch.Tensor]
    phase: Phase | None


def read_program(model: Any, positions: int, windows: Sequence[int], inputs: Inputs = "int15") -> Program:
    """Of a model on the CPU in float32 or bfloat16, for sequences of up to so many tokens.

    Args:
        windows: of each block, how many positions it looks back at, itself included; 0: all.
        inputs: to what those of integer codes are rounded.

    Raises:
        Unsupported: it is not made of the parts known here.
    """
    if model.dtype not in (torch.float32, torch.bfloat16) or model.device.type != "cpu":
        raise Unsupported(f"{str(model.dtype).removeprefix('torch.')} on {model.device.type}")
    attention = getattr(model.config, "_attn_implementation", None)
    if attention not in PLAIN_ATTENTION:
        raise Unsupported(f"attention by '{attention}'")
    watches = [hook for hook in model._forward_pre_hooks.values() if isinstance(hook, PhaseWatch)]
    changed = next((name for name, module in model.named_modules() if _changed(module, watches)), None)
    if changed is not None:
        raise Unsupported(f"hooks, or another forward pass, in {changed or 'the model'}")
    phase, blocks = watches[0].phase if len(watches) == 1 else None, []
    reader = _Reader(model, positions, windows, Builder(model.dtype, phase, inputs))
    for number, layer in enumerate(part(reader.base, "layers")):
        reader.block(layer, number)
        blocks.append(len(reader.build.ops))
    head = model.get_output_embeddings()
    build, width = reader.build, reader.width
    fitting(head, width, head.out_features)
    logits = build.place("logits", head.out_features)
    build.add_linear(head, reader.hidden, logits, build.norm(part(reader.base, "norm"), width))
    work = torch.zeros(build.size)
    return Program(
        (Op * len(build.ops))(*build.ops),
        blocks,
        work,
        work[:width],
        work[logits : logits + head.out_features],
        reader.keys,
        reader.values,
        build.kept,
        build.phase,
    )


def _changed(module: nn.Module, known: Sequence[PhaseWatch]) -> bool:
    """Whether something else than its class decides what a module does: masks for scoring, for example."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if hook not in known]
    return bool(hooks or module._forward_hooks) or "forward" in vars(module)


class _Reader:
    """One model on its way into a `Builder`."""

    def __init__(self, model: Any, positions: int, windows: Sequence[int], build: Builder) -> None:
        self.base: Any = model.get_decoder()
        self.config = self.base.config
        self.width: int = self.config.hidden_size
        self.positions, self.windows = positions, windows
        self.build = build
        self.hidden = self.build.place("hidden", self.width)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self._rotations: dict[str | None, tuple[torch.Tensor, torch.Tensor]] = {}

    def block(self, layer: Any, number: int) -> None:
        """Norms in front of both parts; a norm called post_feedforward means norms behind both."""
        build, behind = self.build, getattr(layer, "post_feedforward_layernorm", None)
        first = self._norm(layer, "input_layernorm") if hasattr(layer, "input_layernorm") else None
        if behind is None:
            self.attention(layer, number, first, self.hidden, add=True)
            self.feed_forward(layer, self._norm(layer, "post_attention_layernorm"), self.hidden, add=True)
            return
        both = hasattr(layer, "pre_feedforward_layernorm")
        if both != (first is not None):
            raise Unsupported("norms are placed otherwise")
        made = build.place("part", self.width)
        self.attention(layer, number, first, made, add=False)
        build.add_norm(self._norm(layer, "post_attention_layernorm"), made, self.hidden)
        self.feed_forward(layer, self._norm(layer, "pre_feedforward_layernorm") if both else None, made, add=False)
        build.add_norm(self._norm(layer, "post_feedforward_layernorm"), made, self.hidden)

    def _norm(self, layer: Any, name: str) -> tuple[torch.Tensor, float]:
        return self.build.norm(part(layer, name), self.width)

    def feed_forward(self, layer: Any, norm: Any, target: int, add: bool) -> None:
        mlp = part(layer, "mlp")
        mask, ending = None, "_proj"
        if isinstance(mlp, GatedFeedForward):
            ending, mask = "", mlp.mask if self.build.masked(mlp.phase) else None
            act = mlp.activation
        else:
            act = getattr(mlp, "act_fn", None) or part(mlp, "activation_fn")
        gate, up, down = (part(mlp, name + ending) for name in ("gate", "up", "down"))
        for module in (gate, up):
            fitting(module, self.width, gate.out_features)
        fitting(down, gate.out_features, self.width)
        place = self.build.place("mlp", gate.out_features)
        self.build.add_gated(gate, up, act, self.hidden, place, norm, mask)
        self.build.add_linear(down, place, target, add=add)

    def attention(self, layer: Any, number: int, norm: Any, target: int, add: bool) -> None:
        build, attention = self.build, part(layer, "self_attn")
        q, k, v, o = (part(attention, f"{name}_proj") for name in "qkvo")
        width = getattr(attention, "head_dim", None) or self.width // self.config.num_attention_heads
        heads, key_heads = q.out_features // width, k.out_features // width
        if width % PAIRS.get(cpu_level(), 8) or width > WIDEST or v.out_features != k.out_features or heads % key_heads:
            raise Unsupported(f"heads of width {width}")
        if getattr(attention, "sinks", None) is not None:
            raise Unsupported("attention has sinks")
        for module in (q, k, v):
            fitting(module, self.width, (heads if module is q else key_heads) * width)
        fitting(o, heads * width, self.width)
        places = [build.place(name, module.out_features) for name, module in (("q", q), ("k", k), ("v", v))]
        for module, place in zip((q, k, v), places, strict=True):
            build.add_linear(module, self.hidden, place, norm, barrier=module is v)
        self.keys.append(torch.zeros(key_heads, self.positions, width, dtype=build.dtype))
        self.values.append(torch.zeros(key_heads, self.positions, width, dtype=build.dtype))
        shared = {
            "source": places[0],
            "keys": places[1],
            "values": places[2],
            "key_cache": pointer(self.keys[-1]),
            "value_cache": pointer(self.values[-1]),
            "half_keys": build.dtype == torch.bfloat16,
            "heads": heads,
            "key_heads": key_heads,
            "width": width,
            "positions": self.positions,
            "barrier": 1,
        }
        cosine, sine = self.rotations(number, width)
        rotate = Op(kind=ROTATE, cosine=pointer(cosine), sine=pointer(sine), rotary=cosine.shape[1], **shared)
        for name, attribute, place, module in (("q_norm", "norm", 0, q), ("k_norm", "norm_keys", 1, k)):
            found = getattr(attention, name, None)
            if found is not None and part(found, "weight").numel() == width:
                weight, rotate.epsilon = build.norm(found, width)
                setattr(rotate, attribute, pointer(weight))
            elif found is not None:  # over all heads at once
                build.add_norm(build.norm(found, module.out_features), places[place], places[place], add=False)
        build.ops.append(rotate)
        seen = build.place("attention", heads * width)
        scale = getattr(attention, "scaling", width**-0.5)
        softcap = getattr(attention, "attn_logit_softcapping", None) or 0.0
        window = self.windows[number]
        build.ops.append(Op(kind=ATTEND, target=seen, scale=scale, softcap=softcap, window=window, **shared))
        build.add_linear(o, seen, target, add=add)

    def rotations(self, number: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``[positions, rotary]`` float32 of a block, from the model's own module; the first
        ``rotary`` of a head's ``width`` values turn."""
        kinds = getattr(self.config, "layer_types", None)
        kind = kinds[number] if kinds else None
        if kind not in (None, "full_attention", "sliding_attention"):
            raise Unsupported(f"attention of kind '{kind}'")
        if kind not in self._rotations:
            rotary: nn.Module = part(self.base, "rotary_emb")
            self._check_rotary(kind)
            like, where = torch.zeros(1), torch.arange(self.positions)[None]
            try:
                cosine, sine = rotary(like, where, kind)
            except TypeError:
                cosine, sine = rotary(like, where)
            tables = (self.build.keep(table[0].float().contiguous()) for table in (cosine, sine))
            self._rotations[kind] = next(tables), next(tables)
        shapes = {tuple(table.shape) for table in self._rotations[kind]}
        if len(shapes) > 1 or any(len(s) != 2 or s[0] != self.positions or s[1] > width or s[1] % 2 for s in shapes):
            raise Unsupported("rotary tables of another shape")
        return self._rotations[kind]

    def _check_rotary(self, kind: str | None) -> None:
        named = getattr(self.config, "rope_parameters", None) or {}
        named = named.get(kind, named)
        if named.get("rope_type", "default") not in ROTATIONS or set(named) - ROTARY_KEYS:
            raise Unsupported(f"rotary positions of type {named.get('rope_type')}")
