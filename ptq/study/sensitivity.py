"""Sensitivity per linear: what a scheme does to one linear while all others stay float, in two measures.

The cheap one is the layer objective ||(Q(W) - W) X^T||^2 per token, on its Gram matrix; the true one is the mean
Kullback-Leibler divergence of the model's predictions. Their rank correlation says how far the cheap one may stand in
for the true one when bits are given out. Every scheme is a walk of its own: the hidden states of one probe per linear
are in memory at a time, and compute grows with the square of the depth, so few windows are probed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.errors import ToolkitError
from calibration.model.checkpoint import write_atomically
from calibration.model.opening import fingerprint
from calibration.progress import Progress, Silent
from calibration.shown import Shown
from calibration.text.crops import TokenBatches
from ptq.fitting.job import Fit, float_blocks, prepare_fit
from ptq.fitting.sensitivity import Sweep
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
        divergence: mean KL(float || model with this linear rounded), nats per token.
    """

    name: str
    block: int
    shape: tuple[int, int]
    bits_per_weight: float
    objective: float
    divergence: float


@dataclass(frozen=True)
class SchemeSensitivity:
    """All linears under one scheme.

    Attributes:
        rank_correlation: Spearman's, of objective and divergence over the linears; None where it has no meaning.
        additivity: divergence with all of them rounded, over the sum of the single ones.
    """

    scheme: str
    linears: tuple[LinearSensitivity, ...]
    rank_correlation: float | None
    additivity: float


@dataclass(frozen=True, repr=False)
class SensitivityStudy(Shown):
    """Everything measured. ``probe_tokens`` are the tokens that divergences are means over."""

    model: str
    fingerprint: str
    calibration: dict[str, Any]
    probe_tokens: int
    schemes: tuple[SchemeSensitivity, ...]

    def facts(self) -> Mapping[str, object]:
        found = {"model": self.model, "measured on": f"{self.probe_tokens} tokens"}
        for scheme in self.schemes:
            worst = max(scheme.linears, key=lambda x: x.divergence)
            found[scheme.scheme] = f"{len(scheme.linears)} linears, most KL {worst.divergence:.4g} nats ({worst.name})"
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
) -> SensitivityStudy:
    """Measure every linear under every scheme; write ``sensitivity.json`` and ``sensitivity.md`` into ``out``.

    Args:
        schemes: weight schemes. One without a group size gets, per linear, one that divides; a linear that cannot take
            one that was named is left out there.
        options: calibration text, device and dtype.
        windows: calibration windows, from the first on, that divergences are measured on.
        render: the study as Markdown.

    Raises:
        ToolkitError, PlanError: whatever can be refused, before a weight is read.
    """
    progress = progress or Silent()
    session = Session(Path(out))
    session.check(overwrite, resume=False, resumable=False)
    fit = prepare_sensitivity(model, schemes, options)
    session.check(overwrite, resume=False, source=fit.job.reader.folder, resumable=False)
    fit.job.tell(progress)
    tokens = fit.job.windows(progress)
    session.begin({"sensitivity": fingerprint(fit.job.reader)}, resume=False)
    with session.unless_done():
        found = measure_sensitivity(fit, schemes, tokens, windows, progress)
        study = SensitivityStudy(
            model=fit.job.name,
            fingerprint=fingerprint(fit.job.reader),
            calibration=tokens.source,
            probe_tokens=min(windows, len(tokens)) * (tokens.seq_len - 1),
            schemes=found,
        )
        fit.job.reader.close()
        write_atomically(session.partial / SENSITIVITY_FILE, study.to_json().encode())
        write_atomically(session.partial / "sensitivity.md", render(study).encode())
        session.finish()
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
    fit: Fit, schemes: Sequence[str], tokens: TokenBatches, windows: int, progress: Progress
) -> tuple[SchemeSensitivity, ...]:
    """One walk over the float blocks per scheme; divergences on the first ``windows`` of the tokens."""
    found = []
    for scheme, any_group in dict.fromkeys((parse_scheme(text), not names_group(text)) for text in schemes):
        taken = {
            linear.name: with_any_group(scheme, linear.shape) if any_group else scheme
            for unit in fit.units
            for linear in unit.linears
        }
        offered = {name: unit.options for unit in fit.units for name in unit.names}
        taken = {name: own for name, own in taken.items() if own in offered[name]}
        names = list(taken)
        sweep = Sweep({n: (own,) for n, own in taken.items()}, taken, feedback=False, windows=windows)
        measured = sweep.run(float_blocks(fit.job), tokens, progress)
        divergences = {n: measured.weights[n] * measured.probed[n] for n in names}
        found.append(_of_scheme(fit, scheme, taken, measured.probed, divergences, measured.additivity))
    return tuple(found)


def _of_scheme(
    fit: Fit,
    scheme: QuantScheme,
    taken: dict[str, QuantScheme],
    objectives: dict[str, float],
    divergences: dict[str, float],
    additivity: float,
) -> SchemeSensitivity:
    planned = {linear.name: linear for linear in fit.plan.layout.linears}
    linears = tuple(
        LinearSensitivity(
            name=name,
            block=planned[name].block,
            shape=planned[name].shape,
            bits_per_weight=taken[name].bits_per_weight(*planned[name].shape),
            objective=objectives[name],
            divergence=divergences[name],
        )
        for name in divergences
    )
    correlation = spearman([x.objective for x in linears], [x.divergence for x in linears])
    return SchemeSensitivity(str(scheme), linears, correlation, additivity)
