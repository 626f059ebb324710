"""What long work tells its caller. Only the command line draws it."""

from __future__ import annotations

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
