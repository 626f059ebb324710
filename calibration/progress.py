"""What long work tells its caller. Only the command line draws it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Receives the stages of a run."""

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """A stage of ``total`` units begins, of which ``done`` were finished by an earlier run."""

    def advance(self, detail: str, units: int = 1) -> None:
        """``units`` more are done; ``detail`` names the block and linear at work."""

    def message(self, text: str) -> None:
        """Something the user should know, such as a fallback."""


class Silent:
    """No display."""

    def stage(self, name: str, total: int, done: int = 0) -> None:
        pass

    def advance(self, detail: str, units: int = 1) -> None:
        pass

    def message(self, text: str) -> None:
        pass


class Part:
    """A run that is part of longer work: its stages appear behind ``name``, and what it has to say does not."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self._name = progress, name

    def stage(self, name: str, total: int, done: int = 0) -> None:
        self._progress.stage(f"{self._name}: {name}", total, done)

    def advance(self, detail: str, units: int = 1) -> None:
        self._progress.advance(detail, units)

    def message(self, text: str) -> None:
        pass


class CallbackProgress:
    """Hands everything to one function: ``(stage, units done, units in all, detail)``. A message comes as the stage
    ``note`` of 0 units, with its text as the detail."""

    def __init__(self, callback: Callable[[str, int, int, str], None]) -> None:
        self._callback = callback
        self._name, self._done, self._total = "", 0, 0

    def stage(self, name: str, total: int, done: int = 0) -> None:
        self._name, self._done, self._total = name, done, total
        self._callback(name, done, total, "")

    def advance(self, detail: str, units: int = 1) -> None:
        self._done += units
        self._callback(self._name, self._done, self._total, detail)

    def message(self, text: str) -> None:
        self._callback("note", 0, 0, text)
