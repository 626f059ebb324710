"""The ``ptq`` command: commands, and what happens to errors."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer
from typer.core import TyperCommand

from calibration.errors import ToolkitError, short_of_memory
from cli import (
    analyze,
    bench,
    compare,
    evaluate,
    export,
    fit,
    generate,
    inspect,
    methods,
    predict,
    prepare,
    quantize,
    sparsify,
    study,
    upload,
)
from cli.interrupts import Interrupted, how_to_go_on, terminable, what_is_kept
from cli.scheme_hint import Command
from cli.shared import may_speak, prefix, refuse_others, shown_by_the_first, stay, tell_state
from cli.verbosity import Quiet, Verbose, verbosity, with_verbosity

app = typer.Typer(
    name="ptq",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
COMMANDS: dict[str, tuple[Callable[..., None], type[TyperCommand]]] = {
    "quantize": (quantize.quantize, methods.ListsPasses),
    "fit": (fit.fit, methods.ListsFitted),
    "sparsify": (sparsify.sparsify, methods.ListsGates),
    "eval": (evaluate.evaluate, Command),
    "generate": (generate.generate, Command),
    "export": (export.export, Command),
    "inspect": (inspect.inspect, Command),
    "methods": (methods.methods, Command),
    "analyze": (analyze.analyze, Command),
    "bench": (bench.bench, Command),
    "compare": (compare.compare, Command),
    "predict": (predict.predict, Command),
    "prepare": (prepare.prepare, Command),
    "upload": (upload.upload, Command),
}
for name, (command, kind) in COMMANDS.items():
    app.command(name, cls=kind)(with_verbosity(command))
app.add_typer(study.app, name="study")


def _print_version(wanted: bool) -> None:
    if wanted:
        import ptq

        print(f"ptq {ptq.__version__}")
        raise typer.Exit


@app.callback()
def everywhere(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Quantize Hugging Face language models after training, and prove what it cost."""
    verbosity.add(quiet, verbose)


def main() -> None:
    """Entry point. What a user can fix ends with one message and exit code 2; SIGINT with 130, SIGTERM with 143."""
    verbosity.reset()
    try:
        with terminable(), shown_by_the_first():
            refuse_others(sys.argv[1:])
            app(prog_name="ptq")
    except ToolkitError as error:
        if verbosity.verbose:
            traceback.print_exception(error)
        if may_speak():
            print(f"{prefix()}error: {error}", file=sys.stderr)
            tell_state(error)
        sys.exit(2)
    except Interrupted as interrupt:
        if may_speak():
            print(f"{prefix()}{what_is_kept(sys.argv[1:])}", file=sys.stderr)
        sys.exit(128 + interrupt.number)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # as soon as it is looked for, anywhere
            print(f"error: {str(error.filename)[:80]}...: {error.strerror}\n    fix: name another one", file=sys.stderr)
        elif short_of_memory(error):
            _tell_short_memory(error)
        else:
            raise
        sys.exit(2)
    finally:
        locks = sys.modules.get("ptq.lock")  # the traceback of an error would keep them, and their files, alive
        if locks is not None:
            locks.release_all()
        stay()


def _tell_short_memory(error: Exception) -> None:
    """One message for all that libraries raise where memory is used up."""
    if verbosity.verbose:
        traceback.print_exception(error)
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    print(f"error: no memory is left ({reason})", file=sys.stderr)
    print("    fix: fewer --samples, a shorter --seq-len or no --eval take less; --dry-run plans it", file=sys.stderr)
    left = " ".join(getattr(error, "__notes__", ()))
    kept = how_to_go_on(sys.argv[1:]) or left or "nothing is left of it: the same command starts anew"
    print(kept, file=sys.stderr)


if __name__ == "__main__":
    main()
