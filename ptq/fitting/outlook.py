"""What a fit takes: one walk over the float blocks, every scheme on offer tried on every linear, and the probes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from calibration.errors import ToolkitError
from calibration.model.classes import text_config
from calibration.walk.cost import Work, nearest
from calibration.walk.statistics import Gram
from ptq.fitting.budget import Budget
from ptq.fitting.job import Fit, prepare_fit
from ptq.fitting.sensitivity import Sweep
from ptq.linears import float_linears
from ptq.planning.block_time import block_shapes, gathering
from ptq.planning.job import Options
from ptq.planning.outlook import Outlook, calibration_of, hidden_of, outlook
from ptq.planning.peak import walk_bytes
from ptq.planning.rates import rates_of

SOLVING = 0.5  # seconds of a choice, of which there is one per quarter of a bit that is shown
CHOICES = 16


def check_recipe_file(out: Path | None, overwrite: bool) -> None:
    """Refuse a place where no recipe can be written.

    Raises:
        ToolkitError: it exists, or has no folder.
    """
    if out is not None and out.exists() and not overwrite:
        raise ToolkitError(f"--out {out}: exists", "choose another name, or pass --overwrite")
    if out is not None and not out.absolute().parent.is_dir():
        raise ToolkitError(f"--out {out}: no such folder", f"make {out.parent} first")


def plan_fit(
    model: str | Path,
    budget: Budget,
    method: str,
    format: str | None,
    schemes: Sequence[str],
    options: Options,
    out: Path | None,
    overwrite: bool,
) -> Outlook:
    """What `ptq.fitting.result.fit_model` would take; nothing is written.

    Raises:
        ToolkitError, PlanError: whatever it would be refused for before it measures.
    """
    check_recipe_file(out, overwrite)
    fit = prepare_fit(model, method=method, format=format, schemes=schemes, options=options)
    fit.check(budget)
    fit.job.check_length()
    return _outlook(fit)


def _outlook(fit: Fit) -> Outlook:
    job, rates = fit.job, rates_of(fit.job.device, fit.job.dtype)
    infos = job.reader.infos
    linears, options = list(float_linears(job.spec, infos)), {n: u.options for u in fit.units for n in u.names}
    shapes = {linear.name: linear.shape for linear in linears}
    blocks = block_shapes(job, linears, True)
    seconds = sum(rates.seconds(b.forward + gathering(b, (Gram,), job.dtype.itemsize)) for b in blocks)
    trying = Work()
    for name, offered in options.items():
        rows, width = shapes[name]
        one = nearest(rows, width) + Work(products=2.0 * rows * width**2, fresh=3.0 * rows * width, calls=40.0)
        trying += one * float(len(offered))
    probing, head = _probes(fit, [b.forward for b in blocks])
    peak = walk_bytes(
        infos, job.spec, linears, job.plan.recipe.passes, calibration_of(job, job.plan.recipe.passes), hidden_of(job)
    )
    states = (len(options) + 2) * _probe_tokens(fit) * hidden_of(job) * job.dtype.itemsize
    found = {
        "linears": seconds + rates.seconds(trying),
        "probes": rates.seconds(probing + head),
        "choice": SOLVING * CHOICES,
    }
    return outlook(f"fit {fit.method}", job, found, peak + states, 100 * len(options), infos=infos)


def _probe_tokens(fit: Fit) -> int:
    return min(Sweep.windows, fit.job.options.samples) * fit.job.seq_len


def _probes(fit: Fit, forwards: Sequence[Work]) -> tuple[Work, Work]:
    """One stream per linear through its own block and those behind it, and two through all; and the head of each."""
    job, tokens = fit.job, _probe_tokens(fit)
    share = tokens / (job.options.samples * job.seq_len)
    own = [len(job.plan.schemes(index)) for index in range(job.spec.n_blocks)]
    work = Work()
    for index, forward in enumerate(forwards):
        work += forward * (share * (sum(own[: index + 1]) + 2))
    vocabulary = int(text_config(job.config).vocab_size)
    each = Work(products=2.0 * tokens * vocabulary * hidden_of(job), fresh=4.0 * tokens * vocabulary)
    return work, each * (sum(own) + 2.0)
