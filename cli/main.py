"""The ``ptq`` command: commands, and what happens to errors."""

from __future__ import annotations

import sys

import typer

from calibration.errors import ToolkitError
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
)

app = typer.Typer(
    name="ptq",
    help="Quantize Hugging Face language models after training, and prove what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("quantize", cls=methods.ListsPasses)(quantize.quantize)
app.command("fit", cls=methods.ListsFitted)(fit.fit)
app.command("sparsify", cls=methods.ListsGates)(sparsify.sparsify)
app.command("eval")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("export")(export.export)
app.command("inspect")(inspect.inspect)
app.command("methods")(methods.methods)
app.command("analyze")(analyze.analyze)
app.command("bench")(bench.bench)
app.command("compare")(compare.compare)
app.command("predict")(predict.predict)
app.command("prepare")(prepare.prepare)
app.add_typer(study.app, name="study")


def main() -> None:
    """Entry point. What a user can fix ends with one message and exit code 2; an interrupt with 130."""
    try:
        app()
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: what is finished is kept; run again with --resume to continue", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
