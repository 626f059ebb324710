"""RepQuant's treatment of inputs behind norms (Li et al. 2024, arXiv 2402.05628): a grid is calibrated per channel, and
one grid for the tensor is run.

What a channel's step differs from the tensor's moves into the weights' columns, as SmoothQuant with exponent 1 on
calibrated steps would move it. With ``shift``, zero points of channels move into the norm's bias and the biases of the
linears behind it. The mathematics is in `ptq.numerics.repquant`; it does not round. RepQuant's learned clipping is not
here: ranges are chosen by squared error.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from calibration.architectures import ArchitectureSpec, Balance, BlockSpec
from calibration.errors import Problem
from calibration.model.watching import Watch
from calibration.walk.context import Context
from calibration.walk.passes import Pass, Phase, PlanView, Stream
from calibration.walk.ranges import Extremes
from calibration.walk.segment import Segment
from calibration.walk.statistics import Statistic
from ptq.activations import ActivationQuant
from ptq.formats.checks import refuse
from ptq.linears import ModelLayout
from ptq.methods.balancing import balance, by_value_channel, note_all, quantized_consumers, spread
from ptq.methods.static_steps import (
    biases_behind_norms,
    has_integer_inputs,
    switched_biases,
    take_shift,
    with_static_inputs,
)
from ptq.numerics.repquant import FRACTIONS, channel_factors, clipping_errors, tensor_grid
from ptq.scheme import QuantScheme

CLIPPING_BATCHES = 4  # calibration batches on which ranges are compared


@dataclass(frozen=True)
class Place:
    """A producer's grid and the ranges of its channels, ``[channels]``."""

    grid: ActivationQuant
    low: torch.Tensor
    high: torch.Tensor


@dataclass(frozen=True)
class RepQuant(Pass):
    """One static grid for inputs whose channels were calibrated by themselves.

    Attributes:
        estimator: of a channel's range: ``minmax``, or ``mse``, the fraction of it with the least squared error.
        shift: asymmetric grids behind norms that have a bias; native files hold them.
        down: also between up and down, ``values``: between v and o.
    """

    estimator: Literal["minmax", "mse"] = "mse"
    shift: bool = False
    down: bool = False
    values: bool = False

    name: ClassVar[str] = "repquant"
    summary: ClassVar[str] = (
        "calibrates a grid per channel, and moves what differs from one static grid into the weights"
    )
    default_scheme: ClassVar[str | None] = "w8a8"
    looks_at_batches: ClassVar[bool] = True
    phases: ClassVar[tuple[Phase, ...]] = (Phase.BALANCE, Phase.CHOOSE)
    stream: ClassVar[Stream] = "quantized"
    statistics: ClassVar[tuple[type[Statistic], ...]] = (Extremes,)
    parts: ClassVar[tuple[str, ...]] = ("input_scale", "input_zero")

    def check(self, view: PlanView[ModelLayout]) -> Iterable[Problem]:
        floats = [n for n in view.layout.quantized if n.scheme is not None and not has_integer_inputs(n.scheme)]
        reason = "has no integer inputs, whose channels RepQuant gives steps"
        yield from refuse(floats, reason, "use a scheme such as w8a8 or w6a6, or a rule that says float")

    def forwards(self) -> int:
        return int(self.estimator == "mse")

    def alternatives(self, scheme: QuantScheme, shape: tuple[int, int]) -> Sequence[QuantScheme]:
        """One static step, with a zero point where channels shift."""
        if not has_integer_inputs(scheme):
            return []
        return [with_static_inputs(scheme), *([with_static_inputs(scheme, symmetric=False)] if self.shift else [])]

    def refusals(self, architecture: ArchitectureSpec) -> Iterable[Problem]:
        if not any(self.calibrated(architecture.block(i)) for i in range(architecture.n_blocks)):
            reason = f"the blocks of {architecture.family} have no place where a channel's step can move"
            yield Problem("repquant", reason, "use ranges+rtn for static inputs, or -atoken")

    def remarks(self, view: PlanView[ModelLayout]) -> Iterable[str]:
        if self.shift and view.spec.norm != "layer":
            yield "repquant: norms without a bias cannot shift their channels; grids are symmetric"

    def config_changes(self, config: Any) -> Mapping[str, Any]:
        return switched_biases(config) if self.shift else {}

    def new_biases(self, architecture: ArchitectureSpec, index: int, stored: Collection[str]) -> Collection[str]:
        return biases_behind_norms(architecture, index, stored) if self.shift else ()

    def calibrated(self, block: BlockSpec) -> Collection[str]:
        return [linear for group in block.balance if self._wanted(group) for linear in group.consumers]

    def _wanted(self, group: Balance) -> bool:
        return {"norm": True, "linear": self.down, "value": self.values}[group.kind]

    def _grid(self, segment: Segment, group: Balance) -> ActivationQuant:
        inputs = segment.schemes[quantized_consumers(segment, group)[0][0]].inputs
        assert isinstance(inputs, ActivationQuant)
        shifts = self.shift and group.kind == "norm" and f"{group.producer}.bias" in segment.masters
        return ActivationQuant(inputs.bits, "int", "tensor", dynamic=False, symmetric=not shifts)

    def apply(self, segment: Segment, context: Context) -> None:
        groups = [g for g in segment.spec.balance if self._wanted(g) and quantized_consumers(segment, g)]
        places = {group: Place(self._grid(segment, group), *_extremes(segment, context, group)) for group in groups}
        if self.estimator == "mse":
            places = _clipped(segment, context, places)
        for group, place in places.items():
            context.show(group.producer)
            _reparameterize(segment, context, group, place)


def _extremes(segment: Segment, context: Context, group: Balance) -> tuple[torch.Tensor, torch.Tensor]:
    seen = [context.statistic(names[0], Extremes) for names in quantized_consumers(segment, group)]
    low = torch.stack([by_value_channel(group, s.low).amin(dim=0) for s in seen]).amin(dim=0)
    high = torch.stack([by_value_channel(group, s.high).amax(dim=0) for s in seen]).amax(dim=0)
    return low, high


def _clipped(segment: Segment, context: Context, places: Mapping[Balance, Place]) -> dict[Balance, Place]:
    """The fraction of every channel's range with the least squared error, from a part of a forward pass."""
    watches, errors = [], {}
    for group, place in places.items():
        ends = spread(group, place.low), spread(group, place.high)
        errors[group] = total = torch.zeros(len(FRACTIONS), len(ends[0]), device=place.low.device)
        look = partial(_add_errors, total=total, ends=ends, grid=place.grid)
        for names in quantized_consumers(segment, group):
            watches.append(Watch(segment.architecture.module_name(names[0]), look))
    context.watch(watches, CLIPPING_BATCHES)
    found = {}
    for group, place in places.items():
        by_channel = torch.stack([by_value_channel(group, row).sum(dim=0) for row in errors[group]])
        best = torch.tensor(FRACTIONS, device=place.low.device)[by_channel.argmin(dim=0)]
        found[group] = Place(place.grid, place.low * best, place.high * best)
    return found


def _add_errors(
    x: torch.Tensor,
    positions: torch.Tensor,
    total: torch.Tensor,
    ends: tuple[torch.Tensor, torch.Tensor],
    grid: ActivationQuant,
) -> None:
    total.add_(clipping_errors(x.flatten(0, -2), *ends, grid))


def _reparameterize(segment: Segment, context: Context, group: Balance, place: Place) -> None:
    inputs, grid = quantized_consumers(segment, group), place.grid
    divided = balance(segment, context, group, channel_factors(place.low, place.high, grid))
    step, zeros, zero = tensor_grid(spread(group, place.low) / divided, spread(group, place.high) / divided, grid)
    parts = {"input_scale": step}
    if zeros is not None and zero is not None:
        take_shift(segment, group, (zero - zeros) * step)
        context.forget(group.consumers)
        parts["input_zero"] = zero
    for linear in (name for names in inputs for name in names):
        segment.schemes[linear] = with_static_inputs(segment.schemes[linear], grid.symmetric)
        segment.parts.setdefault(linear, {}).update({name: part.clone() for name, part in parts.items()})
    note_all(segment, inputs, **{"repquant.largest_factor": round(float(divided.max()), 4)})
