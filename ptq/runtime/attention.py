"""Attention with a quantized KV cache, through transformers' attention interface.

Keys (after the rotary embedding) and values are quantized per token and head on their way into the product, which is
what an integer cache would hold: the grid of a token does not depend on other tokens. The cache itself stays in the
model's dtype, so this simulates the numbers and saves no memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from calibration.architectures import ArchitectureSpec
from calibration.errors import ToolkitError
from calibration.model.attention import attention_function
from ptq.activations import CacheQuant
from ptq.numerics.activations import fake_quantize_inputs
from ptq.numerics.hadamard import hadamard_transform
from ptq.scheme import QuantScheme

_numbers = itertools.count()


def has_interface(config: Any) -> bool:
    """Whether the model class of a config takes attention functions by name (BLOOM and Falcon do not)."""
    from transformers import AutoModelForCausalLM

    model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    return bool(model_class._can_set_attn_implementation())


def quantize_cache(
    model: Any,
    layers: Mapping[int, CacheQuant],
    turned: Mapping[int, int],
    steps: Mapping[int, Sequence[torch.Tensor | None]],
) -> None:
    """Quantize keys and values of the given decoder layers of a transformers model from now on.

    The model must have passed `has_interface`.

    Args:
        turned: layer -> block size of Hadamard transforms that queries and keys go through first (rotation R3), which
            leaves their products as they are.
        steps: layer -> steps ``[1]`` of keys and values, where the cache is static.

    Raises:
        ToolkitError: a static cache lacks one.
    """
    for layer, cache in layers.items():
        if cache.static and None in [*steps.get(layer, (None,))]:
            raise ToolkitError(
                f"layer {layer}: a static KV cache without its steps k_scale and v_scale",
                "fetch the safetensors files again; they and config.json do not belong together",
            )

    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    base = model.config._attn_implementation
    name = f"ptq-cache-{next(_numbers)}"
    mine = partial(_attention, base=base, layers=dict(layers), turned=dict(turned), steps=dict(steps))
    AttentionInterface.register(name, mine)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])  # without it masks would be left out
    model.set_attn_implementation(name)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    base: str,
    layers: Mapping[int, CacheQuant],
    turned: Mapping[int, int],
    steps: Mapping[int, Sequence[torch.Tensor | None]],
    **options: Any,
) -> Any:
    """query ``[B, heads, T, width]``, key and value ``[B, key/value heads, S, width]``."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if layer in turned:
        query, key = (hadamard_transform(x, turned[layer]) for x in (query, key))
    quant = layers.get(layer)
    if quant is not None:
        key, value = (
            fake_quantize_inputs(x, quant.grid, step)
            for x, step in zip((key, value), steps.get(layer, (None, None)), strict=True)
        )
    return attention_function(base, module)(module, query, key, value, *args, **options)


def cache_layers(spec: ArchitectureSpec, schemes: Mapping[str, QuantScheme | None]) -> dict[int, CacheQuant]:
    """Decoder layer -> grid of its KV cache. The linears that read the block's first input make keys and values, and
    their schemes, by full name, say it.

    Raises:
        ValueError: linears of one layer differ, with their names.
    """
    layers = {}
    for index in range(spec.n_blocks):
        makers = [spec.prefix(index) + name for name in spec.block(index).inputs[0].linears]
        found = {name: scheme.cache for name in makers if (scheme := schemes.get(name)) is not None}
        if len(set(found.values())) > 1:
            raise ValueError(", ".join(found))
        cache = next(iter(found.values()), None)
        if cache is not None:
            layers[index] = cache
    return layers
