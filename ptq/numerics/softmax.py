"""Softmaxes that can output zero: how a head can leave the residual stream alone.

Bondarenko, Nagel, Blankevoort, "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing"
(NeurIPS 2023, arXiv 2306.12929), equation 4; Miller, "Attention is off by one" (2023) for `softmax1`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch


def clipped(p: torch.Tensor, gamma: float | torch.Tensor, zeta: float = 1.0) -> torch.Tensor:
    """``clip((zeta - gamma) p + gamma, 0, 1)`` of probabilities; ``gamma = 0, zeta = 1`` changes no bit.

    Rows are not normalised again. An entry is zero where ``p <= -gamma / (zeta - gamma)``.

    Args:
        gamma: at most 0, broadcastable against p; ``zeta``: at least 1.
    """
    assert bool(torch.as_tensor(gamma <= 0).all()) and zeta >= 1, (gamma, zeta)
    return (p * (zeta - gamma) + gamma).clamp(0.0, 1.0)


def gamma_of(alpha: float, length: int) -> float:
    """``-alpha / T`` for sequences of at most ``length`` tokens T: one alpha serves models of every length."""
    return -alpha / length


def softmax1(logits: torch.Tensor) -> torch.Tensor:
    """``exp(a_i) / (1 + sum_j exp(a_j))`` over the last axis: softmax with one more logit of 0, whose value is 0."""
    top = logits.amax(-1, keepdim=True).clamp(min=0.0)
    powers = (logits - top).exp()
    return powers / ((-top).exp() + powers.sum(-1, keepdim=True))


def renormalised(p: torch.Tensor, smallest: float = 1e-12) -> torch.Tensor:
    """Rows that sum to 1 again; rows of zeros stay zeros."""
    return p / p.sum(-1, keepdim=True).clamp_min(smallest)


@dataclass(frozen=True)
class SoftmaxRule:
    """What takes the place of softmax; as it is, softmax itself, bit for bit.

    Attributes:
        gamma, zeta: of the clipped softmax.
        off_by_one: `softmax1` instead.
        normalise: rows sum to 1 again after clipping.
        closed_from: a gate is closed where the first key gets at least this much: the head's output is 0 there.
    """

    gamma: float = 0.0
    zeta: float = 1.0
    off_by_one: bool = False
    normalise: bool = False
    closed_from: float | None = None

    def __str__(self) -> str:
        changed = [f"{f.name} {getattr(self, f.name):g}" for f in fields(self) if getattr(self, f.name) != f.default]
        return ", ".join(changed) or "plain"

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities ``[..., queries, keys]`` of masked logits."""
        p = softmax1(logits) if self.off_by_one else logits.softmax(-1)
        first = p[..., :1]
        p = clipped(p, self.gamma, self.zeta)
        p = renormalised(p) if self.normalise else p
        return p if self.closed_from is None else torch.where(first >= self.closed_from, 0.0, p)


@dataclass(frozen=True)
class HeadSoftmax:
    """Clipped softmax with a gamma for every head, and heads whose gate is shut.

    Attributes:
        gammas: float32 ``[heads]``, at most 0.
        open: float32 ``[heads]``, 0 where the output of a head is 0 and 1 elsewhere.
    """

    gammas: torch.Tensor
    open: torch.Tensor

    @classmethod
    def plain(cls, heads: int) -> HeadSoftmax:
        return cls(torch.zeros(heads), torch.ones(heads))

    def with_head(self, head: int, gamma: float = 0.0, shut: bool = False) -> HeadSoftmax:
        """The same with another rule for one head."""
        gammas, is_open = self.gammas.clone(), self.open.clone()
        gammas[head], is_open[head] = gamma, 0.0 if shut else 1.0
        return HeadSoftmax(gammas, is_open)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities ``[batch, heads, queries, keys]`` of masked logits."""
        gammas, is_open = (t.to(logits.device)[:, None, None] for t in (self.gammas, self.open))
        return clipped(logits.softmax(-1), gammas) * is_open
