"""``ptq methods``, and the lists of methods in the help of other commands."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from cli.scheme_hint import Command


def methods(
    markdown: Annotated[bool, typer.Option("--markdown", help="The table of docs/methods.md.")] = False,
) -> None:
    """List what --method takes: every pass, in the order in which passes may follow each other.

    Example:

      ptq methods
    """
    from ptq import catalogue

    if markdown:
        print(catalogue.markdown(), end="")
        return
    from rich.table import Table

    from cli.plan_view import wide_console

    table = Table("method", "phase", "what it does", "default scheme", box=None, pad_edge=False)
    for entry in catalogue.methods():
        table.add_row(entry.name, ", ".join(entry.phases), entry.summary, entry.default_scheme or "")
    for name, members in catalogue.combinations().items():
        table.add_row(name, "", "+".join(members), "")
    wide_console().print(table)


class ListsPasses(Command):
    """A command whose ``--method`` takes any pass. They are listed when its help is asked for, not at every start."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from ptq import catalogue

        listed = " ".join(f"{phase}: {', '.join(_names(phase))}." for phase in catalogue.phases())
        _extend_help(self, f"{listed} Combinations: {', '.join(catalogue.combinations())}.")
        super().format_help(ctx, formatter)


class ListsGates(Command):
    """A command whose ``--method`` takes a pass of activation sparsity."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _extend_help(self, f"{', '.join(_names('gate'))}.")
        super().format_help(ctx, formatter)


class ListsFitted(Command):
    """A command whose ``--method`` takes what `ptq fit` has a law for."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from ptq import catalogue

        _extend_help(self, f"{', '.join(catalogue.fit_methods())}.")
        super().format_help(ctx, formatter)


def _names(phase: str) -> list[str]:
    from ptq import catalogue

    return [entry.name for entry in catalogue.methods() if entry.phases[0] == phase]


def _extend_help(command: TyperCommand, listed: str) -> None:
    option = next(p for p in command.params if p.name == "method")
    assert isinstance(option, TyperOption)
    option.help = f"{option.help or ''} {listed} `ptq methods` says what each does.".strip()
