"""What vLLM does with our files: as seen by `benchmarks/readers.py`, as seen before on a CPU with AVX-512 (without that
it has no kernels for 4-bit weights), and, where named, in its source."""

from __future__ import annotations

import re

from ptq.activations import BLOCK_FLOATS
from ptq.formats import checks, packed_floats, plain_codes
from ptq.formats.readers import quote
from ptq.linears import ModelLayout, PlannedLinear
from ptq.scheme import QuantScheme

BEFORE = "yes (run in vLLM 0.32 on a CPU with AVX-512; without that it has no kernel for 4-bit weights)"
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that vLLM runs as one matrix."""


def vllm_answer(layout: ModelLayout, format_name: str) -> str:
    """``yes ...``, ``no: why`` or ``not known: why`` for a model in compressed-tensors, awq or gptq."""
    seen = quote("vLLM", format_name, layout)
    if format_name != "compressed-tensors":
        if (seen is None or seen.startswith("not known")) and not layout.left and _four_bits(layout):
            return BEFORE
        return seen or "not known: no such file was run"
    reasons = [reason for linear in layout.quantized if (reason := _refused(linear.scheme))]
    unequal = _unequal(layout)
    if unequal:
        reasons.insert(0, f"{checks.summary(unequal)} run as one matrix there and have different schemes")
    if reasons:
        where = seen.removeprefix("no: ").partition(": ")[0] if seen and seen.startswith("no: refused by") else ""
        return f"no: {reasons[0]}" + (f"; {where}" if where else "")
    if seen is not None and not seen.startswith("not known"):
        return seen
    unknown = [reason for linear in layout.quantized if (reason := _unknown(linear.scheme))]
    return f"not known: {unknown[0]}" if unknown else BEFORE


def _four_bits(layout: ModelLayout) -> bool:
    """Whether all weights have 4 bits in groups, and no zero points where GPTQ stores them: what ran before."""
    weights = [linear.scheme.weights for linear in layout.quantized if linear.scheme is not None]
    return all(w.bits == 4 and w.grouping.size for w in weights)


def _refused(scheme: QuantScheme | None) -> str | None:
    """Why vLLM refuses a linear of this scheme."""
    if scheme is None:
        return None
    weights, inputs = scheme.weights, scheme.inputs
    if scheme.cache is not None and not scheme.cache.static:
        return "it takes KV caches of one static symmetric scale only (read in its source)"
    if inputs is None or inputs.kind in BLOCK_FLOATS:
        return None
    plain = plain_codes.layout_of(scheme)
    if plain == plain_codes.INT and not weights.symmetric:
        return "it has no scheme for asymmetric 8-bit weights with quantized inputs"
    if inputs.granularity == "group" and inputs.kind == "int":
        return "it has no scheme for integer inputs with a step per group (read in its source)"
    if plain is None and not inputs.dynamic:
        return "it has no scheme for static inputs of packed weights (read in its source)"
    return None


def _unknown(scheme: QuantScheme | None) -> str | None:
    """Why it is not known whether vLLM runs a linear of this scheme."""
    if scheme is None:
        return None
    if scheme.cache is not None:
        return "a static KV cache was not run"
    weights = scheme.weights
    preset = packed_floats.preset_of(weights)
    if preset is not None:
        return f"{preset} has no CPU kernel there, and was not run on a GPU"
    if weights == plain_codes.MXFP8 or weights.grouping.kind == "block":
        return f"{'MXFP8' if weights == plain_codes.MXFP8 else 'FP8 in blocks'} was not run"
    if weights.float_format is not None or scheme.inputs is not None:
        return "4-bit inputs were not run" if scheme.inputs is not None and scheme.inputs.bits < 8 else None
    if weights.bits not in (4, 8):
        return f"{weights.bits}-bit weights have no CPU kernel there, and were not run on a GPU"
    if weights.grouping.size is None:
        return "weights with one scale per row have no CPU kernel there, and were not run on a GPU"
    return "8-bit weights alone were not run" if weights.bits == 8 else None


def _unequal(layout: ModelLayout) -> list[str]:
    """Linears that vLLM fuses with another of a different scheme, or with one left in float."""
    parents: dict[tuple[str, int], list[PlannedLinear]] = {}
    for linear in layout.linears:
        parent, _, leaf = linear.name.rpartition(".")
        place = next((i for i, names in enumerate(FUSED) if leaf in names), None)
        if place is not None and linear.expert is None:
            parents.setdefault((parent, place), []).append(linear)
    mixed = [group for group in parents.values() if len({str(n.scheme) for n in group}) > 1]
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", linear.name) for group in mixed for linear in group))
