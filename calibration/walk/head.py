"""The model behind its blocks: from hidden states to log-probabilities, a piece of a window at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from calibration.model.classes import text_config
from calibration.model.skeleton import Skeleton, load_parameters

PIECE_ELEMENTS = 2**23  # logits that are held at a time; a few such tensors exist beside them

LogProbabilities = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Token ids ``[1, L]`` and the hidden states behind the last block ``[1, L, hidden]`` to log-probabilities ``[L, V]``,
float32 (float64 where the states are)."""


@contextmanager
def head(skeleton: Skeleton, outside: Mapping[str, torch.Tensor]) -> Iterator[LogProbabilities]:
    """While open, what follows the blocks can be run, with gradients where autograd is on.

    The model itself runs, with blocks that return the hidden states, so that its final norm, projections and soft caps
    come along without being named. Everything behind the blocks works token by token: pieces may be run alone.

    Args:
        outside: the parameters that no block holds, by module path.
    """
    load_parameters(skeleton.model, outside)
    skeleton.model.tie_weights()
    blocks = skeleton.model.get_submodule(skeleton.spec.blocks)
    entering: list[torch.Tensor] = []

    def inject(*args: object, **kwargs: object) -> object:
        return (entering[0],) if skeleton.spec.tuple_output else entering[0]

    def run(ids: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        entering[:] = [states]
        logits: torch.Tensor = skeleton.model(ids.to(skeleton.device), use_cache=False).logits[0]
        return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)

    for block in blocks:
        block.forward = inject
    try:
        yield run
    finally:
        entering.clear()
        for block in blocks:
            del block.forward


def pieces(skeleton: Skeleton, length: int) -> list[slice]:
    """The positions of a window that predict one of its tokens, cut so that logits stay small."""
    step = max(1, PIECE_ELEMENTS // int(text_config(skeleton.model.config).vocab_size))
    return [slice(start, min(start + step, length - 1)) for start in range(0, length - 1, step)]
