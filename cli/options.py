"""Options that several commands share."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from cli.verbosity import verbosity

Model = Annotated[str, typer.Argument(help="Hub id, local folder, or `demo` (built in, no network).", metavar="MODEL")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with MODEL.")]
Inputs = Annotated[
    str,
    typer.Option(
        help="What decoding steps on CPUs round inputs of integer codes to: int15, or int8, faster and coarser."
    ),
]
Dense = Annotated[bool, typer.Option("--dense", help="Ignore activation thresholds that lie in MODEL.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in --out.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan with its memory and time, read no weights, write nothing.")
]
PlanJson = Annotated[
    Path | None,
    typer.Option(
        "--json", help="Write the numbers of the plan to this file; - for standard output, and all text to stderr."
    ),
]
Metadata = Annotated[
    Path | None, typer.Option(help="GGUF file of the same model whose tokenizer a GGUF output takes over.")
]
Embeddings = Annotated[
    str | None, typer.Option(help="Scheme of the token embedding: w8a16-g32, q8_0, ..., float. Default: q8_0 in GGUF.")
]
Head = Annotated[str | None, typer.Option(help="Scheme of the head; a tied one has that of the embedding.")]
Out = Annotated[Path, typer.Option(help="Output folder, or FILE.gguf; appears whole or not at all.")]

PlannedOut = Annotated[
    Path | None, typer.Option("--out", help="Output folder; appears whole or not at all. --dry-run needs none.")
]


def needed(out: Path | None, dry_run: bool) -> Path:
    """The output folder of a command that has ``--dry-run``.

    Raises:
        ToolkitError: it is missing, and something is to be written.
    """
    from calibration.errors import ToolkitError

    if out is None and not dry_run:
        raise ToolkitError("--out is missing", "pass --out DIR, or --dry-run to see the plan only")
    return out or Path()


def command_line() -> str:
    """The command as typed, for the record, but for what must not change the files: where they and the plan's numbers
    go, and whether it is a second try. A resumed run is byte-identical to an uninterrupted one."""
    words: list[str] = []
    skipped = ""
    for word in sys.argv[1:]:
        if skipped == "--json":
            skipped = ""
        elif skipped == "--out":
            words.append("DIR")
            skipped = ""
        elif word == "--json":
            skipped = word
        elif word == "--out":
            words.append(word)
            skipped = word
        elif word not in ("--resume", "--overwrite") and not word.startswith("--json="):
            words.append("--out=DIR" if word.startswith("--out=") else word)
    return shlex.join(["ptq", *words])


def percentage(option: str, text: str) -> float:
    """``1%`` or ``0.5%`` to 0.01 or 0.005.

    Raises:
        ToolkitError: no number with a per cent sign, or not between 0 and 100 %.
    """
    from calibration.errors import ToolkitError

    try:
        share = float(text.removesuffix("%")) / 100 if text.endswith("%") else -1.0
    except ValueError:
        share = -1.0
    if not 0.0 <= share <= 1.0:
        raise ToolkitError(f"{option} {text}: not a percentage between 0% and 100%", "write 1%")
    return share


def quiet_libraries() -> None:
    """No progress bars and advice of the libraries below; ours say what matters. Under --verbose all they say."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import logging

    from transformers.utils import logging as transformers_logging

    if verbosity.verbose:
        logging.basicConfig(level=logging.INFO)
        transformers_logging.set_verbosity_info()
        return
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("compressed_tensors").setLevel(logging.ERROR)


def entries(option: str, text: str) -> tuple[str, ...]:
    """The entries of a comma-separated list, each once."""
    from calibration.errors import ToolkitError

    found = [word.strip() for word in text.split(",")]
    if not all(found) or len(set(found)) < len(found):
        raise ToolkitError(f"{option} {text}: an entry is empty or there twice", "separate different entries by commas")
    return tuple(found)
