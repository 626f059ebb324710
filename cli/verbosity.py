"""How much the command says: ``--quiet`` the result alone, ``--verbose`` also where an error comes from."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from calibration.bounds import check_numbers
from calibration.errors import ToolkitError
from cli.interrupts import passed_on

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the result alone: no plan, no progress.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Messages of the libraries below, and the traceback of an error.")
]


@dataclass
class Verbosity:
    """Of the command that runs."""

    quiet: bool = False
    verbose: bool = False

    def reset(self) -> None:
        self.quiet = self.verbose = False

    def add(self, quiet: bool, verbose: bool) -> None:
        """What was asked for here, beside what was asked for in front of the command.

        Raises:
            ToolkitError: both.
        """
        self.quiet, self.verbose = self.quiet or quiet, self.verbose or verbose
        if self.quiet and self.verbose:
            self.verbose = False
            from calibration.errors import ToolkitError

            raise ToolkitError("--quiet and --verbose exclude each other", "leave one out")


verbosity = Verbosity()


def detail(text: str) -> None:
    """Print what is not the result."""
    if not verbosity.quiet:
        print(text)


def with_verbosity(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with ``--quiet`` and ``--verbose``, which may also stand in front of its name, and with bounds on all
    numbers that it takes. Empty texts are refused (an unset variable of a script), but for a prompt."""

    signature = inspect.signature(command, eval_str=True)
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}

    @functools.wraps(command)
    def run(*, quiet: bool, verbose: bool, **values: Any) -> Any:
        verbosity.add(quiet, verbose)
        check_numbers(values)
        for name, value in values.items():
            if value == "" and name != "prompt" and defaults[name] != "":
                dashes = "" if defaults[name] is inspect.Parameter.empty else "--"  # arguments have no default
                raise ToolkitError(f"{dashes}{name.replace('_', '-')}: empty", "give it a value, or leave it out")
        with passed_on():
            return command(**values)

    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values()]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in (("quiet", Quiet), ("verbose", Verbose))
    ]
    run.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in (*own, *added)}
    return run
