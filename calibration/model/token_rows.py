"""Embedding a text with the rows of its tokens, where the whole table may be larger than everything else of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def token_table(model: Any) -> tuple[str, nn.Embedding] | None:
    """The token embedding of a transformers model: the name of its weight, and the module. None where tokens are not
    looked up in a table of rows."""
    module = model.get_input_embeddings()
    path = next((path for path, other in model.named_modules() if other is module), None)
    return (f"{path}.weight", module) if isinstance(module, nn.Embedding) and path is not None else None


@contextmanager
def only_rows(module: nn.Embedding, tokens: torch.Tensor, rows: torch.Tensor) -> Iterator[None]:
    """While open, ``module`` has the rows of some tokens instead of its weight.

    Args:
        tokens: int64 ``[count]``, rising.
        rows: ``[count, width]``, on the same device.

    Raises:
        AssertionError: inside, where the module is given another token: its row is not here.
    """
    weight, padding = module._parameters["weight"], module.padding_idx

    def renumber(_: nn.Module, args: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> Any:
        ids = args[0] if args else named["input"]
        numbers = torch.searchsorted(tokens, ids).clamp_(max=len(tokens) - 1)
        assert torch.equal(tokens[numbers], ids.to(tokens.dtype)), "a token that is not in the text is looked up"
        return (numbers,), {}

    hook = module.register_forward_pre_hook(renumber, with_kwargs=True)
    module._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
    module.padding_idx = None  # the number of a row of the whole table, which matters to gradients alone
    try:
        yield
    finally:
        hook.remove()
        module._parameters["weight"], module.padding_idx = weight, padding
