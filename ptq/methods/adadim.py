"""AdaDim (Heo et al. 2023, arXiv 2309.15531): groups along the inputs or along the outputs, whichever a linear prefers.

Large activations of one input channel amplify the error of one column of W. Groups along the inputs make that column
share its step with its neighbours in every row; groups along the outputs give it steps of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from calibration.errors import Problem
from calibration.walk.capture import Call
from calibration.walk.context import Context
from calibration.walk.passes import Pass, Phase, PlanView, Stream
from calibration.walk.segment import Segment
from calibration.walk.statistics import Gram, Statistic
from ptq.linears import ModelLayout
from ptq.methods.balancing import by_value_channel
from ptq.methods.rtn import round_to_nearest
from ptq.numerics.objective import rounding_error
from ptq.scheme import NARROW_SCALES, Axis, Grouping, QuantScheme


def along(scheme: QuantScheme, axis: Axis) -> QuantScheme:
    """The scheme with its groups along that axis."""
    grouping = dataclasses.replace(scheme.weights.grouping, axis=axis)
    return dataclasses.replace(scheme, weights=dataclasses.replace(scheme.weights, grouping=grouping))


def both_axes(scheme: QuantScheme, shape: tuple[int, int]) -> tuple[QuantScheme, ...]:
    """The scheme as it is, and along the other axis where its groups divide that one too. (Hardware formats, whose
    scales are narrower than 16 bits, have rows of groups only.)"""
    if scheme.weights.scale_format in NARROW_SCALES:
        return (scheme,)
    other: Axis = "out" if scheme.weights.grouping.axis == "in" else "in"
    grouping: Grouping = dataclasses.replace(scheme.weights.grouping, axis=other)
    length = grouping.length(shape)
    return (scheme, along(scheme, other)) if length % grouping.width(length) == 0 else (scheme,)


def choose(segment: Segment, linear: str, options: tuple[QuantScheme, ...], errors: list[float]) -> QuantScheme:
    """Take the option of the least error, the first of equal ones, and record both errors.

    A grid chosen for the linear belongs to the grouping it was searched for, and goes with it.
    """
    best = min(range(len(options)), key=errors.__getitem__)
    named = {f"adadim.{o.weights.grouping.axis}": e for o, e in zip(options, errors, strict=True)}
    segment.note(linear, **named)
    if best > 0:
        segment.schemes[linear] = options[best]
        segment.grids.pop(linear, None)
    return options[best]


@dataclass(frozen=True)
class AdaDim(Pass):
    """The axis of less error of the linear's output, ||C (Q(W) - W) X^T||^2 with Q = round to nearest, from the Gram
    matrix of its input: no forward pass.

    C is diagonal: an output that one linear alone reads counts by the norm of the column it meets there. Without it,
    outputs that are large and multiplied by little (outlier channels between up and down) decide for all others.
    """

    name: ClassVar[str] = "adadim"
    summary: ClassVar[str] = "lays groups along the inputs or the outputs of a linear, by the error of its output"
    looks_at_batches: ClassVar[bool] = True
    phases: ClassVar[tuple[Phase, ...]] = (Phase.CHOOSE,)
    stream: ClassVar[Stream] = "either"
    statistics: ClassVar[tuple[type[Statistic], ...]] = (Gram,)

    def alternatives(self, scheme: QuantScheme, shape: tuple[int, int]) -> tuple[QuantScheme, ...]:
        return both_axes(scheme, shape)

    def apply(self, segment: Segment, context: Context) -> None:
        for linear, scheme in list(segment.schemes.items()):
            w = segment.weight(linear)
            options = both_axes(scheme, (w.shape[0], w.shape[1]))
            if len(options) > 1 and context.statistic(linear, Gram).tokens:
                choose(segment, linear, options, gram_errors(segment, context, linear, options))


def gram_errors(segment: Segment, context: Context, linear: str, options: tuple[QuantScheme, ...]) -> list[float]:
    """||C (Q(W) - W) X^T||^2 of every option; a chosen grid counts for the option it was searched for, the first."""
    w, gram = segment.weight(linear), context.product_gram(linear)
    grid, importance = segment.grids.get(linear), column_energies(segment, linear)
    return [
        float(rounding_error(w, gram, o.weights, grid if i == 0 else None, importance=importance))
        for i, o in enumerate(options)
    ]


def column_energies(segment: Segment, linear: str) -> torch.Tensor | None:
    """``[out]``: squared norms of the columns that read the outputs of ``linear``, summed over readers and query heads;
    None where something else than linears reads them, or a part of them."""
    group = next((g for g in segment.spec.balance if g.producer == linear and g.kind != "norm"), None)
    if group is None or group.rows is not None:
        return None
    columns = torch.stack([segment.weight(name).square().sum(dim=0) for name in group.consumers]).sum(dim=0)
    return by_value_channel(group, columns).sum(dim=0)


@dataclass(frozen=True)
class AdaDimPublished(Pass):
    """The axis of less error of the output of the linear's attention or MLP module, as published.

    Linears whose output the module processes further (q, k, v, gate, up) are scored by running the module with each
    candidate; others (o, down) end the module and are scored by the Gram matrix, which is the same objective. Inputs
    are those of the quantized stream, where the paper keeps the float one.

    Attributes:
        batches: calibration batches on which modules are run.
        moving: compare with the module as it then is, with the earlier linears of the block rounded already (as
            published); otherwise with the float module.
    """

    batches: int = 8
    moving: bool = True

    name: ClassVar[str] = "adadim-published"
    summary: ClassVar[str] = (
        "lays groups along the inputs or the outputs of a linear, by the error of its attention or MLP module"
    )
    phases: ClassVar[tuple[Phase, ...]] = (Phase.CHOOSE,)
    stream: ClassVar[Stream] = "quantized"  # keeps the inputs of the block, which a float stream overwrites
    statistics: ClassVar[tuple[type[Statistic], ...]] = (Gram,)

    def check(self, view: PlanView[ModelLayout]) -> Iterable[Problem]:
        if self.batches < 1:
            yield Problem("adadim-published.batches", f"{self.batches} is not positive", "use 8")

    def forwards(self) -> int:
        return 1

    def alternatives(self, scheme: QuantScheme, shape: tuple[int, int]) -> tuple[QuantScheme, ...]:
        return both_axes(scheme, shape)

    def apply(self, segment: Segment, context: Context) -> None:
        paths = {linear: _enclosing(segment, linear) for linear in segment.schemes}
        calls = context.calls({path for path in paths.values() if path is not None}, self.batches)
        rounded: dict[str, torch.Tensor] = {}
        for linear, scheme in list(segment.schemes.items()):
            w, path = segment.weight(linear), paths[linear]
            options = both_axes(scheme, (w.shape[0], w.shape[1]))
            if len(options) < 2 or not context.statistic(linear, Gram).tokens:
                continue
            if path is None or not calls[path]:
                errors = gram_errors(segment, context, linear, options)
            else:
                errors = self._module_errors(segment, linear, path, options, calls[path], rounded)
            chosen = choose(segment, linear, options, errors)
            rounded[linear] = round_to_nearest(w, chosen, segment.grids.get(linear)).dequantize(w.dtype)

    def _module_errors(
        self,
        segment: Segment,
        linear: str,
        path: str,
        options: tuple[QuantScheme, ...],
        calls: list[Call],
        rounded: Mapping[str, torch.Tensor],
    ) -> list[float]:
        """Mean squared change of the module's output when ``linear`` is rounded with each option."""
        module = segment.module.get_submodule(path)
        w, grid = segment.weight(linear), segment.grids.get(linear)
        now = _parameters(segment, path, rounded) if self.moving else {}
        candidates = [
            {**now, **_parameters(segment, path, {linear: round_to_nearest(w, o, g).dequantize(w.dtype)})}
            for o, g in zip(options, (grid, *[None] * len(options)), strict=False)
        ]
        totals, count = [0.0] * len(options), 0
        for call in calls:
            reference = _output(module, now, call)
            count += reference.numel()
            for i, candidate in enumerate(candidates):
                totals[i] += float((_output(module, candidate, call) - reference).square().sum())
        return [total / count for total in totals]


def _enclosing(segment: Segment, linear: str) -> str | None:
    """Path of the module that processes the output of ``linear`` further: the one that also holds a linear of a later
    stage; None where there is none."""
    spec, path = segment.spec, segment.architecture.module_name
    parent, stage = path(linear).rpartition(".")[0], spec.shared_input(linear).stage
    later = (name for shared in spec.inputs if shared.stage > stage for name in shared.linears)
    return parent if any(path(name).rpartition(".")[0] == parent for name in later) else None


def _parameters(segment: Segment, path: str, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those weights ``[out, in]`` that lie in the module at ``path``, as its parameters by name."""
    found: dict[str, torch.Tensor] = {}
    for linear, w in weights.items():
        name = segment.architecture.module_name(f"{linear}.weight")
        if name.startswith(f"{path}." if path else ""):
            stored = segment.module.get_parameter(name)
            found[name.removeprefix(f"{path}.")] = (w.T if segment.architecture.conv1d else w).to(stored.dtype)
    return found


def _output(module: nn.Module, parameters: dict[str, torch.Tensor], call: Call) -> torch.Tensor:
    """float32 output of one recorded call with some parameters replaced."""
    args, kwargs = call
    output = torch.func.functional_call(module, parameters, args, kwargs)
    result: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return result.float()
