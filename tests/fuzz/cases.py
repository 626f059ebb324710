"""Kinds of damage, the command that meets it, and how every case must end."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from command import done, text_file, tiny

from fuzz.mutations import (
    ODD_VALUES,
    damage_text,
    mutate_header,
    mutate_json,
    mutate_values,
    replace_by_other_kind,
)

SMALL = ["--samples", "2", "--seq-len", "16", "--dataset", "text.txt"]
FORMATS = ("native", "compressed-tensors", "gptq", "awq")
RECIPE = """scheme = "w3a16-g32"
[[pass]]
name = "awq"
grid = 2
[[pass]]
name = "gptq"
[[rule]]
match = "*.v_proj"
scheme = "w4a16-g32"
"""


@dataclass(frozen=True)
class Case:
    """One command over damaged files, in a folder of its own.

    Attributes:
        what: the damage, for the report.
        words: the command line, run in the folder.
        known: the exit code where the answer is certain, else None: 0 and 2 are both possible.
    """

    what: str
    words: list[str]
    known: int | None = None


def make_bases(folder: Path) -> None:
    """Good files to damage: a model, quantized folders of every format, a sparse one, an interrupted run."""
    text_file(folder / "text.txt")
    (folder / "rows.jsonl").write_text('{"text": "one two three"}\n' * 200)
    (folder / "recipe.toml").write_text(RECIPE)
    model = tiny(folder / "model")
    for name in FORMATS:
        words = ["quantize", model, "--method", "rtn", "--scheme", "w4a16-g32", "--format", name]
        done(*words, "--out", folder / name)
    sparse = ["sparsify", model, "--method", "teal", "--target", "0.5", "--out", folder / "sparse"]
    done(*sparse, "--samples", "64", "--seq-len", "16", "--dataset", folder / "text.txt")


def model_file(mutate: Callable[[Path, random.Random], str], name: str) -> Callable[[Path, random.Random], Case]:
    def case(place: Path, rng: random.Random) -> Case:
        what = mutate(place / "model" / name, rng)
        command = rng.choice((["quantize", "model", "--method", rng.choice(("rtn", "gptq")), "--scheme", "w4a16-g32"],
                              ["eval", "model", "--dataset", "text.txt", "--seq-len", "16"]))  # fmt: skip
        more = [*SMALL, "--out", "out"] if command[0] == "quantize" else []
        return Case(what, [*command, *more])

    return case


def quantized(place: Path, rng: random.Random) -> Case:
    """A quantized folder of some format: its description, its headers, or its values."""
    folder = place / rng.choice(FORMATS)
    if rng.random() < 0.4:
        what = mutate_json(folder / "config.json", rng, within=("quantization_config",))
    else:
        mutate = rng.choice((mutate_header, mutate_values))
        what = mutate(folder / "model.safetensors", rng)
    command = rng.choice((["export", folder.name, "--format", "native", "--out", "out", "--overwrite"],
                          ["eval", folder.name, "--dataset", "text.txt", "--seq-len", "16"],
                          ["inspect", folder.name]))  # fmt: skip
    return Case(f"{folder.name}/{what}", command)


def sparse(place: Path, rng: random.Random) -> Case:
    name = rng.choice(("sparsity.json", "sparsity.safetensors"))
    mutate = mutate_json if name.endswith(".json") else rng.choice((mutate_header, mutate_values))
    what = mutate(place / "sparse" / name, rng)
    return Case(what, ["eval", "sparse", "--dataset", "text.txt", "--seq-len", "16"])


def recipe(place: Path, rng: random.Random) -> Case:
    lines = RECIPE.splitlines()
    at = rng.randrange(len(lines))
    value = rng.choice(("nan", "-1", "0", "1e300", '"x"', "[]", "true", '""', "10000000000000000000000", "{a = 1}"))
    kind = rng.choice(("value", "value", "drop", "text", "key"))
    if kind == "value" and "=" in lines[at]:
        lines[at] = f"{lines[at].split('=')[0]}= {value}"
    elif kind == "drop":
        del lines[at]
    elif kind == "key":
        lines.insert(at, f"unknown = {value}")
    (place / "recipe.toml").write_text("\n".join(lines) + "\n")
    what = f"recipe: {kind} {value} in line {at}"
    if kind == "text":
        what = damage_text(place / "recipe.toml", rng)
    return Case(what, ["quantize", "model", "--recipe", "recipe.toml", *SMALL, "--out", "out"])


OPTIONS = ("--samples", "--seq-len", "--seed", "--method", "--scheme", "--format", "--dtype", "--device", "--dataset")


def option(place: Path, rng: random.Random) -> Case:
    name = rng.choice(OPTIONS)
    value = rng.choice(
        [str(v) for v in ODD_VALUES if not isinstance(v, str) or v.isascii()] + ["\u00e9", "w99a16", "+"]
    )
    words = ["quantize", "model", "--method", "gptq", "--scheme", "w4a16-g32", *SMALL, "--out", "out"]
    words = [w for i, w in enumerate(words) if w != name and (i == 0 or words[i - 1] != name)]
    return Case(f"{name} {value[:40]!r}", [*words, f"{name}={value}"])


def data(place: Path, rng: random.Random) -> Case:
    name = rng.choice(("text.txt", "rows.jsonl"))
    what = rng.choice((damage_text, replace_by_other_kind))(place / name, rng)
    words = ["quantize", "model", "--method", "gptq", "--scheme", "w4a16-g32", "--samples", "2", "--seq-len", "16"]
    return Case(what, [*words, "--dataset", name, "--out", "out"])


def committed(place: Path, rng: random.Random) -> Case:
    """DIR.partial of an interrupted run; a resumed one is right or refused, never other bytes (see `run`)."""
    blocks = place / "out.partial" / "blocks"
    target = rng.choice([*sorted(blocks.iterdir()), place / "out.partial" / "plan.json"])
    if target.suffix == ".json":
        what = mutate_json(target, rng)
    else:
        what = rng.choice((mutate_header, mutate_values))(target, rng)
    words = ["quantize", "model", "--method", "gptq", "--scheme", "w4a16-g32", *SMALL, "--out", "out", "--resume"]
    return Case(what, words)


KINDS: dict[str, Callable[[Path, random.Random], Case]] = {
    "header": model_file(mutate_header, "model.safetensors"),
    "values": model_file(mutate_values, "model.safetensors"),
    "config": model_file(mutate_json, "config.json"),
    "tokenizer": model_file(mutate_json, "tokenizer.json"),
    "other kind": model_file(replace_by_other_kind, "config.json"),
    "quantized": quantized,
    "sparse": sparse,
    "recipe": recipe,
    "option": option,
    "data": data,
    "committed": committed,
}


def copy_bases(bases: Path, place: Path, with_interrupted: bool) -> None:
    """Fresh files for a case. An interrupted run lies only where it is damaged: elsewhere every run would be refused
    because of it, whatever else is wrong."""
    ignored = None if with_interrupted else shutil.ignore_patterns("out.partial")
    shutil.copytree(bases, place, symlinks=True, ignore=ignored)
