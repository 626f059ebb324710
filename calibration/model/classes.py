"""The transformers class of a config: built without weights, its decoder blocks found, names of files translated."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn

Attention = Literal["sdpa", "eager"]


def text_config(config: Any) -> Any:
    """The part of a config that describes the language model; the config itself where there is no other part."""
    return config.get_text_config(decoder=True)


def setting(config: Any, name: str) -> Any:
    """An entry of a config, or None: also where every layer has one of its own."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def rope_switch(config: Any) -> int | None:
    """The number of positions beyond which LongRoPE models (Phi-3-128k, Phi-4-mini) turn all keys with other
    frequencies, so that keys in a cache no longer fit; None for all others."""
    text = text_config(config)
    rope = setting(text, "rope_parameters") or setting(text, "rope_scaling") or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    found = next((kind for kind in kinds if kind.get("rope_type", kind.get("type")) == "longrope"), None)
    if found is None:
        return None
    length = found.get("original_max_position_embeddings") or setting(text, "original_max_position_embeddings")
    return int(length) if length else None


def is_wrapper(config: Any) -> bool:
    """Whether a language model is one part among others (vision, audio, projector)."""
    return text_config(config) is not config


def auto_class(config: Any) -> Any:
    """The auto class that builds the whole model: wrappers with everything that their checkpoint holds."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    whole = AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if is_wrapper(config) and type(config) in whole else AutoModelForCausalLM


def empty_model(config: Any, dtype: torch.dtype, device: torch.device, attention: Attention) -> Any:
    """A transformers model in eval mode with its parameters on meta.

    Buffers that no file stores (rotary frequencies, Gemma's embedding scale) are computed on ``device``.
    """
    with torch.device("meta"):
        model = auto_class(config).from_config(config, dtype=dtype, attn_implementation=attention)
    model.eval()
    holders = set()
    for path, module in model.named_modules():
        missing = [n for n, b in module.named_buffers(recurse=False) if b.is_meta]
        for name in missing:
            setattr(module, name, torch.empty_like(getattr(module, name), device=device))
        if missing:
            parts = path.split(".")
            holders |= {".".join(parts[:n]) for n in range(len(parts) + 1)}  # Falcon-H1 sets its blocks' buffers above
    for path in sorted(holders):
        model._init_weights(model.get_submodule(path))  # transformers' own computation of these buffers
    return model


def attention_of(config: Any) -> Attention:
    """``sdpa`` where the class supports it."""
    try:
        with torch.device("meta"):
            auto_class(config).from_config(config, attn_implementation="sdpa")
    except ValueError:
        return "eager"
    return "sdpa"


def find_blocks(model: nn.Module, count: int) -> str | None:
    """Path of the decoder blocks: the list of ``count`` modules with parameters that is nearest to the root."""
    lists = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all(any(True for _ in block.parameters()) for block in module)
    ]
    towers = ("vision", "visual", "audio", "image")
    texts = [path for path in lists if not any(word in path for word in towers)]
    return min(texts, key=lambda path: path.count("."), default=None)


def renaming(model: Any) -> Callable[[str], str]:
    """From a name in a file to the name in the class, by transformers' own table.

    Conversions that change tensors are left out: experts keep one name each.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    rules = [rule for rule in get_model_conversion_mapping(model, add_legacy=False) if isinstance(rule, WeightRenaming)]

    def rename(name: str) -> str:
        return str(apply_renamings(name, rules))

    return rename


def joined(model: Any, names: Iterable[str]) -> dict[str, list[str]]:
    """Tensors that the class keeps as one, their values after each other, by transformers' own table: the convolutions
    of Kimi Linear's queries, keys and values; experts, where each of them has its gate's rows before those of up.

    Args:
        names: of the file, as `renaming` translates them.

    Returns:
        name in the class -> names in their order.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    orders = [[(Concatenate, 0)], [(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]]
    found: dict[str, dict[tuple[int, int], str]] = {}
    for rule in get_model_conversion_mapping(model, add_legacy=False):
        steps = rule.operations if isinstance(rule, WeightConverter) else []
        if [(type(step), getattr(step, "dim", None)) for step in steps] not in orders:
            continue
        patterns = [re.compile(p.replace("*", r"(\d+)")) for p in _listed(rule._original_source_patterns)]
        for name in names:
            hits = [(i, m) for i, p in enumerate(patterns) if (m := p.search(name))]
            if hits:
                order = int(hits[0][1][1]) if hits[0][1].groups() else 0, hits[0][0]
                found.setdefault(rule.rename_source_key(name)[0], {})[order] = name
    return {target: [parts[order] for order in sorted(parts)] for target, parts in found.items()}


def expert_names(model: Any, path: str) -> tuple[str, str, str] | None:
    """What files call the gate, up and down projection of one expert whose class keeps all of them fused.

    Args:
        path: of the experts module, with parameters ``gate_up_proj`` and ``down_proj``.

    Returns:
        None where files hold the fused tensors themselves, or transformers' table says something else of them.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    names: list[str] = []
    for target, count in (("gate_up_proj", 2), ("down_proj", 1)):
        sources = [
            _leaves(rule._original_source_patterns)
            for rule in get_model_conversion_mapping(model, add_legacy=False)
            if isinstance(rule, WeightConverter)
            and rule.rename_source_key(f"{path}.0.{_leaves(rule._original_source_patterns)[0]}.weight")[0]
            == f"{path}.{target}"
        ]
        if len(sources) != 1 or len(sources[0]) != count:
            return None
        names += sources[0]
    return names[0], names[1], names[2]


def _leaves(patterns: Iterable[str] | str) -> list[str]:
    """``gate_proj`` of ``mlp.experts.*.gate_proj.weight``."""
    return [pattern.removesuffix("$").removesuffix(".weight").rpartition(".")[2] for pattern in _listed(patterns)]


def _listed(patterns: Iterable[str] | str) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)
