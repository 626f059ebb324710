"""Logarithmic grids in a running model, simulated: for attention probabilities, and for what enters the last linear of
an MLP (RepQ-ViT, arXiv 2212.08254; AdaLog, arXiv 2407.12951)."""

from __future__ import annotations

import itertools
import re
from functools import partial
from typing import Any

import torch

from calibration.architectures import ArchitectureSpec
from calibration.capture import transform_input
from calibration.errors import ToolkitError, nearest
from ptq.numerics.logarithmic import CANDIDATES, LogQuant, fake_quantize_log, log_sqrt2, signed_log
from ptq.runtime.attention import has_interface

BITS = (3, 4, 5, 6, 8)
_GRID = re.compile(r"(log2|log-sqrt2|adalog(\d+))-(\d+)")
_numbers = itertools.count()


def parse_log_grid(option: str, text: str) -> LogQuant:
    """``log2-4``, ``log-sqrt2-4`` or ``adalog20-4`` (base 2^(20/37)), the last number being the bits.

    Raises:
        ToolkitError: the text is none of these; ``option`` is named in it.
    """
    found = _GRID.fullmatch(text.strip().lower())
    bits = int(found[3]) if found else 0
    if found is None or bits not in BITS or (found[2] and int(found[2]) not in CANDIDATES):
        closest = nearest(text, ["log2-4", "log-sqrt2-4", "adalog20-4"])
        choices = f"log2-B, log-sqrt2-B or adalogQ-B, B among {', '.join(map(str, BITS))}, Q from {CANDIDATES[0]} to "
        raise ToolkitError(f"{option}: unknown grid '{text}'", f"{closest}write {choices}{CANDIDATES[-1]}")
    return log_sqrt2(bits) if found[1] == "log-sqrt2" else LogQuant(bits, int(found[2] or LogQuant.q))


def quantize_probabilities(model: Any, grid: LogQuant) -> None:
    """Quantize the attention probabilities of a transformers model from now on. Keys, values and the product with them
    stay as they are.

    Raises:
        ToolkitError: its attention is not exchangeable, or is exchanged already for a quantized KV cache.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    if not has_interface(model.config):
        reason = f"the attention of '{model.config.model_type}' cannot be exchanged"
        raise ToolkitError(f"--probabilities: {reason}", "leave the option out")
    if model.config._attn_implementation not in ("sdpa", "eager"):
        raise ToolkitError("--probabilities: the KV cache of this model is quantized", "score a model without kv")
    name = f"ptq-probabilities-{next(_numbers)}"
    AttentionInterface.register(name, partial(explicit_attention, grid=grid))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model.set_attn_implementation(name)


def explicit_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    *,
    grid: LogQuant,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with the probabilities in memory, so that they can be quantized. Masked ones are exactly zero.

    Args:
        query: ``[B, heads, T, width]``; key and value ``[B, key/value heads, S, width]``.
        attention_mask: added to the scores, ``[B, 1, T, S]``.

    Returns:
        ``[B, T, heads, width]`` and the quantized probabilities ``[B, heads, T, S]``.
    """
    if options.get("s_aux") is not None:
        raise ToolkitError("--probabilities: this model has attention sinks", "leave the option out")
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    p = fake_quantize_log(torch.softmax(scores, dim=-1, dtype=torch.float32), grid).to(query.dtype)
    return (p @ value).transpose(1, 2).contiguous(), p


def quantize_mlp_values(model: Any, spec: ArchitectureSpec, grid: LogQuant) -> None:
    """From now on what enters the last linear of every feed-forward network has a sign and a logarithmic magnitude."""
    for index, block in enumerate(model.get_submodule(spec.blocks)):
        for network in spec.block(index).feed_forward:
            transform_input(block.get_submodule(spec.module_name(network.down)), partial(signed_log, quant=grid))
