"""``quantization_config`` of compressed-tensors: linears in groups of one scheme, written and read back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from calibration.errors import ToolkitError
from ptq.activations import ActivationQuant
from ptq.formats import packed_floats, plain_codes
from ptq.linears import ModelLayout, PlannedLinear
from ptq.scheme import BITS, Grouping, QuantScheme, TensorQuant, integer_quantizer

PACKED = "pack-quantized"
MIXED = "mixed-precision"  # each group names its own
LIBRARY_VERSION = "0.20.0"  # of the layout that is written, whatever is installed
EXPERTS = r"re:.*\.experts\.\d+\..*"  # transformers finds the experts' scheme by this word in a pattern


class Kind(NamedTuple):
    """All that a file tells of a scheme: integers by bits, group size and symmetry, the preset of packed floats, the
    layout of plain codes, and the grid of inputs."""

    bits: int
    size: int | None
    symmetric: bool
    preset: str | None
    plain: str | None
    inputs: ActivationQuant | None


def kind_of(linear: PlannedLinear) -> Kind:
    assert linear.scheme is not None
    w = linear.scheme.weights
    layout = plain_codes.layout_of(linear.scheme)
    return Kind(w.bits, w.grouping.size, w.symmetric, packed_floats.preset_of(w), layout, linear.scheme.inputs)


def describe(layout: ModelLayout) -> dict[str, Any]:
    """``quantization_config`` of config.json, validated by the library's own classes."""
    # imported here: it takes seconds, and reading or listing formats does not need it
    from compressed_tensors.quantization import QuantizationConfig

    kinds: dict[Kind, list[PlannedLinear]] = {}
    for linear in layout.quantized:
        kinds.setdefault(kind_of(linear), []).append(linear)
    groups = {}
    for i, (kind, linears) in enumerate(kinds.items()):
        targets = ["Linear"]
        if len(kinds) > 1:
            targets = [linear.name for linear in linears if linear.expert is None]
            targets += [EXPERTS] if any(linear.expert is not None for linear in linears) else []
        weights: dict[str, Any] = {"num_bits": kind.bits, "type": "int", "symmetric": kind.symmetric}
        weights |= {"dynamic": False, "strategy": "channel"}
        weights |= {} if kind.size is None else {"strategy": "group", "group_size": kind.size}
        if kind.preset is not None:
            weights = packed_floats.weight_arguments(kind.preset)
        if kind.plain is not None and linears[0].scheme is not None:
            weights = plain_codes.weight_arguments(linears[0].scheme)
        groups[f"group_{i}"] = {
            "targets": targets,
            "weights": weights,
            "input_activations": input_arguments(kind.inputs),
            "output_activations": None,
            # without it readers guess, and guess 8 bits per row wrong
            "format": kind.plain or packed_floats.FORMATS.get(kind.preset or "", PACKED),
        }
    labels = {str(group["format"]) for group in groups.values()} or {PACKED}
    cache = next((linear.scheme.cache for linear in layout.quantized if linear.scheme is not None), None)
    config = {
        "quant_method": "compressed-tensors",
        "version": LIBRARY_VERSION,
        "format": labels.pop() if len(labels) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [linear.name for linear in layout.left] + list(layout.other_linears),
        "kv_cache_scheme": plain_codes.cache_arguments(cache, plain_codes.head_width(layout.config) if cache else 0),
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }
    QuantizationConfig.model_validate(config)
    return config


def input_arguments(inputs: ActivationQuant | None) -> dict[str, Any] | None:
    """``input_activations`` of a group, None where inputs stay as they are."""
    if inputs is not None and inputs.kind in packed_floats.FORMATS:
        return packed_floats.input_arguments(inputs)
    return plain_codes.input_arguments(inputs)


def scheme_of(data: Mapping[str, Any], name: str, plain: bool) -> QuantScheme:
    """The scheme of one linear: exact names and patterns come before class names, as in the library.

    Args:
        plain: its codes lie one per byte.
    """
    groups = list(data["config_groups"].values())

    def match(target: str) -> bool:
        return re.match(target[3:], name) is not None if target.startswith("re:") else target == name

    named = [group for group in groups if any(match(target) for target in group["targets"])]
    chosen = (named or [group for group in groups if "Linear" in group["targets"]] or [None])[0]
    if chosen is None:
        raise ToolkitError(f"{name}: packed, but no group of config.json targets it", "fetch config.json again")
    w = chosen["weights"]
    kind, size = chosen.get("format") or data.get("format"), w.get("group_size")
    floats, told = packed_floats.scheme_of(kind, w), chosen.get("input_activations")
    if floats is not None and not told:
        return floats
    block_inputs = packed_floats.read_inputs(told) if told else None
    if floats is not None and block_inputs is not None:
        return QuantScheme(floats.weights, block_inputs)
    strategy = w.get("strategy") or ("group" if size and size > 0 else "channel" if size == -1 else "tensor")
    inputs = plain_codes.read_inputs(chosen.get("input_activations"), name)
    octets = plain_codes.read_weights(w, strategy) if plain and w["num_bits"] == 8 else None
    if octets is not None:
        return QuantScheme(octets, inputs)
    integers = (PACKED, None, plain_codes.INT) if plain else (PACKED, None)
    wrong = w.get("type", "int") != "int" or kind not in integers or w["num_bits"] not in BITS
    if wrong or strategy not in ("group", "channel"):
        raise ToolkitError(
            f"{name}: '{kind}' with {w['num_bits']}-bit {w.get('type', 'int')} weights per {strategy}",
            f"only '{PACKED}' integer weights of {', '.join(map(str, BITS))} bits per group or channel, plain "
            f"codes of 8 bits per tensor, channel or block of 128 x 128, {plain_codes.MX!r}, and "
            f"{' and '.join(map(repr, packed_floats.FORMATS.values()))}",
        )
    bits = int(w["num_bits"])
    grouping = Grouping("group", int(size)) if strategy == "group" else Grouping("channel")
    return QuantScheme(
        TensorQuant(bits, grouping, integer_quantizer(bits, "sym" if w.get("symmetric", True) else "asym")),
        inputs,
    )
