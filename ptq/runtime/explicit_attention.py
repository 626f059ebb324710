"""Attention with its probabilities in memory, through transformers' attention interface: open to view, and with other
functions in place of softmax. No model code is touched."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from calibration.errors import ToolkitError
from ptq.numerics.softmax import SoftmaxRule, gamma_of
from ptq.runtime.attention import has_interface

Probabilities = Callable[[torch.Tensor], torch.Tensor]
"""Masked logits ``[..., queries, keys]``, float32, to what values are weighted with, float32."""

_numbers = itertools.count()


@dataclass(frozen=True)
class Scores:
    """One call of attention: ``logits`` (masked) and ``probabilities`` ``[batch, heads, queries, keys]``, float32;
    ``values`` ``[batch, heads, keys, width]``, shared by heads of a group; ``output`` ``[batch, heads, queries,
    width]``; ``layer``, the index of the decoder layer."""

    logits: torch.Tensor
    probabilities: torch.Tensor
    values: torch.Tensor
    output: torch.Tensor
    layer: int = 0


Look = Callable[[Scores], None]
SOFTMAX_RANGES = {"gamma": (-1.0, 0.0), "zeta": (1.0, 2.0), "alpha": (0.0, 64.0), "closed": (0.0, 1.0)}


def unsupported(model: Any) -> str | None:
    """Why attention of this transformers model cannot be exchanged, or None."""
    if has_interface(model.config):
        return None
    return f"{type(model).__name__}: its attention is not on transformers' attention interface"


def exchange_softmax(
    model: Any, probabilities: Probabilities | Sequence[Probabilities], look: Look | None = None
) -> None:
    """From now on every attention of a transformers model weights its values with ``probabilities(logits)``, and is
    shown to ``look``. With ``logits.softmax(-1)`` it gives the bits of transformers' eager attention.

    Args:
        probabilities: of all blocks, or one entry per block.

    Raises:
        ToolkitError: the family computes attention in its own way (Falcon, BLOOM), or it is exchanged already (a
            quantized KV cache, another softmax).
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    reason = unsupported(model)
    if reason is not None:
        raise ToolkitError(reason, "leave out what exchanges attention probabilities")
    if model.config._attn_implementation.startswith("ptq-"):
        taken = "the attention of this model is exchanged already, for a quantized KV cache or another softmax"
        raise ToolkitError(taken, "use a model without kv in its scheme, and exchange it once")
    name = f"ptq-explicit-{next(_numbers)}"
    AttentionInterface.register(name, explicit_attention(probabilities, look))
    # without a mask function of its own a model is silently not causal
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model.set_attn_implementation(name)


@contextmanager
def exchanged_softmax(
    model: Any, probabilities: Probabilities | Sequence[Probabilities], look: Look | None = None
) -> Iterator[None]:
    """`exchange_softmax` for the length of a ``with``."""
    before = model.config._attn_implementation
    exchange_softmax(model, probabilities, look)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def parse_softmax(text: str, length: int) -> SoftmaxRule:
    """``gamma=-0.003,zeta=1.003``, ``alpha=4`` (gamma = -alpha / ``length``), ``closed=0.9``, ``off-by-one`` and
    ``normalise``, joined by commas.

    Args:
        length: tokens of a window.

    Raises:
        ToolkitError: an unknown name, a value that is no number or outside its range, ``gamma`` beside ``alpha``.
    """
    fix = "write for example gamma=-0.003,zeta=1.003 or alpha=4 or off-by-one or closed=0.9 or alpha=4,normalise"
    given: list[str] = []
    fields: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name in given or {"gamma", "alpha"} <= {*given, name}:
            raise ToolkitError(f"--softmax {text}: '{name}' is said twice, or beside its other form", fix)
        given.append(name)
        if name in ("off-by-one", "normalise") and not value:
            fields[name.replace("-", "_")] = True
            continue
        if name not in SOFTMAX_RANGES:
            raise ToolkitError(f"--softmax {text}: unknown part '{part}'", fix)
        low, high = SOFTMAX_RANGES[name]
        try:
            number = float(value)
        except ValueError:
            raise ToolkitError(f"--softmax {text}: '{value}' is not a number", fix) from None
        if not low <= number <= high:
            raise ToolkitError(f"--softmax {text}: {name} is outside [{low:g}, {high:g}]", fix)
        field = {"alpha": "gamma", "closed": "closed_from"}.get(name, name)
        fields[field] = gamma_of(number, length) if name == "alpha" else number
    return SoftmaxRule(**fields)


def explicit_attention(
    probabilities: Probabilities | Sequence[Probabilities], look: Look | None = None
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """A function for transformers' attention interface.

    Its arguments: query ``[B, heads, T, width]``; key and value ``[B, key/value heads, S, width]``; a mask that is
    added to the logits, ``[B, 1, T, S]``. It returns ``[B, T, heads, width]`` and ``[B, heads, T, S]``.
    """

    def forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if s_aux is not None:
            reason = f"{type(module).__name__}: learned sink logits take part in its softmax"
            raise ToolkitError(reason, "leave out what exchanges attention probabilities")
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        logits = torch.matmul(query, key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        if attention_mask is not None:
            logits = logits + attention_mask[..., : key.shape[-2]]
        logits = logits.float()
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        p = probabilities(logits) if callable(probabilities) else probabilities[layer](logits)
        output = torch.matmul(p.to(query.dtype), value)
        if look is not None:
            look(Scores(logits, p, value, output, layer))
        return output.transpose(1, 2).contiguous(), p

    return forward
