"""The documentation is true where a program can tell: links, file names, command lines, recipes, and its length."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import click
import pytest
import typer.main

import ptq
from cli.main import app
from ptq.formats.registry import FORMATS
from ptq.methods import COMBINATIONS
from ptq.planning.recipe import read_recipe
from ptq.scheme import parse_scheme
from ptq.sparse.methods import all_methods

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"(?<![\w./-])((?:ptq|calibration|sparsity|cli|tests|benchmarks|examples|docs)/[\w./-]+\w)")
PLACEHOLDER = re.compile(r"[A-Z]\w*|\.\.\.|\[.*|.*\]")
"""Words for a reader to replace: MODEL, F, RUN..., [--reference MODEL]."""

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def commands(page: Path) -> list[str]:
    """Every ``ptq COMMAND ...`` in fenced blocks and between backticks."""
    text = page.read_text(encoding="utf-8")
    blocks = [body for language, body in FENCE.findall(text) if language in ("", "bash", "sh", "console")]
    lines = [part.split(" #")[0] for block in blocks for line in block.splitlines() for part in line.split("&&")]
    lines += re.findall(r"`((?:ptq)\s[^`]+)`", FENCE.sub("", text))
    lines = [" ".join(line.split()) for line in lines]
    lines = [line[line.index("ptq ") :] for line in lines if re.match(r"(?:\S*/bin/)?ptq ", line)]
    return [line for line in lines if not re.match(r"ptq [A-Z(<]", line)]


def find(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that ``ptq WORDS`` runs, and the words behind its name."""
    command: click.Command = typer.main.get_command(app)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"no command '{words[0]}'"
        command, words = command.commands[words[0]], words[1:]
    return command, words


@pages
def test_relative_links_lead_somewhere(page):
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if not re.match(r"[a-z]+:", target):
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
            assert path.exists(), f"{page.name}: {target}"
            if anchor:
                assert anchor in anchors(path), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """Names of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_named_files_exist(page):
    for name in PATH.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


@pages
def test_command_lines_parse(page):
    for line in commands(page):
        command, words = find(shlex.split(line.replace("[", " ").replace("]", " "))[1:])
        options = {name: p for p in command.params for name in (*p.opts, *p.secondary_opts)}
        for word in words:
            if word.startswith("--") and word != "--help":
                assert word.split("=")[0] in options, f"{page.name}: `{line}`: {word}"
        for name, check in {"--method": check_method, "--scheme": parse_scheme, "--format": check_format}.items():
            for word, value in pairwise(words):
                if word == name and not PLACEHOLDER.fullmatch(value):
                    check(value)


def check_method(text: str) -> None:
    known = {*all_methods(None), *COMBINATIONS}
    assert set(text.split("+")) <= known, text


def check_format(text: str) -> None:
    assert text in FORMATS, text


def test_the_reader_of_command_lines_sees_what_is_wrong():
    assert len(commands(ROOT / "README.md")) > 15
    with pytest.raises(AssertionError, match="no command"):
        find(["quantise", "demo"])


@pages
def test_python_names_are_public(page):
    for language, body in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            called = re.findall(r"(?<![\w.])ptq\.(\w+)\(", body)
            assert set(called) <= set(ptq.__all__), f"{page.name}: {called}"


@pages
def test_recipes_are_read(page, tmp_path):
    for language, body in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "toml":
            (tmp_path / "recipe.toml").write_text(body)
            read_recipe(tmp_path / "recipe.toml")


def test_the_readme_is_short_and_keeps_its_two_commands():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 140
    assert (
        'python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e ".[dev]" && '
        ".venv/bin/ptq quantize demo --method awq --out demo-awq --eval builtin" in lines
    )
    assert ".venv/bin/pytest" in lines
