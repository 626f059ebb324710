"""Attention with other softmaxes and open to view, through transformers' attention interface; no model code is touched.

`attention` is eager attention as transformers computes it; with the plain rule it gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from calibration.errors import ToolkitError
from ptq.numerics.softmax import clipped, renormalised, softmax1

NAME = "ptq_observed"


@dataclass(frozen=True)
class AttentionRule:
    """What takes the place of softmax.

    Attributes:
        gamma, zeta: of the clipped softmax; 0 and 1 are softmax itself.
        off_by_one: `softmax1` instead.
        normalise: rows sum to 1 again after clipping.
        closed_from: a gate is closed where the first key gets at least this much: the head's output is 0 there.
    """

    gamma: float = 0.0
    zeta: float = 1.0
    off_by_one: bool = False
    normalise: bool = False
    closed_from: float | None = None

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """``[..., queries, keys]``; logits are masked and float32."""
        p = softmax1(logits) if self.off_by_one else logits.softmax(-1)
        first = p[..., :1]
        p = clipped(p, self.gamma, self.zeta)
        p = renormalised(p) if self.normalise else p
        return p if self.closed_from is None else torch.where(first >= self.closed_from, 0.0, p)


@dataclass(frozen=True)
class Scores:
    """One call of attention: ``logits`` (masked) and ``probabilities`` ``[batch, heads, queries, keys]``, float32;
    ``values`` ``[batch, heads, keys, width]``, shared by heads of a group; ``output`` ``[batch, heads, queries,
    width]``."""

    logits: torch.Tensor
    probabilities: torch.Tensor
    values: torch.Tensor
    output: torch.Tensor


Look = Callable[[Scores], None]


@contextmanager
def attention(model: Any, rule: AttentionRule, look: Look | None = None) -> Iterator[None]:
    """While open, every attention of a transformers model follows ``rule`` and is shown to ``look``.

    Raises:
        ToolkitError: the family computes attention in its own way (Falcon, BLOOM).
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    reason = unsupported(model)
    if reason is not None:
        raise ToolkitError(reason, "leave attention out for this family")
    before = model.config._attn_implementation
    AttentionInterface.register(NAME, _forward(rule, look))
    AttentionMaskInterface.register(NAME, eager_mask)  # without a mask of its own a model is silently not causal
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def unsupported(model: Any) -> str | None:
    """Why attention of this model cannot be looked at, or None."""
    if model._can_set_attn_implementation():
        return None
    return f"{type(model).__name__}: its attention is not on transformers' attention interface"


def _forward(rule: AttentionRule, look: Look | None) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
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
            raise ToolkitError(f"{type(module).__name__}: learned sink logits", "leave attention out for this family")
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        logits = torch.matmul(query, key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        if attention_mask is not None:
            logits = logits + attention_mask
        logits = logits.float()
        probabilities = rule.probabilities(logits)
        output = torch.matmul(probabilities.to(query.dtype), value)
        if look is not None:
            look(Scores(logits, probabilities, value, output))
        return output.transpose(1, 2).contiguous(), probabilities

    return forward
