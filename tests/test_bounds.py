"""Every number that a user can set has bounds: all options of all commands, and all settings of all passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from command import refused, run_ptq, text_file, tiny

from calibration.bounds import setting_problems
from cli import study
from cli.main import COMMANDS as MAIN
from ptq.sparse.methods import all_methods

TEXT = ["--dataset", "text.txt", "--seq-len", "16"]
SMALL = [*TEXT, "--samples", "2"]
TASK_OPTIONS = ("--limit", "--num-fewshot", "--batch-size")
COMMANDS: dict[str, list[str]] = {
    "quantize": ["model", "--method", "gptq", "--scheme", "w4a16-g32", "--eval", "text.txt", *SMALL, "--out", "out"],
    "fit": ["model", "--schemes", "w3a16-g32,w4a16-g32", *SMALL, "--out", "fit.toml"],
    "sparsify": ["model", "--method", "teal", *SMALL, "--out", "out"],
    "eval": ["model", *TEXT],
    "generate": ["model", "--prompt", "12"],
    "analyze": ["model", "--clipped-softmax", "--sensitivity", "w4a16-g32", *SMALL, "--out", "out"],
    "bench": ["sparse", "--prompt", "12"],
    "predict": ["model", "--tokens", "1e9", "--bits", "4"],
    "prepare": ["quantized", *TEXT, "--out", "out"],
    "study calibration": ["model", "--scheme", "w4a16-g32", "--datasets", "text.txt", *SMALL[2:], "--eval", "text.txt",
                          "--out", "out"],
    "study sensitivity": ["model", "--schemes", "w4a16-g32", *SMALL, "--out", "out"],
}  # fmt: skip
WHOLE = ("-1", "99999999999", "9" * 30, "1.5", "nan", "x")
REAL = ("nan", "inf", "-inf", "-1", "1e300", "x")


def numeric_options() -> Iterator[tuple[str, str, bool]]:
    """(command, option, whether it takes whole numbers) of everything that the command line has."""
    functions = {name: function for name, (function, _) in MAIN.items()}
    functions |= {f"study {c.name or c.callback.__name__}": c.callback for c in study.app.registered_commands}  # type: ignore[union-attr]
    for command, function in functions.items():
        for name, hint in get_type_hints(function).items():
            kinds = {hint, *get_args(hint)} & {int, float}
            if kinds:
                yield command, f"--{name.replace('_', '-')}", kinds == {int}


OPTIONS = sorted(numeric_options())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bounds")
    text_file(folder / "text.txt")
    model = tiny(folder / "model")
    assert (
        run_ptq("quantize", model, "--method", "rtn", "--scheme", "w4a16-g32", "--out", folder / "quantized").code == 0
    )
    words = ["--target", "0.5", "--samples", "64", "--seq-len", "16", "--dataset", folder / "text.txt"]
    assert run_ptq("sparsify", model, "--method", "teal", "--out", folder / "sparse", *words).code == 0
    return folder


def test_the_walk_meets_every_command_with_numbers():
    assert {command for command, _, _ in OPTIONS} == set(COMMANDS) and len(OPTIONS) > 30


@pytest.mark.parametrize(("command", "option", "whole"), OPTIONS)
def test_every_numeric_option_has_bounds(place, monkeypatch, command, option, whole):
    monkeypatch.chdir(place)
    words = COMMANDS[command]
    words = [w for i, w in enumerate(words) if w != option and (not i or words[i - 1] != option)]
    if option in TASK_OPTIONS:
        words = [*words, "--tasks", "arc_easy"]
    for value in WHOLE if whole else REAL:
        if option == "--seed" and value in ("-1", "99999999999"):
            continue  # seeds are any number of 64 bits
        result = run_ptq(*command.split(), *words, f"{option}={value}")
        said = f"{command} {option}={value}: {result.code} {result.out[-300:]} {result.err[-900:]}"
        assert result.code == 2 and ("fix:" in result.err or "Invalid value" in result.err), said
        assert not (place / "out").exists() and not (place / "fit.toml").exists(), said


def settings() -> list[tuple[str, str]]:
    """All settings of all passes that are numbers by their defaults."""
    return [
        (name, field.name)
        for name, method in sorted(all_methods().items())
        for field in dataclasses.fields(method)  # type: ignore[arg-type]
        if isinstance(field.default, int | float) and not isinstance(field.default, bool)
    ]


@pytest.mark.parametrize(("method", "setting"), settings())
def test_every_setting_of_a_pass_has_bounds(place, monkeypatch, method, setting):
    kind = type(next(f.default for f in dataclasses.fields(all_methods()[method]) if f.name == setting))  # type: ignore[arg-type]
    values = (10**30, -(10**30)) if kind is int else (float("nan"), float("inf"), 1e300, -1e300, 1e-300, 10**400)
    for value in values:
        step = all_methods()[method](**{setting: value})
        assert list(setting_problems([step])), (method, setting, value)
    monkeypatch.chdir(place)
    Path("r.toml").write_text(f'[[pass]]\nname = "{method}"\n{setting} = {values[0]}\n')
    message = refused("quantize", "model", "--recipe", "r.toml", *SMALL, "--out", "out")
    assert setting in message
