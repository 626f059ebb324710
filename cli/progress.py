"""Progress on the terminal: block, linear, estimate and memory. Plain lines where the output is no terminal."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cli.verbosity import verbosity

LINE_EVERY = 15.0  # seconds between lines in a log


def resident_gb() -> float:
    """Highest resident set so far, GB."""
    from ptq.devices import peak_rss_bytes

    return peak_rss_bytes() / 1e9


class TerminalProgress:
    """Draws the stages of a run on stderr; see `calibration.progress.Progress`."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, quiet=verbosity.quiet)
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        self._name, self._total, self._done = "", 0, 0
        self._started = self._last_line = 0.0

    def __enter__(self) -> TerminalProgress:
        if self.console.is_terminal and not verbosity.quiet:
            self._bars = Progress(
                TextColumn("{task.description:14}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[memory]:.2f} GB  {task.fields[detail]}"),
                console=self.console,
            )
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()

    def stage(self, name: str, total: int, done: int = 0) -> None:
        self._name, self._total, self._done = name, total, done
        self._started = self._last_line = time.monotonic()
        if self._bars is not None:
            self._bars.start()  # not before: bars take what is printed to stdout along
            self._task = self._bars.add_task(name, total=total, completed=done, memory=resident_gb(), detail="")
        else:
            self.console.print(f"{name} ...", highlight=False, soft_wrap=True)

    def advance(self, detail: str, units: int = 1) -> None:
        self._done += units
        if self._bars is not None and self._task is not None:
            shown = "" if self._done >= self._total else detail
            self._bars.update(self._task, advance=units, memory=resident_gb(), detail=shown)
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_EVERY:
            self._last_line = now
            left = (now - self._started) / max(self._done, 1) * max(self._total - self._done, 0)
            share = self._done / max(self._total, 1)
            self.console.print(
                f"  {self._name} {share:.0%}, about {left:.0f} s left, {resident_gb():.2f} GB: {detail}",
                highlight=False,
                soft_wrap=True,
            )

    def message(self, text: str) -> None:
        self.console.print(f"note: {text}", highlight=False, markup=False, soft_wrap=True)
