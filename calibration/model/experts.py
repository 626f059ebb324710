"""Experts as ordinary linears, in place of the fused 3-D parameters of transformers.

With one `torch.nn.Linear` per expert and projection, capturing inputs, quantizing and saving work for mixtures of
experts as they do for dense layers.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN

from calibration.architectures.spec import Experts


class Expert(nn.Module):
    """``down(act(gate(x)) * up(x))``; its linears carry the names of the checkpoint.

    ``rows`` are the tokens of the call that runs, int64 ``[tokens]`` into the flattened hidden states: what watches an
    expert's linears learns from it which positions of the text it sees.
    """

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.rows: torch.Tensor | None = None
        self._names = (experts.gate, experts.up, experts.down)
        self.add_module(experts.gate, nn.Linear(experts.hidden, experts.intermediate, bias=False))
        self.add_module(experts.up, nn.Linear(experts.hidden, experts.intermediate, bias=False))
        self.add_module(experts.down, nn.Linear(experts.intermediate, experts.hidden, bias=False))
        self.activation = ACT2FN[experts.activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x ``[tokens, hidden]`` to ``[tokens, hidden]``."""
        gate, up, down = (self.get_submodule(name) for name in self._names)
        result: torch.Tensor = down(self.activation(gate(x)) * up(x))
        return result


class ExpertList(nn.ModuleList):
    """Drop-in for transformers' experts modules (``MixtralExperts``, ``Qwen3MoeExperts``)."""

    def __init__(self, experts: Experts) -> None:
        super().__init__(Expert(experts) for _ in range(experts.count))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Route tokens and sum the weighted outputs.

        Args:
            hidden_states: ``[tokens, hidden]``.
            top_k_index: int64 ``[tokens, k]``; an index equal to the number of experts means "no expert".
            top_k_weights: ``[tokens, k]``.
        """
        total = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            token, slot = torch.where(top_k_index == index)
            if token.numel():
                expert.rows = token
                y = expert(hidden_states[token]) * top_k_weights[token, slot, None]
                total.index_add_(0, token, y.to(total.dtype))
        return total


def set_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` at ``path`` below ``root``."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
