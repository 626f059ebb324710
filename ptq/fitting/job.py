"""``ptq fit``: what is on offer for every linear, what it costs and loses, and the best choice under a budget."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from calibration.errors import PlanError, Problem, ToolkitError, unknown_value
from calibration.model.skeleton import Skeleton
from calibration.progress import Progress
from calibration.walk.float_blocks import FloatBlocks
from ptq.catalogue import fit_methods
from ptq.fitting.allocation import allocate, check_solver
from ptq.fitting.budget import Budget
from ptq.fitting.sensitivity import Sensitivities, Sweep
from ptq.formats.registry import FORMATS, PREFERRED, Format
from ptq.linears import ModelLayout, PlannedLinear
from ptq.planning.groups import with_any_group
from ptq.planning.job import Job, Options, prepare
from ptq.planning.plan import Plan
from ptq.scheme import BITS, FLOAT_PRESETS, GROUP_SIZES, QuantScheme, parse_scheme
from ptq.scheme_names import names_group

OFFERED = (*(f"w{bits}a16-g{size}-sym" for bits in BITS for size in GROUP_SIZES), *FLOAT_PRESETS)
WHOLE_ROWS = tuple(f"w{bits}a16-gchannel-sym" for bits in BITS)
"""For linears whose inputs no group size divides."""

PROBE_BITS = 3
HEADER_BYTES = 160  # of one tensor in a safetensors header, with a short name, and of its small companions


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


@dataclass(frozen=True)
class Choice:
    """A scheme for every linear, with what it costs and what it is expected to lose.

    Attributes:
        schemes: by full name.
        bits_per_weight: as in a run's record.
        file_bytes: no less than the safetensors files will have.
        divergence: expected KL from the float model, nats per token.
        ppl_increase: expected relative increase of perplexity.
    """

    schemes: Mapping[str, QuantScheme]
    bits_per_weight: float
    file_bytes: int
    divergence: float
    ppl_increase: float

    @property
    def uniform(self) -> QuantScheme | None:
        """The scheme, where it is one."""
        found = set(self.schemes.values())
        return next(iter(found)) if len(found) == 1 else None


@dataclass(frozen=True)
class Fit:
    """A fit that passed its plan."""

    job: Job
    method: str
    format: Format
    units: tuple[Unit, ...]

    @property
    def plan(self) -> Plan:
        return self.job.plan

    def smallest(self) -> Mapping[str, QuantScheme]:
        """The cheapest scheme of every linear."""
        return {name: min(unit.options, key=unit.bits) for unit in self.units for name in unit.names}

    def sizes(self, schemes: Mapping[str, QuantScheme]) -> tuple[float, int]:
        """Bits per weight, and the bytes of the written files at most."""
        sizes = self.plan.with_schemes(schemes).sizes
        return sizes.bits_per_weight, sizes.output_bytes + self._header_bytes()

    def _header_bytes(self) -> int:
        names = [n for n in self.job.reader.infos if not n.startswith(self.plan.spec.blocks + ".")]
        names += [f"{linear.name}.weight" for linear in self.plan.layout.quantized for _ in range(4)]
        names += [n for n in self.job.reader.infos if n.startswith(self.plan.spec.blocks + ".")]
        return sum(HEADER_BYTES + len(name) for name in names)

    def check(self, budget: Budget) -> None:
        """Refuse a budget below the smallest possible size, which headers alone tell.

        Raises:
            ToolkitError: says what the smallest is.
        """
        bpw, size = self.sizes(self.smallest())
        if budget.bpw is not None and budget.bpw < bpw:
            least = math.ceil(bpw * 1e4) / 1e4
            raise ToolkitError(f"{budget}: the smallest possible is {bpw:.4f} bits per weight", f"pass --bpw {least:g}")
        if budget.size is not None and budget.size < size:
            raise ToolkitError(
                f"{budget}: the smallest possible file has {size / 1e6:.2f} MB ({bpw:.3f} bits per weight)",
                f"pass --size {math.ceil(size / 1e4) / 100:.2f}MB",
            )

    def measure(self, progress: Progress) -> Sensitivities:
        """One walk over the float blocks; see `ptq.fitting.sensitivity`."""
        job, options = self.job, {name: unit.options for unit in self.units for name in unit.names}
        probe = {name: min(found, key=_distance_from_probe) for name, found in options.items()}
        feedback = any(step.expected_errors == "feedback" for step in self.plan.recipe.passes)
        sweep = Sweep(options, probe, feedback=feedback)
        job.tell(progress)
        return sweep.run(float_blocks(job), job.windows(progress), progress)

    def solve(self, sensitivities: Sensitivities, budget: Budget) -> Choice:
        """The choice of least expected divergence under the budget.

        Raises:
            ToolkitError: no choice keeps it.
        """
        bits = [[unit.bits(o) for o in unit.options] for unit in self.units]
        losses = [[sensitivities.total(dict.fromkeys(u.names, o)) for o in u.options] for u in self.units]
        if budget.ppl_increase is not None:
            limit = math.log1p(budget.ppl_increase) / max(sensitivities.nll_per_kl, 1e-6)
            chosen = allocate(losses, bits, limit)
            if chosen is None:
                least = sum(min(unit) for unit in losses)
                increase = 100 * math.expm1(sensitivities.nll_per_kl * least)
                raise ToolkitError(
                    f"{budget}: the least expected with the schemes on offer is {increase:.3f}%",
                    f"pass --max-ppl-increase {math.ceil(increase * 1e3 + 1) / 1e3:g}%",
                )
        else:
            chosen = allocate(bits, losses, self._bits(budget))
            assert chosen is not None, "the plan has checked the budget"
        schemes = {name: u.options[o] for u, o in zip(self.units, chosen, strict=True) for name in u.names}
        return self.choice(schemes, sensitivities)

    def _bits(self, budget: Budget) -> float:
        if budget.bpw is not None:
            return budget.bpw * self.plan.sizes.quantized_weights
        smallest = self.smallest()
        (bpw, size), weights = self.sizes(smallest), self.plan.sizes.quantized_weights
        return bpw * weights + 8 * ((budget.size or 0) - size)

    def choice(self, schemes: Mapping[str, QuantScheme], sensitivities: Sensitivities) -> Choice:
        """What these schemes cost and are expected to lose."""
        bpw, size = self.sizes(schemes)
        divergence = sensitivities.total(schemes)
        return Choice(schemes, bpw, size, divergence, math.expm1(sensitivities.nll_per_kl * divergence))

    def uniform(self, sensitivities: Sensitivities) -> list[Choice]:
        """Every scheme that all linears can take, the cheapest first."""
        common = [o for o in self.units[0].options if all(o in unit.options for unit in self.units)]
        names = [name for unit in self.units for name in unit.names]
        found = [self.choice(dict.fromkeys(names, scheme), sensitivities) for scheme in common]
        return sorted(found, key=lambda choice: choice.bits_per_weight)

    def recipe(self, choice: Choice, note: str) -> str:
        """The choice as TOML for ``ptq quantize --recipe``."""
        usual = Counter(choice.schemes.values()).most_common(1)[0][0]
        lines = [f"# {line}" for line in note.splitlines()]
        lines += [f'method = "{self.method}"', f'format = "{self.format.name}"', f'scheme = "{usual}"']
        for name, scheme in choice.schemes.items():
            if scheme != usual:
                lines += ["", "[[rule]]", f'match = "{name}"', f'scheme = "{scheme}"']
        return "\n".join(lines) + "\n"


def float_blocks(job: Job) -> FloatBlocks:
    """The blocks of a job as they are."""
    skeleton = Skeleton(job.config, job.plan.spec, job.dtype, job.device)
    skeleton.check_complete(job.reader.infos)
    return FloatBlocks(job.reader, skeleton, schemes=job.plan.schemes, batch_size=job.batch_size)


def prepare_fit(
    model: str | Path,
    *,
    method: str = "gptq",
    format: str | None = None,
    schemes: Sequence[str] = (),
    options: Options | None = None,
) -> Fit:
    """Resolve the model and what is on offer, from headers alone.

    Args:
        method: of `fit_methods`; rounding with GPTQ is expected to have GPTQ's errors.
        format: compressed-tensors where None. Linears that engines run as one matrix (q, k and v; gate and up) take one
            scheme, but in native files.
        schemes: on offer, a text without a group size for one that divides; empty: every width and group size, MXFP4
            and NVFP4, as far as the format holds them.

    Raises:
        ToolkitError, PlanError: whatever can be refused.
    """
    check_solver()
    if method not in fit_methods():
        raise unknown_value("--method", method, fit_methods())
    if format is not None and format not in FORMATS:
        raise unknown_value("--format", format, FORMATS)
    fmt = FORMATS[format or PREFERRED]
    job = prepare(model, method=method, scheme=WHOLE_ROWS[-1], format="native", options=options)
    layout = job.plan.layout
    offered = [(parse_scheme(text), not names_group(text)) for text in schemes or OFFERED]
    spare = [] if schemes else [parse_scheme(text) for text in WHOLE_ROWS]
    units = tuple(_units(job, fmt, offered, spare))
    _check_mixing(layout, fmt, units)
    return Fit(job, method, fmt, units)


def _units(
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
        options = [o for o in fitted if not _refused(layout, fmt, linears, o)]
        options = options or [o for o in spare if not _refused(layout, fmt, linears, o)]
        if not options:
            refused = _refused(layout, fmt, linears, next(iter(fitted)))
            raise PlanError(refused or [Problem(linears[0].name, "no scheme on offer fits", "pass other --schemes")])
        yield Unit(tuple(linears), tuple(options))


def _refused(layout: ModelLayout, fmt: Format, linears: Sequence[PlannedLinear], scheme: QuantScheme) -> list[Problem]:
    return fmt.check(replace(layout, linears=tuple(replace(linear, scheme=scheme) for linear in linears)))


def _check_mixing(layout: ModelLayout, fmt: Format, units: Sequence[Unit]) -> None:
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


def _distance_from_probe(scheme: QuantScheme) -> tuple[int, int]:
    width = scheme.weights.grouping.size or 10**6
    return abs(scheme.weights.bits - PROBE_BITS), abs(width - 128)
