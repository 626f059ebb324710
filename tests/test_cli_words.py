"""What every command has in common: help, version, how much is said, completion, and words of other tools."""

from __future__ import annotations

import os
import re
from pathlib import Path
from unittest import mock

import pytest
import typer
from command import done, process, refused, run_ptq, text_file, tiny
from rich.text import Text

import ptq
from calibration.record import read_record
from cli.main import app

FAST = ("--samples", "3", "--seq-len", "24", "--scheme", "w4a16-g32", "--method", "rtn")


def commands() -> dict[tuple[str, ...], object]:
    """Every command by the words that call it, groups too."""
    root = typer.main.get_command(app)
    found: dict[tuple[str, ...], object] = {(): root}
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        found[name,] = command
        found |= {(name, inner): c for inner, c in getattr(command, "commands", {}).items()}
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    text_file(folder / "text.txt")
    tiny(folder / "llama", intermediate_size=128)
    return folder


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_help_shows_every_word_of_its_source(words: tuple[str, ...]) -> None:
    """Rich takes ``[eval]`` for a style and prints nothing: every word must come out, brackets and all."""
    shown = Text.from_ansi(done(*words, "--help")).plain
    shown = re.sub(r"[│╭╮╰╯─\s]+", "", shown)
    command = commands()[words]
    texts = [p.help for p in command.params if getattr(p, "help", None)]  # type: ignore[attr-defined]
    texts += [line for line in (command.help or "").splitlines() if line.strip()]  # type: ignore[attr-defined]
    assert texts
    for text in texts:
        for word in text.replace("\\[", "[").replace("`", " ").split():
            assert word in shown, word


def test_version() -> None:
    assert done("--version") == f"ptq {ptq.__version__}\n"


def test_quiet_prints_the_result_alone(place: Path) -> None:
    out = place / "quiet"
    words = ("quantize", place / "llama", *FAST, "--out", out)
    result = run_ptq(*words, "-q")
    assert result.code == 0 and result.err == ""
    assert result.out.splitlines() == [f"written to {out} (report.html, report.md, report.json)"]
    result = run_ptq("--quiet", "eval", out, "--dataset", place / "text.txt", "--seq-len", 24, "--max-windows", 2)
    assert result.code == 0 and result.err == "" and re.fullmatch(r"perplexity \d+\.\d{4}\n", result.out)
    assert "method rtn" in run_ptq(*words, "--overwrite").out, "the next command is as loud as ever"


def test_verbose_shows_where_an_error_comes_from(place: Path) -> None:
    words = ("quantize", place / "llama", "--method", "awk", "--out", place / "no")
    result = run_ptq(*words, "-v")
    assert result.code == 2 and "Traceback" in result.err and "error: --method: unknown value 'awk'" in result.err
    assert "Traceback" not in run_ptq(*words).err
    assert "exclude each other" in refused("-q", *words, "-v")


def test_completion() -> None:
    with mock.patch.dict(os.environ, {"_PTQ_COMPLETE": "complete_bash", "COMP_WORDS": "ptq qu", "COMP_CWORD": "1"}):
        assert run_ptq().out.split() == ["quantize"]
    assert "--install-completion" in done("--help")


def test_help_loads_no_torch() -> None:
    code = "import sys; from cli.main import app; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert process("--help").returncode == 0
    import subprocess
    import sys

    from command import environment

    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment()).returncode == 0


@pytest.mark.parametrize(
    ("words", "scheme"),
    [
        (("--bits", "3"), "w3a16 "),
        (("--wbits=4", "--groupsize", "64"), "w4a16-g64 "),
        (("--w_bit", "4", "--q_group_size", "-1"), "w4a16-gchannel "),
        (("--group-size", "32"), "w4a16-g32 "),
    ],
    ids=str,
)
def test_options_of_other_tools_point_to_scheme(words: tuple[str, ...], scheme: str) -> None:
    for command, option in (("quantize", "--scheme"), ("fit", "--schemes")):
        message = refused(command, "demo", *words)
        assert f"write {option} {scheme}" in message and words[0].split("=")[0] in message
    assert "No such option" in run_ptq("eval", "demo", "--bits", "3").err


def test_few_windows(place: Path) -> None:
    words = ("quantize", place / "llama", *FAST, "--eval", place / "text.txt", "--overwrite", "--out", place / "few")
    assert "window 24, 2 windows)" in done(*words, "--eval-windows", 2)
    for entry in read_record(place / "few").evaluations:
        assert entry.windows == 2 and entry.protocol.tokens_scored == 2 * 23
    out = done("eval", place / "few", "--dataset", place / "text.txt", "--seq-len", 24, "--max-windows", 3)
    assert "69 tokens of 3 windows scored" in out
    assert "less than 1" in refused("eval", place / "few", "--dataset", place / "text.txt", "--max-windows", 0)
    assert "nothing to score" in refused("quantize", place / "llama", *FAST, "--eval-windows", 2, "--out", place / "no")
