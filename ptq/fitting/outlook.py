"""What a fit takes: the float blocks forward and in reverse, every scheme on offer of every linear, the probes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from calibration.distributed import Processes, lanes_of
from calibration.errors import ToolkitError
from calibration.launcher import launched
from calibration.model.classes import text_config
from calibration.walk.cost import Work, nearest, total
from ptq.fitting.budget import Budget
from ptq.fitting.job import Fit, prepare_fit
from ptq.fitting.memory import kept_bytes, sweeping_bytes
from ptq.fitting.sensitivity import Sweep
from ptq.fitting.work import BACKWARD, HEAD, HEAD_BACKWARD
from ptq.linears import float_linears
from ptq.planning.block_time import block_shapes, longest
from ptq.planning.job import Options
from ptq.planning.outlook import Outlook, hidden_of, outlook
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
    job, sweep, rates = fit.job, fit.planned(), rates_of(fit.job.device, fit.job.dtype)
    infos = job.reader.infos
    linears = list(float_linears(job.spec, infos))
    shapes = {linear.name: linear.shape for linear in linears}
    processes = launched()[1]
    windows, probed = busiest(sweep, processes)
    forward = [block.forward * (windows / job.options.samples) for block in block_shapes(job, linears, True)]
    rounding = [0.0] * job.spec.n_blocks
    for block in range(job.spec.n_blocks):
        tasks = []
        for name in (name for name in sweep.options if job.spec.block_of(name) == block):
            rows, width = shapes[name]
            one = nearest(rows, width) + Work(products=2.0 * rows * width**2, fresh=3.0 * rows * width, calls=40.0)
            tasks.append(rates.seconds(one * float(len(sweep.options[name]))))
        rounding[block] = longest(tasks, processes)
    found = {
        "forward": rates.seconds(total(forward) + _probes(fit, sweep, forward, probed / windows)),
        "head": rates.seconds(_head(fit, sweep, windows, probed)),
        "backward": rates.seconds(total(forward) * BACKWARD) + sum(rounding),
        "choice": SOLVING * (1 + -(-(CHOICES - 1) // processes)),
    }
    disk = 100 * len(sweep.options) + kept_bytes(job, sweep.windows)
    return outlook(
        f"fit {fit.method}", job, found, sweeping_bytes(job, sweep), disk, infos=infos, batches=sweep.windows
    )


def busiest(sweep: Sweep, processes: int) -> tuple[int, int]:
    """The most windows that one of the processes has, and the most of those that probes see."""
    one = Processes(0, processes)
    owners = [one.owner(lane) for lane, members in enumerate(lanes_of(sweep.windows)) for _ in members]
    return max(Counter(owners).values()), max(Counter(owners[: sweep.probed]).values())


def _probes(fit: Fit, sweep: Sweep, forward: Sequence[Work], share: float) -> Work:
    """Every probe has a stream of its own from its first linear on, of a share of the windows."""
    work = Work()
    for linears in (*sweep.probes.values(), *sweep.alone().values()):
        first = min(block for block in range(len(forward)) if _any_in(fit, block, linears))
        work += total(forward[first:]) * share
    return work


def _any_in(fit: Fit, block: int, linears: Iterable[str]) -> bool:
    return any(name.startswith(fit.job.spec.prefix(block)) for name in linears)


def _head(fit: Fit, sweep: Sweep, windows: int, probed: int) -> Work:
    """The logits of every probe, and those of the float model with their gradient."""
    job, probes = fit.job, len(sweep.probes) + len(sweep.alone())
    tokens = job.seq_len * (probed * probes * HEAD + windows * HEAD_BACKWARD)
    return Work(products=2.0 * tokens * int(text_config(job.config).vocab_size) * hidden_of(job))
