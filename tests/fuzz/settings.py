"""Seeded recipes and options: values that must work, values that must be refused, and odd ones."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

from fuzz.mutations import DONE, ODD_VALUES, REFUSED, Damage, damage_text
from ptq.methods import METHODS

Words = tuple[str, ...]
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
ODD_TOML = ("nan", "-inf", "-1", "0", "1", "2", "0.5", "1e300", "1e-300", '"x"', "[]", "true", '""',
            "10000000000000000000000", "{a = 1}", "1979-05-27", "'''x'''")  # fmt: skip
LINES = ('method = "rtn"', "method = 3", "pass = 1", 'scheme = "w4a16-g32"', 'format = "native"', 'format = "nope"',
         "[[pass]]", "[[rule]]", "[pass]", 'match = "*"', "unknown = 1", "# nothing", "")  # fmt: skip
GOOD, BAD = "good", "bad"
WHOLE = {GOOD: ("1", "2", "3"), BAD: ("0", "-1", "nan", "1e3", "x", "", "99999999999", "9223372036854775808", "1.5")}
OPTIONS: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    "quantize": {
        "--samples": WHOLE,
        "--seq-len": {GOOD: ("2", "8", "64", "4096"), BAD: ("0", "1", "-4", "x", "99999999999")},
        "--seed": {GOOD: ("0", "1", "123456"), BAD: ("x", "1.5", "9" * 30, "nan")},
        "--method": {
            GOOD: ("rtn", "gptq", "awq", "equalize+rtn"),
            BAD: ("", "nope", "rtn+", "+", "rtn+gptq+rtn"),
        },
        "--scheme": {
            GOOD: ("w3a16-g32", "w8a16-gchannel", "fp8", "w8a8", "w2a16-g32-sym"),
            BAD: ("", "w99a16", "w4a16-g7", "w4", "w4a16-g-32", "float", "é"),
        },
        "--format": {GOOD: ("native", "compressed-tensors", "gptq"), BAD: ("", "nope", "float", "gguf")},
        "--dtype": {GOOD: ("float32", "bfloat16", "auto"), BAD: ("", "float23", "int8")},
        "--device": {GOOD: ("cpu", "auto"), BAD: ("", "gpu", "cuda:77", "cpu:x")},
        "--dataset": {
            GOOD: ("text.txt", "builtin", "random"),
            BAD: ("", "nope", "nope.txt", ".", "/dev/zero", "a" * 300),
        },
        "--embeddings": {GOOD: ("float",), BAD: ("nope", "")},
        "--out": {GOOD: ("deep/er/out",), BAD: ("model/config.json", "/", "model", "a" * 300, "/dev/null/x")},
    },
    "eval": {
        "--seq-len": {GOOD: ("2", "8", "64", "4096"), BAD: ("0", "1", "-4", "x")},
        "--protocol": {GOOD: ("gptq", "llama.cpp", "hf-stride"), BAD: ("", "nope")},
        "--max-windows": {GOOD: ("1", "3"), BAD: ("0", "-1", "x", "nan")},
        "--dtype": {GOOD: ("float32", "bfloat16"), BAD: ("", "float23")},
        "--reference": {GOOD: ("model",), BAD: ("nope", "", "text.txt")},
        "--json": {GOOD: ("-", "x.json"), BAD: ("none/x.json", ".", "a" * 300)},
        "--dataset": {GOOD: ("builtin",), BAD: ("nope", "/dev/zero", "", ".")},
    },
    "generate": {
        "--prompt": {GOOD: ("1", "é", "a\nb"), BAD: ("", "\udcff")},
        "--max-new-tokens": {GOOD: ("1", "2"), BAD: ("0", "-1", "x")},
        "--temperature": {GOOD: ("0", "0.7", "2"), BAD: ("-1", "nan", "inf", "x")},
        "--seed": {GOOD: ("0", "5"), BAD: ("x", "9" * 30)},
        "--kernel": {GOOD: (), BAD: ("nope", "")},
    },
}
UNREAD = {"rtn": ("--samples", "--seq-len", "--seed", "--dataset", "--dtype")}  # options that a method does not need


def option(place: Path, rng: random.Random, words: Words) -> tuple[Damage, Words]:
    """One option with another value."""
    known = OPTIONS[words[0]]
    name = rng.choice(list(known))
    kind = rng.choice([GOOD, BAD, "odd"])
    odd = [str(v) for v in ODD_VALUES if not isinstance(v, str) or v.isascii()]
    value = rng.choice(known[name].get(kind) or odd)
    left = [w for i, w in enumerate(words) if i < 2 or (w != name and words[i - 1] != name)]
    certain = {GOOD: DONE, BAD: REFUSED}.get(kind)
    unread = "rtn" in words and name in UNREAD["rtn"]
    if not known[name].get(kind) or (unread and kind == BAD):
        certain = None
    if name == "--max-new-tokens" and kind == "odd":
        value = "7"  # as many as one likes is no mistake
    return Damage(f"{name} {value[:40]!r}", certain), (*left, f"{name}={value}")


def recipe(place: Path, rng: random.Random, words: Words) -> tuple[Damage, Words]:
    """A line of a recipe, or a setting of any pass."""
    path = place / "recipe.toml"
    kind = rng.choice(("line", "value", "drop", "text", "setting", "setting", "setting", "comment", "twice"))
    if kind == "text":
        return damage_text(path, rng), words
    if kind == "setting":
        return _setting(path, rng), words
    lines = RECIPE.splitlines()
    at = rng.randrange(len(lines))
    value = rng.choice(ODD_TOML)
    if kind == "value" and "=" in lines[at]:
        lines[at] = f"{lines[at].split('=')[0]}= {value}"
    elif kind == "drop":
        del lines[at]
    elif kind == "line":
        lines.insert(at, rng.choice(LINES))
    elif kind == "twice":
        lines.insert(at, lines[at])
    else:
        lines.insert(at, rng.choice(("# a comment", "", "   ", "\t# more")))
    path.write_text("\n".join(lines) + "\n")
    same = kind == "comment"
    return Damage(f"recipe: {kind} {lines[min(at, len(lines) - 1)]}", DONE if same else None, same), words


def _setting(path: Path, rng: random.Random) -> Damage:
    """A setting of a pass, often one that rounds after it, with a value that may or may not be possible."""
    name = rng.choice(list(METHODS))
    fields = dataclasses.fields(METHODS[name])  # type: ignore[arg-type]
    field = rng.choice(fields) if fields else None
    setting = "unknown" if field is None else field.name
    value = rng.choice(ODD_TOML)
    behind = rng.choice(('[[pass]]\nname = "rtn"\n', ""))
    path.write_text(f'scheme = "w4a16-g32"\n[[pass]]\nname = "{name}"\n{setting} = {value}\n{behind}')
    certain = REFUSED if setting == "unknown" or value in ("nan", "-inf", "1979-05-27", "{a = 1}", "[]") else None
    return Damage(f"recipe: {name}.{setting} = {value}{' + rtn' if behind else ''}", certain)
