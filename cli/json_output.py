"""``--json``: a file, or ``-`` for standard output, which then carries the JSON alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.shared import first

Json = Annotated[
    Path | None,
    typer.Option("--json", help="Write the numbers to this file; - for standard output, and all text to stderr."),
]
STANDARD = Path("-")


@contextmanager
def json_output(path: Path | None, planned: bool = True) -> Iterator[Callable[[Any], None]]:
    """What writes data to ``path``, if there is one; inside, text goes to stderr where ``path`` is ``-``.

    Args:
        planned: for commands whose plan is what it holds: whether ``--dry-run`` asks for one.

    Raises:
        ToolkitError: at once, where no file can be made there.
    """
    from calibration.errors import ToolkitError
    from calibration.model.checkpoint import write_atomically

    if path is not None and not planned:
        raise ToolkitError(f"--json {path}: holds the numbers of a plan", "pass --dry-run too, or leave --json out")

    if path not in (None, STANDARD):
        if path.is_dir():
            raise ToolkitError(f"--json {path}: is a folder", "name a file in it")
        if not path.absolute().parent.is_dir():
            raise ToolkitError(f"--json {path}: no such folder", "name a file in an existing folder")
    standard = sys.stdout

    def write(data: Any) -> None:
        text = json.dumps(data, indent=1, sort_keys=True) + "\n"
        if path == STANDARD:
            standard.write(text)
        elif path is not None and first():
            write_atomically(path, text.encode())

    with redirect_stdout(sys.stderr) if path == STANDARD else nullcontext():
        yield write
