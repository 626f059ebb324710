"""Sensitivity per linear: what a scheme does to one linear while all others stay float, in two measures.

One is the layer objective ||(Q(W) - W) X^T||^2 per token, on its Gram matrix; the other is the mean Kullback-Leibler
divergence of the model's predictions, to second order (`ptq.fitting.sensitivity`). Their rank correlation says how far
the first may stand in for the second when bits are given out. A few linears are also run alone through the model, and
every scheme with all linears rounded: that divergence is measured.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from calibration.distributed import Processes
from calibration.errors import ToolkitError
from calibration.model.checkpoint import write_atomically
from calibration.model.opening import fingerprint
from calibration.progress import Progress, Silent
from calibration.recorded import CalibrationFacts
from calibration.shown import Shown
from calibration.text.crops import TokenBatches
from ptq.fitting.job import Fit, prepare_fit
from ptq.fitting.sensitivity import Sensitivities, Sweep
from ptq.planning.groups import with_any_group
from ptq.planning.job import Options
from ptq.scheme import QuantScheme, parse_scheme
from ptq.scheme_names import names_group
from ptq.session import Session
from ptq.study.ranks import spearman

SENSITIVITY_FILE = "sensitivity.json"


@dataclass(frozen=True)
class LinearSensitivity:
    """One linear under one scheme, rounded to nearest, alone.

    Attributes:
        name: full name; ``block`` its index, ``shape`` ``[out, in]``.
        bits_per_weight: stored, scales included.
        objective: ||(Q(W) - W) X^T||^2 per calibration token.
        divergence: mean KL(float || model with this linear rounded), nats per token, expected to second order.
        measured: the same as measured, for the few linears that are checked.
    """

    name: str
    block: int
    shape: tuple[int, int]
    bits_per_weight: float
    objective: float
    divergence: float
    measured: float | None = None


@dataclass(frozen=True)
class SchemeSensitivity:
    """All linears under one scheme.

    Attributes:
        rank_correlation: Spearman's, of objective and divergence over the linears; None where it has no meaning.
        additivity: measured divergence with all of them rounded, over the sum of the expected single ones.
    """

    scheme: str
    linears: tuple[LinearSensitivity, ...]
    rank_correlation: float | None
    additivity: float


@dataclass(frozen=True, repr=False)
class SensitivityStudy(Shown):
    """Everything measured: objectives and expected divergences on ``gradient_tokens``, measured ones on
    ``probe_tokens``."""

    model: str
    fingerprint: str
    calibration: CalibrationFacts
    gradient_tokens: int
    probe_tokens: int
    schemes: tuple[SchemeSensitivity, ...]

    def facts(self) -> Mapping[str, object]:
        found = {"model": self.model, "gradients": f"of {self.gradient_tokens} tokens"}
        for scheme in self.schemes:
            worst = max(scheme.linears, key=lambda x: x.divergence)
            found[scheme.scheme] = (
                f"{len(scheme.linears)} linears, most expected KL {worst.divergence:.4g} nats ({worst.name})"
            )
        return found

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"


def study_sensitivity(
    model: str | Path,
    schemes: Sequence[str],
    options: Options,
    windows: int,
    out: str | Path,
    render: Callable[[SensitivityStudy], str],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    processes: Processes | None = None,
) -> SensitivityStudy:
    """Measure every linear under every scheme; write ``sensitivity.json`` and ``sensitivity.md`` into ``out``.

    Args:
        schemes: weight schemes. One without a group size gets, per linear, one that divides; a linear that cannot take
            one that was named is left out there.
        options: calibration text, device and dtype.
        windows: calibration windows, from the first on, that probes are run on.
        render: the study as Markdown.
        processes: that share the work; the first one writes, and all get the study.

    Raises:
        ToolkitError, PlanError: whatever can be refused, before a weight is read; processes that differ.
    """
    progress, processes = progress or Silent(), processes or Processes()
    session = Session(Path(out))
    if processes.first:
        session.check(overwrite, resume=False, resumable=False)
    fit = prepare_sensitivity(model, schemes, options)
    if processes.first:
        session.check(overwrite, resume=False, source=fit.job.reader.folder, resumable=False)
    fit.job.tell(progress)
    tokens = fit.job.windows(progress)
    fit.refuse_differences(processes, tokens, {"schemes": list(schemes), "windows": windows})
    if not processes.first:
        measure_sensitivity(fit, schemes, tokens, windows, progress, processes)
        processes.mind_first_only()
        return cast(SensitivityStudy, processes.agree_at_the_end(None))
    session.begin({"sensitivity": fingerprint(fit.job.reader)}, resume=False)
    with session.unless_done():
        found = measure_sensitivity(fit, schemes, tokens, windows, progress, processes)
        processes.mind_first_only()
        study = SensitivityStudy(
            model=fit.job.name,
            fingerprint=fingerprint(fit.job.reader),
            calibration=tokens.source,
            gradient_tokens=min(gradient_windows(fit, windows), len(tokens)) * (tokens.seq_len - 1),
            probe_tokens=min(windows, len(tokens)) * (tokens.seq_len - 1),
            schemes=found,
        )
        fit.job.reader.close()
        write_atomically(session.partial / SENSITIVITY_FILE, study.to_json().encode())
        write_atomically(session.partial / "sensitivity.md", render(study).encode())
        session.finish()
    processes.agree_at_the_end(study)
    return study


def prepare_sensitivity(model: str | Path, schemes: Sequence[str], options: Options) -> Fit:
    """Resolve the model and the schemes from headers alone.

    Raises:
        ToolkitError, PlanError: whatever can be refused; a scheme that quantizes more than weights.
    """
    wider = next((s for s in map(parse_scheme, schemes) if s.inputs is not None or s.cache is not None), None)
    if wider is not None:
        raise ToolkitError(f"--schemes {wider}: quantizes more than weights", f"pass {wider.weights_text}")
    return prepare_fit(model, method="gptq", format="native", schemes=schemes, options=options)


def measure_sensitivity(
    fit: Fit,
    schemes: Sequence[str],
    tokens: TokenBatches,
    windows: int,
    progress: Progress,
    processes: Processes | None = None,
) -> tuple[SchemeSensitivity, ...]:
    """Forward and back through the float blocks, once for all schemes; probes see the first ``windows`` windows. The
    ``processes`` share it, and all get the result."""
    offered = {name: unit.options for unit in fit.units for name in unit.names}
    probes: dict[str, dict[str, QuantScheme]] = {}
    for scheme, any_group in dict.fromkeys((parse_scheme(text), not names_group(text)) for text in schemes):
        taken = {
            linear.name: with_any_group(scheme, linear.shape) if any_group else scheme
            for unit in fit.units
            for linear in unit.linears
        }
        probes[str(scheme)] = {name: own for name, own in taken.items() if own in offered[name]}
    options = {
        name: tuple(dict.fromkeys(probe[name] for probe in probes.values() if name in probe)) for name in offered
    }
    options = {name: found for name, found in options.items() if found}
    seen, seed = gradient_windows(fit, windows), fit.job.options.seed
    sweep = Sweep(options, probes, feedback=False, windows=seen, probed=windows, seed=seed)
    measured = fit.sweep(sweep, tokens, progress, processes)
    return tuple(_of_scheme(fit, scheme, probe, measured) for scheme, probe in probes.items())


def gradient_windows(fit: Fit, probed: int) -> int:
    """Windows that gradients see: those of a fit, and at least those that probes see."""
    return max(probed, fit.windows)


def _of_scheme(fit: Fit, scheme: str, taken: Mapping[str, QuantScheme], measured: Sensitivities) -> SchemeSensitivity:
    planned = {linear.name: linear for linear in fit.plan.layout.linears}
    alone = {(check.linear, check.scheme): check.measured for check in measured.checks}
    linears = tuple(
        LinearSensitivity(
            name=name,
            block=planned[name].block,
            shape=planned[name].shape,
            bits_per_weight=own.bits_per_weight(*planned[name].shape),
            objective=measured.objectives[name][own],
            divergence=measured.nearest[name][own],
            measured=alone.get((name, own)),
        )
        for name, own in taken.items()
    )
    correlation = spearman([x.objective for x in linears], [x.divergence for x in linears])
    whole = measured.whole[scheme]
    additivity = whole.kl / whole.parts if whole.parts > 0 else 1.0
    return SchemeSensitivity(scheme, linears, correlation, additivity)
