"""Progress on the terminal: block, linear, estimate and memory. Plain lines where the output is no terminal."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.progress_bar import ProgressBar
from rich.text import Text

from calibration.memory import peak_rss_bytes
from cli.shared import first
from cli.verbosity import verbosity

LINE_EVERY = 15.0  # seconds between lines in a log
NAME = 14  # columns of the name of a stage
NUMBERS = 27  # columns of percentage and times
BAR = (10, 40)  # columns of the bar: fewest and most
DETAIL = 30  # columns of memory and detail that must remain beside the bar
SHORTEST = 12  # columns below which a detail says nothing


def clock(seconds: float | None) -> str:
    """``h:mm:ss``."""
    if seconds is None:
        return "-:--:--"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class Bar(BarColumn):
    """As wide as the terminal allows beside the numbers; none where it is too narrow."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def render(self, task: Task) -> ProgressBar:
        self.bar_width = bar_width(self._console.width)
        return super().render(task)


class Numbers(ProgressColumn):
    """Percentage, time so far and time left; memory and what is at work in the columns that are still free."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def render(self, task: Task) -> Text:
        elapsed = task.finished_time if task.finished else task.elapsed
        left = task.time_remaining
        text = f"{task.percentage:>3.0f}% {clock(elapsed)} left {clock(left)}"
        room = self._console.width - NAME - 2 - bar_width(self._console.width)
        if room < NUMBERS:
            text = text.replace(" left ", " -")
        memory, detail = f"  {task.fields['memory']:.2f} GB", task.fields["detail"]
        if len(text) + len(memory) <= room:
            text += memory
            free = room - len(text) - 2
            if free >= SHORTEST:
                text += "  " + (detail if len(detail) <= free else detail[: free - 1] + "…")
        return Text(text, no_wrap=True)


def bar_width(columns: int) -> int:
    """Columns of the bar on a terminal of so many."""
    free = columns - NAME - 2 - NUMBERS - DETAIL
    return min(free, BAR[1]) if free >= BAR[0] else 0


class TerminalProgress:
    """Draws the stages of a run on stderr; see `calibration.progress.Progress`."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, quiet=verbosity.quiet or not first())
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        self._name, self._total, self._done = "", 0, 0
        self._started = self._last_line = 0.0

    def __enter__(self) -> TerminalProgress:
        if self.console.is_terminal and not verbosity.quiet:
            name = TextColumn(f"{{task.description:{NAME}}}")
            self._bars = Progress(name, Bar(self.console), Numbers(self.console), console=self.console)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()

    def stage(self, name: str, total: int, done: int = 0) -> None:
        self._name, self._total, self._done = name, total, done
        self._started = self._last_line = time.monotonic()
        if self._bars is not None:
            self._bars.start()  # not before: bars take what is printed to stdout along
            self._task = self._bars.add_task(name, total=total, completed=done, memory=_peak_gb(), detail="")
        else:
            self.console.print(f"{name} ...", highlight=False, soft_wrap=True)

    def advance(self, detail: str, units: int = 1) -> None:
        self._done += units
        if self._bars is not None and self._task is not None:
            shown = "" if self._done >= self._total else detail
            self._bars.update(self._task, advance=units, memory=_peak_gb(), detail=shown)
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_EVERY:
            self._last_line = now
            left = (now - self._started) / max(self._done, 1) * max(self._total - self._done, 0)
            share = self._done / max(self._total, 1)
            self.console.print(
                f"  {self._name} {share:.0%}, about {left:.0f} s left, {_peak_gb():.2f} GB: {detail}",
                highlight=False,
                soft_wrap=True,
            )

    def message(self, text: str) -> None:
        self.console.print(f"note: {text}", highlight=False, markup=False, soft_wrap=True)


def _peak_gb() -> float:
    """Highest resident set so far, GB."""
    return peak_rss_bytes() / 1e9


@contextmanager
def planning(name: str = "plan") -> Iterator[Callable[[], None]]:
    """Show on a terminal that a command is being planned, until what this gives is called or the ``with`` ends. (Before
    anything is printed: bars take along what goes to stdout.)"""
    with TerminalProgress() as progress:
        shown = [progress.console.is_terminal]
        if shown[0]:
            progress.stage(name, 1)

        def end() -> None:
            if shown[0]:
                shown[0] = False
                progress.advance("")
                progress.__exit__(None, None, None)

        yield end


def load_libraries(command: str) -> None:
    """Import what a command needs, which takes seconds, and show on a terminal that this happens.

    Args:
        command: the public function of `ptq` that it calls.
    """
    from cli.options import quiet_libraries

    with _without_collections(), TerminalProgress() as progress:
        shown = progress.console.is_terminal
        if shown:
            progress.stage("load libraries", 6)

        def done(name: str) -> None:
            if shown:
                progress.advance(name)

        quiet_libraries()
        done("transformers")
        import torch  # noqa: F401

        done("torch")
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: F401

        done("configs")
        import transformers.modeling_utils  # noqa: F401

        done("models")
        import ptq.planning.job

        done("plan")
        getattr(ptq, command)  # imported at its first use
        done("ptq")


@contextmanager
def _without_collections() -> Iterator[None]:
    """What first imports make stays: looking through it again and again takes a tenth of their time, and later, too."""
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
