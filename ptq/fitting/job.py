"""``ptq fit``: what is on offer for every linear, what it costs and loses, and the best choice under a budget."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.distributed import Processes
from calibration.errors import ToolkitError, unknown_value
from calibration.model.skeleton import Skeleton
from calibration.progress import Progress
from calibration.text.crops import TokenBatches
from calibration.walk.float_blocks import FloatBlocks
from calibration.walk.kept_states import check_room
from ptq.catalogue import fit_methods
from ptq.fitting.allocation import allocate, check_solver
from ptq.fitting.budget import Budget
from ptq.fitting.memory import kept_bytes, sweeping_bytes, tell_short
from ptq.fitting.sensitivity import Sensitivities, Sweep
from ptq.fitting.units import Unit, check_mixing, units_of
from ptq.formats.registry import FORMATS, PREFERRED, Format
from ptq.planning.job import Job, Options, prepare
from ptq.planning.plan import Plan
from ptq.run.agreement import refuse_other_models, tell_idle
from ptq.scheme import BITS, GROUP_SIZES, QuantScheme, parse_scheme
from ptq.scheme_names import names_group

OFFERED = (*(f"w{bits}a16-g{size}-sym" for bits in BITS for size in GROUP_SIZES), "mxfp4", "nvfp4")
WHOLE_ROWS = tuple(f"w{bits}a16-gchannel-sym" for bits in BITS)
"""For linears whose inputs no group size divides."""

PROBE_BITS = (2, 3, 4)
"""Everything is rounded once to about each of these, to see how losses add up."""

SWEEP_TOKENS = 4096  # that gradients see
LEAST_WINDOWS = 4
HEADER_BYTES = 160  # of one tensor in a safetensors header, with a short name, and of its small companions


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

    @property
    def windows(self) -> int:
        """Calibration windows that gradients see."""
        job = self.job
        return min(job.options.samples, max(LEAST_WINDOWS, SWEEP_TOKENS // job.seq_len))

    def planned(self) -> Sweep:
        """What `measure` measures."""
        options = {name: unit.options for unit in self.units for name in unit.names}
        chosen = [{name: nearest(found, bits) for name, found in options.items()} for bits in PROBE_BITS]
        probes = {str(i): probe for i, probe in enumerate(chosen) if probe not in chosen[:i]}
        feedback = any(step.expected_errors == "feedback" for step in self.plan.recipe.passes)
        return Sweep(options, probes, feedback, self.windows, seed=self.job.options.seed)

    def measure(self, progress: Progress) -> Sensitivities:
        """Forward and back through the float blocks, in one process; see `ptq.fitting.sensitivity` and `sweep`."""
        self.job.tell(progress)
        return self.sweep(self.planned(), self.job.windows(progress), progress)

    def refuse_differences(self, processes: Processes, tokens: TokenBatches, asked: Mapping[str, Any]) -> None:
        """Refuse processes that are about to measure something else, on another text or for another purpose.

        Args:
            asked: what else must be the same, by the names that a user knows it by.

        Raises:
            ToolkitError: names what differs.
        """
        job, o = self.job, self.job.options
        measured = {"calibration": tokens.source, "seed": o.seed, "forward": f"{job.dtype} on {job.device.type}"}
        refuse_other_models(processes, job.folder, {**asked, **measured}, o.trust_remote_code)

    def sweep(
        self, sweep: Sweep, tokens: TokenBatches, progress: Progress, processes: Processes | None = None
    ) -> Sensitivities:
        """Measure, once there is room for it.

        Args:
            processes: that share the windows; all get what was found.

        Raises:
            ToolkitError: no room for the hidden states of every block, or another process has ended.
        """
        job, processes = self.job, processes or Processes()
        check_room(kept_bytes(job, sweep.windows))
        if job.device.type == "cpu":
            tell_short(sweeping_bytes(job, sweep), progress)
        if sweep.windows < len(tokens):
            progress.message(f"gradients are taken on {sweep.windows} of {len(tokens)} windows")
        tell_idle(processes, min(sweep.windows, len(tokens)), progress)
        skeleton = Skeleton(job.config, job.plan.spec, job.dtype, job.device)
        skeleton.check_complete(job.reader.infos)
        blocks = FloatBlocks(job.reader, skeleton, schemes=job.plan.schemes, batch_size=1)
        return sweep.run(blocks, tokens, progress, processes)

    def solve(self, sensitivities: Sensitivities, budget: Budget) -> Choice:
        """The choice of least expected divergence under the budget.

        Raises:
            ToolkitError: no choice keeps it.
        """
        bits = [[unit.bits(o) for o in unit.options] for unit in self.units]
        losses = [[sensitivities.parts(dict.fromkeys(u.names, o)) for o in u.options] for u in self.units]
        if budget.ppl_increase is not None:
            limit = sensitivities.together.parts(math.log1p(budget.ppl_increase)) * (1 + 1e-9)
            chosen = allocate(losses, bits, limit)
            if chosen is None:
                least = sum(min(unit) for unit in losses)
                increase = 100 * math.expm1(sensitivities.together.nll(least))
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
        parts, together = sensitivities.parts(schemes), sensitivities.together
        return Choice(schemes, bpw, size, together.kl(parts), math.expm1(together.nll(parts)))

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
    units = tuple(units_of(job, fmt, offered, spare))
    check_mixing(layout, fmt, units)
    return Fit(job, method, fmt, units)


def nearest(options: Iterable[QuantScheme], bits: int) -> QuantScheme:
    """The scheme closest to so many bits in groups of 128."""
    return min(options, key=lambda o: (abs(o.weights.bits - bits), abs((o.weights.grouping.size or 10**6) - 128)))
