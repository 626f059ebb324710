"""Errors a user can act on. Everything else is a bug of ours and keeps its traceback."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class ToolkitError(Exception):
    """Something the user can fix. ``message`` names the thing and its value, ``fix`` says what to do.

    The command line prints both and exits with code 2, without a traceback.
    """

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(f"{message}\n    fix: {fix}")
        self.message = message
        self.fix = fix


@dataclass(frozen=True)
class Problem:
    """One reason why a plan cannot be carried out: which tensor or option, why, and a fix that works."""

    subject: str
    reason: str
    fix: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.reason}\n    fix: {self.fix}"


class PlanError(ToolkitError):
    """Every problem of a plan at once, so that a user repairs a recipe in one go."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        assert self.problems, "a PlanError needs at least one problem"
        Exception.__init__(self, "\n".join(str(p) for p in self.problems))
        self.message = "; ".join(f"{p.subject}: {p.reason}" for p in self.problems)
        self.fix = "; ".join(p.fix for p in self.problems)


def short_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there is no memory left: libraries have types and words of their own for it."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return any(words in str(error) for words in _NO_MEMORY)


_NO_MEMORY = ("an't allocate memory", "annot allocate memory", "out of memory", "bad_alloc", "can't start new thread")


@contextmanager
def foreign(what: str, fix: str) -> Iterator[None]:
    """The border to a library that reads what users bring: whatever it raises becomes a `ToolkitError` that begins with
    ``what`` and ends with its first line; the cause is kept. (Tokenizers raise plain `Exception`, config classes their
    own kinds: no list of types is complete.)"""
    try:
        yield
    except ToolkitError:
        raise
    except Exception as error:
        if short_of_memory(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyError | AttributeError | IndexError | RecursionError):
            reason = f"{type(error).__name__}: {reason}"
        raise ToolkitError(f"{what}: {reason[:300]}", fix) from error


def nearest(value: str, known: Iterable[str]) -> str:
    """``"did you mean 'awq'? "`` for the closest known name, or an empty string."""
    found = difflib.get_close_matches(value, list(known), n=1, cutoff=0.4)
    return f"did you mean '{found[0]}'? " if found else ""


def unknown_value(option: str, value: str, known: Iterable[str]) -> ToolkitError:
    """The error for an option value outside a fixed list, with the nearest name."""
    choices = list(known)
    return ToolkitError(
        f"{option}: unknown value '{value}'", f"{nearest(value, choices)}use one of: {', '.join(choices)}"
    )
