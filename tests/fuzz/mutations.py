"""Seeded damage to the files that users bring: JSON values and texts. (Safetensors files: `fuzz.tensor_files`.)

Coarse damage is refused at the first look; fine damage (a number a little different, an entry moved) gets past it and
tries what lies behind. Both kinds are drawn.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 7, 2**31, 2**63, 10**30, 0.0, -0.5, 1e300, float("nan"), float("inf"),
    "", "nope", "../../x", "/etc/passwd", "\ud800", "a" * 300, [], {}, [1, "x"], {"a": [1]}, [[]] * 3,
)  # fmt: skip
REFUSED, DONE = 2, 0


@dataclass(frozen=True)
class Damage:
    """What was done to the files of a case.

    Attributes:
        what: for the report.
        known: the exit code where the answer is certain, else None: `DONE` and `REFUSED` are both possible.
        same: the damage changes nothing: where the command succeeds, it must leave what it leaves without.
    """

    what: str
    known: int | None = None
    same: bool = False


def json_paths(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value of a JSON document is."""
    if isinstance(data, dict):
        return [path, *(p for key, value in data.items() for p in json_paths(value, (*path, key)))]
    if isinstance(data, list):
        return [path, *(p for i, value in enumerate(data[:8]) for p in json_paths(value, (*path, i)))]
    return [path]


def nudged(value: Any, rng: random.Random) -> Any:
    """A value of the same type that differs a little."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, value * 2, value // 2, -value))
    if isinstance(value, float):
        return rng.choice((value * 2, value / 2, value * 1.001, -value, 0.0))
    if isinstance(value, str):
        return rng.choice((value.upper(), value.lower(), f"{value} ", value[:-1], f"{value}x", value[::-1]))
    if isinstance(value, list):
        return rng.choice((value[:-1], value[1:], value + value[-1:], value[::-1]))
    if isinstance(value, dict) and value:
        return {key: value[key] for key in list(value)[1:]}
    return rng.choice((0, "x", [], {}))


def mutate_json(path: Path, rng: random.Random, within: tuple[str, ...] = ()) -> Damage:
    """Delete, rename, exchange, nudge or add one value of a JSON file, or only lay it out anew."""
    text = path.read_text(encoding="utf-8")
    chance = rng.random()
    if chance < 0.06:
        return damage_text(path, rng)
    data = json.loads(text)
    if chance < 0.12:
        order = sorted(data, key=lambda key: rng.random())
        path.write_text(json.dumps({key: data[key] for key in order}, indent=rng.choice((None, 1, 4))))
        return Damage(f"{path.name}: laid out anew", DONE, same=True)
    places = [p for p in json_paths(data) if p and p[: len(within)] == within and len(p) > len(within)]
    if not places:
        return damage_text(path, rng)
    place = rng.choice(places)
    kind = rng.choice(("delete", "value", "value", "duplicate", "deep", *["nudge"] * 5, "move", "move"))
    _change(data, place, kind, rng, places)
    path.write_text(json.dumps(data), encoding="utf-8")
    return Damage(f"{path.name}: {kind} {'.'.join(map(str, place))}")


def _change(data: Any, place: tuple[Any, ...], kind: str, rng: random.Random, places: list[tuple[Any, ...]]) -> None:
    parent = _at(data, place[:-1])
    key = place[-1]
    if kind == "delete":
        del parent[key]
    elif kind == "value":
        parent[key] = rng.choice(ODD_VALUES)
    elif kind == "nudge":
        parent[key] = nudged(parent[key], rng)
    elif kind == "move":  # the value of another place
        parent[key] = json.loads(json.dumps(_at(data, rng.choice(places))))
    elif kind == "deep":
        nested: Any = 1
        for _ in range(200):
            nested = [nested]
        parent[key] = nested
    elif isinstance(parent, dict):
        parent[f"{key}_x"] = parent[key]
    else:
        parent.append(parent[key])


def _at(data: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        data = data[key]
    return data


def damage_text(path: Path, rng: random.Random) -> Damage:
    """Cut a file, empty it, exchange bytes, or put something in front."""
    data = bytearray(path.read_bytes())
    kind = rng.choice(("cut", "empty", "bytes", "front", "utf16"))
    if kind == "cut":
        data = data[: rng.randrange(len(data) + 1)]
    elif kind == "empty":
        data = bytearray()
    elif kind == "bytes":
        for _ in range(rng.choice((1, 4, 32))):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == "front":
        data = bytearray(rng.choice((b"\xff\xfe", b"\x00" * 16, b"[[[[", b"\xed\xa0\x80"))) + data
    else:
        data = bytearray(bytes(data).decode("utf-8", "replace").encode("utf-16"))
    path.write_bytes(bytes(data))
    return Damage(f"{path.name}: {kind}")


def replace_by_other_kind(path: Path, rng: random.Random) -> Damage:
    """A folder, a link to nowhere or to itself, a pipe, or no file at all in its place; or a link to the same file."""
    kind = rng.choice(("folder", "dangling", "loop", "gone", "pipe", "linked"))
    if kind == "linked":  # in the folder itself: what lies outside it is not read
        path.rename(path.with_name(f"{path.name}.real"))
        path.symlink_to(f"{path.name}.real")
        return Damage(f"{path.name}: {kind}", DONE)
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to(path.with_name("nowhere"))
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "pipe":
        os.mkfifo(path)
    return Damage(f"{path.name}: {kind}", REFUSED)
