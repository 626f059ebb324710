"""The ``ptq`` command run inside this process (starting Python and torch takes seconds), and what it leaves on disk."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from byte_tokenizer import byte_tokenizer
from tiny_models import save_tiny

from cli.main import main

VOCABULARY = 260  # bytes and BOS, padded


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def run_ptq(*words: str | Path) -> Outcome:
    """``ptq WORDS...`` as the console script runs it; anything but a `SystemExit` comes through as a traceback."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["ptq", *map(str, words)]),
        mock.patch.dict(os.environ, {"COLUMNS": "160"}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Outcome(code, out.getvalue(), err.getvalue())


def done(*words: str | Path) -> str:
    """The output of a command that must succeed."""
    result = run_ptq(*words)
    assert result.code == 0, result.err
    return result.out


def refused(*words: str | Path) -> str:
    """The message of a command that must fail as bad input does: one message, exit code 2, no traceback."""
    result = run_ptq(*words)
    assert result.code == 2, (result.code, result.out, result.err)
    assert result.err.count("error:") == 1 and "fix:" in result.err and "Traceback" not in result.err, result.err
    return result.err


def process(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """``ptq WORDS...`` in a process of its own."""
    command = [sys.executable, "-m", "cli.main", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment())


def environment() -> dict[str, str]:
    """For subprocesses: this repository, whatever the working directory."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "COLUMNS": "160"}


def tiny(folder: Path, family: str = "llama", **changes: object) -> Path:
    """A tiny checkpoint with a tokenizer of bytes."""
    save_tiny(family, folder, **{"vocab_size": VOCABULARY, **changes})
    byte_tokenizer().save_pretrained(folder)
    return folder


def text_file(path: Path, words: int = 600) -> Path:
    """Plain text of a few thousand bytes, always the same."""
    common = ("is", "was", "and", "of", "the")
    path.write_text(" ".join(f"{i * i % 997} {common[i % 5]}" for i in range(words)))
    return path


def snapshot(folder: Path) -> dict[str, bytes]:
    """Relative path -> content of every file below ``folder``; folders with empty content."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def products(folder: Path) -> dict[str, bytes]:
    """The files of a finished run but the record of times and memory."""
    return {name: data for name, data in snapshot(folder).items() if name != "timings.json"}
