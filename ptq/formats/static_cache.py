"""Static steps of a KV cache in compressed-tensors, which lie beside the linears: ``<attention>.k_scale``, ``v_scale``.

One float for all tokens, heads and channels of a layer's keys (after the rotary embedding), one for its values; here
they are the parts ``key_scale`` and ``value_scale`` of the linear that makes them. Source: vLLM and compressed-tensors
0.20, ``kv_cache_scheme`` with strategy "tensor" and ``dynamic`` false. Until August 2024 compressed-tensors called them
``<attention>.k_proj.output_scale`` and ``v_proj.output_scale``, which is read as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ptq.linears import PlannedLinear
from ptq.quantized import CACHE_STEPS

FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "W_pack", "att_proj")
STORED = dict(zip(("k_scale", "v_scale"), CACHE_STEPS, strict=True))
OLDER = "output_scale"
MAKERS = {"k_scale": ("k_proj", *FUSED), "v_scale": ("v_proj", *FUSED)}


def names(linear: str) -> dict[str, str]:
    """Suffix -> full name of the steps that belong to a linear; empty for one that makes neither keys nor values."""
    attention, _, leaf = linear.rpartition(".")
    return {suffix: f"{attention}.{suffix}" for suffix, makers in MAKERS.items() if leaf in makers}


def older(linear: str) -> str | None:
    """Which of the steps ``<linear>.output_scale`` is in older files, if any."""
    return next((suffix for suffix, makers in MAKERS.items() if linear.rpartition(".")[2] == makers[0]), None)


def without_place(linears: Iterable[PlannedLinear]) -> list[PlannedLinear]:
    """Of linears with caches the first of every block where none of them makes keys, or none values, by its name."""
    blocks: dict[int, list[PlannedLinear]] = {}
    for linear in linears:
        if linear.scheme is not None and linear.scheme.cache is not None and linear.scheme.cache.static:
            blocks.setdefault(linear.block, []).append(linear)
    wanted = set(MAKERS)
    return [found[0] for found in blocks.values() if {s for linear in found for s in names(linear.name)} != wanted]


def encode(parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The steps among the parts of a linear, by suffix."""
    return {suffix: parts[part].float().view(1) for suffix, part in STORED.items() if part in parts}


def decode(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `encode`."""
    return {part: tensors[suffix].float().view(1) for suffix, part in STORED.items() if suffix in tensors}
