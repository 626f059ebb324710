"""Committed blocks: a finished segment as tensors of a file, and back as weights or as quantized linears.

The files are in the native layout whatever the format of the output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch

from calibration.errors import ToolkitError
from calibration.model.checkpoint import CheckpointReader
from calibration.walk.segment import Segment
from calibration.walk.walk import Tensors, Transforms
from ptq.formats.native import ORDER as NATIVE_ORDER
from ptq.formats.registry import FORMATS
from ptq.linears import ModelLayout
from ptq.numerics.activations import fake_quantize_inputs
from ptq.numerics.integers import LARGEST_SCALE, SMALLEST_SCALE
from ptq.quantized import INPUT_GRID, QuantizedTensor
from ptq.scheme import parse_scheme

NATIVE = FORMATS["native"]


def _native_tensors(tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The tensors of one quantized linear by suffix."""
    return {s: tensors[f"{name}.{s}"] for s in sorted(NATIVE.suffixes) if f"{name}.{s}" in tensors}


class CommittedBlocks:
    """The walk's files as a source of quantized linears and float tensors."""

    def __init__(self, paths: Iterable[Path], layout: ModelLayout) -> None:
        self.paths = list(paths)
        self.schemes = {linear.name: (linear.scheme, linear.shape) for linear in layout.quantized}

    def blocks(self) -> Iterator[tuple[dict[str, QuantizedTensor], dict[str, torch.Tensor]]]:
        """Block by block: quantized linears and the remaining tensors, by full name."""
        for path in self.paths:
            with CheckpointReader.of_file(path) as file:
                tensors = {n: file.tensor(n) for n in file.infos}
            quantized: dict[str, QuantizedTensor] = {}
            for name, (scheme, shape) in self.schemes.items():
                found = _native_tensors(tensors, name)
                if found and scheme is not None:
                    quantized[name] = NATIVE.decode(found, scheme, shape)
            taken = {f"{n}.{s}" for n in quantized for s in NATIVE.suffixes}
            yield quantized, {n: t for n, t in tensors.items() if n not in taken}

    def stored(
        self, advance: Callable[[str], None]
    ) -> Iterator[tuple[dict[str, QuantizedTensor], dict[str, torch.Tensor]]]:
        """The same for an output in the native layout, in which the files are already: all tensors as they lie there,
        in the order in which they are laid out. ``advance`` is called with every linear."""
        for path in self.paths:
            with CheckpointReader.of_file(path) as file:
                names = {f"{n}.{s}": n for n in self.schemes for s in NATIVE_ORDER if f"{n}.{s}" in file.infos}
                tensors = {n: file.tensor(n) for n in (*(n for n in file.infos if n not in names), *names)}
            yield {}, tensors
            for name in dict.fromkeys(names.values()):
                advance(name)


SATURATED = "saturated scales"  # the note of a linear that has some


def encode_segment(segment: Segment) -> dict[str, torch.Tensor]:
    """A finished segment as the tensors of its file: native codes, and the rest in its stored dtype."""
    quantized: dict[str, QuantizedTensor] = {}
    for name, replacement in segment.quantized.items():
        assert isinstance(replacement, QuantizedTensor)
        quantized[segment.full_name(name)] = dataclasses.replace(replacement, parts=segment.parts.get(name, {}))
    replaced = {f"{name}.weight" for name in segment.quantized}
    others = {
        segment.full_name(name): segment.masters[name].to(segment.stored_dtypes[name])
        for name in segment.masters
        if name not in replaced
    }
    missing = set(segment.schemes) - set(segment.quantized)
    if missing:
        raise ToolkitError(
            f"{', '.join(segment.full_name(n) for n in sorted(missing))}: has a scheme but was not rounded",
            "this is a bug of the method: please report it",
        )
    for name, tensor in others.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ToolkitError(f"{name}: NaN or Inf after {segment.index + 1} blocks", "try --dtype float32")
    for name in segment.quantized:
        if count := saturated_scales(quantized[segment.full_name(name)]):
            segment.note(name, **{SATURATED: count})
    for name, q in quantized.items():
        others.update({f"{name}.{s}": t for s, t in NATIVE.encode(q, torch.bfloat16).items()})
    return others


def saturated_scales(q: QuantizedTensor) -> int:
    """How many steps are the largest that 16 bits hold, and lines (rows, or columns for axis "out") that are not zero
    with some of the smallest: their weights are cut off or lose digits."""
    w = q.scheme.weights
    if w.scale_format != "half" or w.salient_percent is not None:
        return 0
    lost = (q.scale.abs() <= SMALLEST_SCALE).any(dim=1)
    if bool(lost.any()):
        weights = q.dequantize(torch.float32)
        lost &= ((weights if w.grouping.axis == "in" else weights.T) != 0).any(dim=1)
    return int((q.scale.abs() >= LARGEST_SCALE).sum()) + int(lost.sum())


class Restore:
    """Committed tensors back to float weights, for propagation through what was written."""

    def __init__(self, layout: ModelLayout) -> None:
        self.linears = {linear.name: linear for linear in layout.quantized}

    def __call__(self, tensors: Tensors, schemes: Mapping[str, str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        weights: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            linear, _, suffix = name.rpartition(".")
            if linear not in self.linears or suffix not in NATIVE.suffixes:
                weights[name] = tensor
            elif suffix == "codes":
                planned = self.linears[linear]
                stored = _native_tensors(tensors, linear)
                w = NATIVE.decode(stored, parse_scheme(schemes[linear]), planned.shape).dequantize(dtype)
                weights[f"{linear}.weight"] = w.T.contiguous() if planned.conv1d else w
        return weights


def input_quantizers(tensors: Tensors, schemes: Mapping[str, str]) -> Transforms:
    """Fake quantization of the inputs of every linear whose scheme quantizes them, from the tensors of a committed
    file, for propagation through what was written."""
    found = {}
    for name, text in schemes.items():
        quant = parse_scheme(text).inputs
        if quant is not None:
            scale, zero = (tensors.get(f"{name}.{part}") for part in INPUT_GRID)
            found[name] = partial(fake_quantize_inputs, quant=quant, scale=scale, zero=zero)
    return found
