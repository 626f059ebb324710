"""The plan and the result of a quantization, for people."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from calibration.record import Evaluation, RunRecord, read_timings
from cli.verbosity import verbosity

if TYPE_CHECKING:
    from ptq.planning.duration import Duration
    from ptq.planning.job import Job
    from ptq.planning.outlook import Outlook


def size(n_bytes: int) -> str:
    """GB = 1e9 bytes; MB below a tenth of one."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.2f} MB"


def wide_console() -> Console:
    """Lines are not broken at 80 columns where the output is a file or a pipe; nothing is printed under --quiet."""
    quiet = verbosity.quiet
    return Console(quiet=quiet) if sys.stdout.isatty() else Console(width=1000, quiet=quiet)


def about(seconds: float) -> str:
    """``2 h 10 min``, ``4 min 10 s``, ``12 s``, ``0.4 s``: two figures are all that an estimate has."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    step = 10 ** max(0, len(str(int(seconds))) - 2)
    whole = int(round(seconds / step) * step)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def print_duration(duration: Duration) -> None:
    """Seconds per phase, and how good they are."""
    phases = ", ".join(f"{name} {about(seconds)}" for name, seconds in duration.seconds.items())
    shared = f" in {duration.processes} processes" if duration.processes > 1 else ""
    console = wide_console()
    console.print(f"time about {about(duration.total)}{shared}: {phases}", highlight=False, markup=False)
    if duration.measured is None:
        said = "from rates of this machine, measured just now; most runs take between two thirds of it and 1.5 times it"
    else:
        took, foreseen = duration.measured
        said = f"one block was run: it took {about(took)}, {about(foreseen)} were expected"
    console.print(f"  {said}", highlight=False, markup=False)
    for name in duration.unknown:
        console.print(f"  {name}: not counted, its length is not known yet", highlight=False, markup=False)


def _each(duration: Duration) -> str:
    """Whose memory it is."""
    return f" in each of {duration.processes} processes" if duration.processes > 1 else ""


def print_outlook(found: Outlook) -> None:
    """What a command other than ``quantize`` would take."""
    console = wide_console()
    console.print(f"{found.command}: {found.model}", highlight=False, markup=False)
    console.print(f"calibration {found.text}", highlight=False, markup=False)
    console.print(
        f"memory about {size(found.peak_bytes)} above interpreter and libraries{_each(found.duration)}; "
        f"disk {size(found.disk_bytes)}",
        highlight=False,
    )
    print_duration(found.duration)
    for remark in found.remarks:
        console.print(f"  {remark}", highlight=False, markup=False)


def print_plan(job: Job, duration: Duration) -> None:
    """Schemes, sizes, memory, time, passes, disk, and who can load the result."""
    from calibration.distributed import idle_words  # torch is there by now

    console, plan, sizes = wide_console(), job.plan, job.plan.sizes
    layout = plan.layout
    console.print(
        f"[bold]{escape(job.name)}[/bold]: {plan.spec.family}, {plan.spec.n_blocks} blocks, {layout.dtype}",
        highlight=False,
    )
    chosen = f"method {plan.recipe.method}, format {plan.format.name} ({plan.format_reason})"
    console.print(chosen, highlight=False, markup=False)
    table = Table("linears", "shape [out, in]", "scheme", "bits/weight", "count", box=None, pad_edge=False)
    rows: dict[tuple[str, tuple[int, int], str, str], int] = {}
    for linear in (*layout.linears, *layout.outside):
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", linear.name)
        if linear.scheme is None:
            key = (pattern, linear.shape, f"float ({linear.why})", "")
        else:
            key = (pattern, linear.shape, str(linear.scheme), f"{layout.bits_per_weight(linear):.4f}")
        rows[key] = rows.get(key, 0) + 1
    for (pattern, shape, scheme, text), count in rows.items():
        table.add_row(escape(pattern), f"{shape[0]} x {shape[1]}", escape(scheme), text, str(count))
    console.print(table)
    console.print(
        f"size {size(sizes.float_bytes)} -> {size(sizes.output_bytes)}; quantized linears "
        f"{size(sizes.quantized_bytes)}, {sizes.bits_per_weight:.4f} bits per weight, everything counted",
        highlight=False,
    )
    data = f"{job.options.samples} x {job.seq_len} tokens of {job.dataset}" if plan.needs_data else "no data"
    console.print(
        f"calibration {data}; {sizes.forwards} forward pass(es) per block, "
        f"in {str(job.dtype).removeprefix('torch.')} on {job.device}",
        highlight=False,
        markup=False,
    )
    console.print(
        f"memory about {size(sizes.peak_bytes)} above interpreter and libraries{_each(duration)}; "
        f"disk up to {size(sizes.disk_bytes)}",
        highlight=False,
    )
    print_duration(duration)
    for program, answer in plan.format.loads_in(layout).items():
        console.print(f"  loads in {program}: {answer}", highlight=False, markup=False)
    idle = idle_words(duration.processes, -(-job.options.samples // job.batch_size))
    for remark in (*plan.remarks, *([idle] if idle else [])):
        console.print(f"  {remark}", highlight=False, markup=False)
    for note in job.notes:
        console.print(f"  note: {note}", highlight=False, markup=False)


def _windows(evaluation: Evaluation) -> str:
    return f", {evaluation.windows} windows" if evaluation.windows else ""


def print_result(record: RunRecord, out: Path) -> None:
    """What was quantized, what was left and why, and the numbers."""
    console, result = wide_console(), record.result
    console.print(
        f"quantized {result['quantized_linears']} linears to {result['bits_per_weight']:.4f} bits per weight, "
        f"{size(record.model['bytes'])} -> {size(result['bytes'])}; read back and compared: {result['verified']}",
        highlight=False,
    )
    for entry in record.left:
        console.print(
            f"left in float: {entry['count']} {entry['what']} ({entry['why']})", highlight=False, markup=False
        )
    for e in record.evaluations:
        line = f"{e.model}: perplexity {e.perplexity:.4f}"
        if e.divergence is not None:
            line += f", KL {e.divergence.kl_mean:.5f}, top-1 agreement {e.divergence.top1_agreement:.2%}"
        print(f"{line} ({e.protocol.dataset}, window {e.protocol.window}{_windows(e)})")
    timings = read_timings(out)
    if timings is not None:
        above = max(0, timings.peak_rss_bytes - timings.base_rss_bytes)
        console.print(
            f"{timings.seconds:.1f} s, peak memory {size(timings.peak_rss_bytes)} ({size(above)} above the start)",
            highlight=False,
        )
    reports = (
        ("report.html", "report.md", "report.json")
        if out.is_dir()
        else (f"{out.stem}.report.html", f"{out.stem}.report.json")
    )
    print(f"written to {out} ({', '.join(reports)})")
