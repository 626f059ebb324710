"""Seeded damage to the files that users bring: JSON values, safetensors headers and bytes, texts."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 7, 2**31, 2**63, 10**30, 0.0, -0.5, 1e300, float("nan"), float("inf"),
    "", "nope", "../../x", "/etc/passwd", "\ud800", "a" * 300, [], {}, [1, "x"], {"a": [1]}, [[]] * 3,
)  # fmt: skip


def json_paths(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value of a JSON document is."""
    if isinstance(data, dict):
        return [path, *(p for key, value in data.items() for p in json_paths(value, (*path, key)))]
    if isinstance(data, list):
        return [path, *(p for i, value in enumerate(data[:8]) for p in json_paths(value, (*path, i)))]
    return [path]


def mutate_json(path: Path, rng: random.Random, within: tuple[str, ...] = ()) -> str:
    """Delete, rename, exchange or add one value of a JSON file; what was done."""
    text = path.read_text(encoding="utf-8")
    if rng.random() < 0.08:
        return damage_text(path, rng)
    data = json.loads(text)
    places = [p for p in json_paths(data) if p and p[: len(within)] == within and len(p) > len(within)]
    if not places:
        return damage_text(path, rng)
    place = rng.choice(places)
    parent = data
    for key in place[:-1]:
        parent = parent[key]
    kind = rng.choice(("delete", "value", "value", "value", "duplicate", "deep"))
    if kind == "delete":
        del parent[place[-1]]
    elif kind == "value":
        parent[place[-1]] = rng.choice(ODD_VALUES)
    elif kind == "deep":
        nested: Any = 1
        for _ in range(200):
            nested = [nested]
        parent[place[-1]] = nested
    elif isinstance(parent, dict):
        parent[f"{place[-1]}_x"] = parent[place[-1]]
    else:
        parent.append(parent[place[-1]])
    path.write_text(json.dumps(data), encoding="utf-8")
    return f"{path.name}: {kind} {'.'.join(map(str, place))}"


def damage_text(path: Path, rng: random.Random) -> str:
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
    return f"{path.name}: {kind}"


def replace_by_other_kind(path: Path, rng: random.Random) -> str:
    """A folder, a link to nowhere or to itself, or no file at all in its place."""
    kind = rng.choice(("folder", "dangling", "loop", "gone", "pipe"))
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to(path.with_name("nowhere"))
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "pipe":
        import os

        os.mkfifo(path)
    return f"{path.name}: {kind}"


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the bytes behind it."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_raw(path: Path, header: Any, body: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def mutate_header(path: Path, rng: random.Random) -> str:
    """One entry of a safetensors header, or the file around it."""
    header, body = header_of(path)
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    kind = rng.choice(("dtype", "shape", "offset", "drop", "rename", "overlap", "metadata", "value", "cut", "bytes"))
    if kind == "dtype":
        entry["dtype"] = rng.choice(("F32", "F16", "BF16", "F64", "I32", "U32", "BOOL", "U8", "F8_E4M3", "C64", "X", 3))
    elif kind == "shape":
        entry["shape"] = rng.choice(([], [0], [-1], [1.5], [True], entry["shape"][::-1], [*entry["shape"], 1], "x"))
    elif kind == "offset":
        shift = rng.choice((-4, 4, 1, 10**12))
        entry["data_offsets"] = [x + shift for x in entry["data_offsets"]]
    elif kind == "drop":
        del header[name]
    elif kind == "rename":
        header[f"{name}_x"] = header.pop(name)
    elif kind == "overlap":
        entry["data_offsets"] = [0, entry["data_offsets"][1] - entry["data_offsets"][0]]
    elif kind == "metadata":
        header["__metadata__"] = rng.choice((5, [], {"a": 5}, "x", None))
    elif kind == "value":
        header[name] = rng.choice(ODD_VALUES)
    elif kind == "cut":
        body = body[: rng.randrange(len(body))]
    else:
        return damage_text(path, rng)
    write_raw(path, header, body)
    return f"{path.name}: {kind} {name}"


def mutate_values(path: Path, rng: random.Random) -> str:
    """Stored values of one tensor: NaN, Inf, all bits set, or one flipped bit."""
    header, body = header_of(path)
    name = rng.choice([key for key in header if key != "__metadata__"])
    first, last = header[name]["data_offsets"]
    data = bytearray(body)
    kind = rng.choice(("ones", "zeros", "flip"))
    if kind == "flip" and last > first:
        data[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
    else:
        data[first:last] = (b"\xff" if kind == "ones" else b"\x00") * (last - first)
    write_raw(path, header, bytes(data))
    return f"{path.name}: {kind} in {name}"


Mutation = Callable[[Path, random.Random], str]
