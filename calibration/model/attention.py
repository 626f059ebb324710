"""Attention functions of transformers by name, and looking at what they are given."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Keys = Callable[[torch.Tensor, torch.Tensor], None]
"""Looks at keys (after the rotary embedding) and values, ``[batch, key/value heads, tokens, width]`` each."""

_LOOKING = "calibration-looking"


def attention_function(name: str, module: torch.nn.Module) -> Callable[..., Any]:
    """The attention function of this name; the eager one lies beside the class of ``module``."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    function: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return function


@contextmanager
def looking_at_keys(block: torch.nn.Module, look: Keys) -> Iterator[None]:
    """While open, ``look`` sees the keys and values of every forward pass of the block's attention. Its class must take
    attention functions by name; masks must be there already, as those of calibration are.
    """
    from transformers import AttentionInterface

    config: Any = next(m.config for m in block.modules() if hasattr(m, "layer_idx") and hasattr(m, "config"))
    base = config._attn_implementation

    def attend(module: torch.nn.Module, query: Any, key: Any, value: Any, *args: Any, **options: Any) -> Any:
        look(key, value)
        return attention_function(base, module)(module, query, key, value, *args, **options)

    AttentionInterface.register(_LOOKING, attend)
    config._attn_implementation = _LOOKING
    try:
        yield
    finally:
        config._attn_implementation = base
