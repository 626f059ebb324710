"""What is chosen together, and what is on offer for it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from calibration.errors import PlanError, Problem, ToolkitError
from calibration.walk.passes import PlanView
from ptq.formats.registry import PREFERRED, Format
from ptq.linears import ModelLayout, PlannedLinear
from ptq.planning.groups import with_any_group
from ptq.planning.job import Job
from ptq.scheme import QuantScheme


@dataclass(frozen=True)
class Unit:
    """Linears that take one scheme together, and the schemes on offer for them."""

    linears: tuple[PlannedLinear, ...]
    options: tuple[QuantScheme, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(linear.name for linear in self.linears)

    def bits(self, scheme: QuantScheme) -> float:
        """Stored bits of all its linears."""
        return sum(scheme.bits_per_weight(*linear.shape) * linear.numel for linear in self.linears)


def units_of(
    job: Job, fmt: Format, offered: Sequence[tuple[QuantScheme, bool]], spare: Iterable[QuantScheme]
) -> Iterable[Unit]:
    layout, together = job.plan.layout, fmt.name != "native"
    members: dict[object, list[PlannedLinear]] = {}
    for linear in layout.quantized:
        prefix = job.plan.spec.prefix(linear.block)
        shared = job.plan.spec.block(linear.block).shared_input(linear.name[len(prefix) :])
        key: object = (linear.block, shared) if together else linear.name
        members.setdefault("experts" if together and linear.expert is not None else key, []).append(linear)
    for linears in members.values():
        shapes = [linear.shape for linear in linears]
        fitted = dict.fromkeys(
            with_any_group(scheme, *shapes) if any_group else scheme for scheme, any_group in offered
        )
        options = [o for o in fitted if not _refused(job, fmt, linears, o)]
        options = options or [o for o in spare if not _refused(job, fmt, linears, o)]
        if not options:
            refused = _refused(job, fmt, linears, next(iter(fitted)))
            raise PlanError(refused or [Problem(linears[0].name, "no scheme on offer fits", "pass other --schemes")])
        yield Unit(tuple(linears), tuple(options))


def _refused(job: Job, fmt: Format, linears: Sequence[PlannedLinear], scheme: QuantScheme) -> list[Problem]:
    """What the format, or a pass of the method, has against it."""
    plan, tokens = job.plan, job.options.samples * job.seq_len
    layout = replace(plan.layout, linears=tuple(replace(linear, scheme=scheme) for linear in linears))
    view = PlanView(layout, plan.spec, job.config, plan.recipe.passes, tokens)
    return fmt.check(layout) + [problem for step in plan.recipe.passes for problem in step.check(view)]


def check_mixing(layout: ModelLayout, fmt: Format, units: Sequence[Unit]) -> None:
    """Refuse a format that takes every scheme by itself, but not two in one file."""
    for first, second in itertools.pairwise(units):
        pair = next(((a, b) for a in first.options for b in second.options if a != b), None)
        if pair is None:
            continue
        chosen = [replace(n, scheme=s) for unit, s in zip((first, second), pair, strict=True) for n in unit.linears]
        if fmt.check(replace(layout, linears=tuple(chosen))):
            raise ToolkitError(
                f"--format {fmt.name}: one file holds one scheme, and a fit chooses one per linear",
                f"use --format {PREFERRED} or native",
            )
        return
