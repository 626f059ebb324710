"""Quantized embeddings and heads: which scheme they get, what speaks against it, and their rounding.

They are rounded to nearest when the file is written: no pass looks at them. A head that is tied to the embedding stays
tied, so the two then have one scheme.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from calibration.architectures import ArchitectureSpec
from calibration.errors import PlanError, Problem
from calibration.model.checkpoint import TensorInfo
from ptq.formats import checks
from ptq.formats.gguf_blocks import BLOCK, type_of
from ptq.linears import ModelLayout, PlannedLinear
from ptq.methods.rtn import round_to_nearest
from ptq.planning.plan import Plan
from ptq.planning.recipe import FLOAT
from ptq.quantized import QuantizedTensor
from ptq.scheme import SUPER_WIDTH, QuantScheme, parse_scheme

HOLDING = ("native", "gguf")
"""Formats with a place for quantized embeddings."""
GGUF_DEFAULT = "q8_0"  # what llama.cpp itself gives small models' embeddings, or better


def default_outside(format_name: str) -> str:
    """The scheme of embedding and head of a quantized model where none is asked for."""
    return GGUF_DEFAULT if format_name == "gguf" else FLOAT


def outside_names(model: Any, stored: Iterable[str], spec: ArchitectureSpec) -> tuple[str, str]:
    """Token embedding and head of a transformers model, as the checkpoint's tensors are called, without ``.weight``."""
    checkpoint = {spec.root_module_name(name): name for name in stored}
    found = []
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        path = next((name for name, other in model.named_modules() if other is module), "lm_head") + ".weight"
        found.append(checkpoint.get(path, path).removesuffix(".weight"))
    return found[0], found[1]


def quantized_outside(
    infos: Mapping[str, TensorInfo],
    spec: ArchitectureSpec,
    model: Any,
    embeddings: str | None,
    head: str | None,
    format_name: str,
    default: str,
) -> tuple[PlannedLinear, ...]:
    """Embedding and head with their schemes, those that are quantized.

    Args:
        model: of the checkpoint's class, on any device.
        embeddings, head: schemes, ``float``, or None for the default.
        default: a scheme, or ``float``; see `default_outside`.

    Raises:
        ToolkitError: no scheme.
        PlanError: they cannot be quantized like that.
    """
    table, output = outside_names(model, infos, spec)
    tied = f"{output}.weight" not in infos
    if tied and embeddings is None:
        embeddings = head
    texts = {table: default if embeddings is None else embeddings}
    texts |= {} if tied else {output: default if head is None else head}
    problems, planned = [], []
    if tied and head is not None and head != embeddings:
        reason = f"is tied to the embedding, which gets {embeddings}"
        problems.append(Problem(f"--head {head}", reason, "give both the same scheme, or leave --head out"))
    for name, text in texts.items():
        info = infos.get(f"{name}.weight")
        asked = (embeddings, head)[name == output and not tied] is not None
        if text != FLOAT and asked and info is None:
            fix = "leave --embeddings and --head out"
            problems.append(Problem(f"{name} {text}", "the checkpoint has no such tensor", fix))
        if text == FLOAT or info is None:
            continue
        linear = PlannedLinear(name, -1, (info.shape[0], info.shape[1]), parse_scheme(text))
        found = list(outside_problems(linear, format_name))
        if asked or not found:
            problems += found
            planned.append(linear)
    if problems:
        raise PlanError(problems)
    return tuple(planned)


def outside_problems(linear: PlannedLinear, format_name: str) -> Iterable[Problem]:
    """What speaks against an embedding or head quantized like this."""
    assert linear.scheme is not None
    weights, columns = linear.scheme.weights, linear.shape[1]
    if format_name not in HOLDING:
        reason = f"'{format_name}' has no place for quantized embeddings and heads"
        yield Problem(linear.name, reason, f"use --format gguf, or {checks.NATIVE}")
    if linear.scheme.inputs is not None or linear.scheme.cache is not None:
        yield Problem(linear.name, "embeddings have no inputs to quantize", "use a scheme such as w8a16-g128 or q8_0")
    if weights.grouping.axis == "out" or weights.salient_percent is not None or weights.scale_format == "e4m3":
        yield Problem(linear.name, f"{linear.scheme} is not made for embeddings", "use a scheme such as w8a16-g128")
    width = SUPER_WIDTH if weights.superblocks else weights.grouping.width(columns)
    if columns % (BLOCK if format_name == "gguf" else 1) or columns % width:
        reason = f"{columns} columns are not a multiple of the {width} that share a scale"
        yield Problem(linear.name, reason, "use w8a16-gchannel, or in GGUF q8_0")
    elif format_name == "gguf" and type_of(linear.scheme) is None:
        yield Problem(linear.name, f"{linear.scheme} has no type in 'gguf'", "use q8_0 or q6_k")


def with_outside(
    plan: Plan,
    infos: Mapping[str, TensorInfo],
    spec: ArchitectureSpec,
    model: Any,
    embeddings: str | None,
    head: str | None,
) -> Plan:
    """The plan with embedding and head quantized as asked, and the size that makes.

    Raises:
        ToolkitError, PlanError: see `quantized_outside`.
    """
    name = plan.format.name
    chosen = quantized_outside(infos, spec, model, embeddings, head, name, default_outside(name))
    saved = sum(infos[f"{linear.name}.weight"].nbytes - outside_bytes(linear) for linear in chosen)
    sizes = replace(
        plan.sizes, output_bytes=plan.sizes.output_bytes - saved, disk_bytes=plan.sizes.disk_bytes - 2 * saved
    )
    return replace(plan, layout=replace(plan.layout, outside=chosen), sizes=sizes)


def outside_bytes(linear: PlannedLinear) -> int:
    """Stored bytes of a quantized embedding or head."""
    assert linear.scheme is not None
    return round(linear.scheme.bits_per_weight(*linear.shape) * linear.numel / 8)


def rounded_outside(
    tensors: Iterable[tuple[str, torch.Tensor]], layout: ModelLayout
) -> Iterator[tuple[str, torch.Tensor | QuantizedTensor]]:
    """Tensors outside the blocks, those that the layout quantizes by the name of their module and rounded."""
    schemes: dict[str, QuantScheme] = {n.name: n.scheme for n in layout.outside if n.scheme is not None}
    for name, tensor in tensors:
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in schemes:
            yield module, round_to_nearest(tensor.float(), schemes[module])
        else:
            yield name, tensor
