"""Seeded damage to safetensors files: one entry of the header, the file around it, or stored values."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from calibration.model.headers import DTYPES
from fuzz.mutations import DONE, ODD_VALUES, REFUSED, Damage, damage_text

Parts = tuple[dict[str, Any], bytes]


def header_of(path: Path) -> Parts:
    """The header of a safetensors file, and the bytes behind it."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_raw(path: Path, header: Any, body: bytes, padding: int = 0) -> None:
    text = json.dumps(header).encode() + b" " * padding
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def mutate_file(path: Path, rng: random.Random) -> Damage:
    """Header, contents, or nothing but the layout of the file."""
    return rng.choice((mutate_header, mutate_values, mutate_values, lay_out))(path, rng)


def lay_out(path: Path, rng: random.Random) -> Damage:
    """The same tensors in another file: entries in another order, spaces behind the header, notes in its metadata, or
    the bytes of the tensors in another order."""
    header, body = header_of(path)
    kind = rng.choice(("order", "spaces", "metadata", "moved"))
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if kind == "order":
        header = {name: header[name] for name in sorted(header, key=lambda name: rng.random())}
    elif kind == "metadata":
        header["__metadata__"] = {**header.get("__metadata__", {}), "note": "x" * rng.randrange(40)}
    elif kind == "moved":
        pieces, at = [], 0
        for name in sorted(entries, key=lambda name: rng.random()):
            first, last = entries[name]["data_offsets"]
            pieces.append(body[first:last])
            entries[name]["data_offsets"] = [at, at + last - first]
            at += last - first
        body = b"".join(pieces)
    write_raw(path, header, body, padding=rng.randrange(1, 9) if kind == "spaces" else 0)
    return Damage(f"{path.name}: laid out anew ({kind})", DONE, same=True)


def mutate_header(path: Path, rng: random.Random) -> Damage:
    """One entry of a safetensors header, or the file around it."""
    header, body = header_of(path)
    name = rng.choice([key for key in header if key != "__metadata__"])
    kind = rng.choice(
        (
            "dtype",
            "shape",
            "offset",
            "drop",
            "rename",
            "overlap",
            "metadata",
            "value",
            "cut",
            "bytes",
            "exchange",
            "twice",
        )
    )
    if kind == "bytes":
        return damage_text(path, rng)
    if kind == "cut":
        write_raw(path, header, body[: rng.randrange(len(body))])
        return Damage(f"{path.name}: cut", REFUSED)
    if kind == "twice":
        text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"
        path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + body)
        return Damage(f"{path.name}: {name} twice", REFUSED)
    known = _change(header, name, kind, rng)
    write_raw(path, header, body)
    return Damage(f"{path.name}: {kind} {name}", known)


def _change(header: dict[str, Any], name: str, kind: str, rng: random.Random) -> int | None:
    """Damage to one entry; the exit code where it is certain."""
    entry = header[name]
    first, last = entry["data_offsets"]
    if kind == "dtype":
        before, entry["dtype"] = entry["dtype"], rng.choice((*DTYPES, "X", 3, None))
        return None if entry["dtype"] in (before, *_alike(before)) else REFUSED
    if kind == "shape":
        before = list(entry["shape"])
        entry["shape"] = rng.choice(([], [0], [-1], [1.5], [True], before[::-1], [*before, 1], "x"))
        return None if entry["shape"] in (before, before[::-1]) or math.prod(before) == 1 else REFUSED
    if kind == "offset":
        shift = rng.choice((-4, 4, 1, 10**12))
        entry["data_offsets"] = [first + shift, last + shift]
        return REFUSED
    if kind == "overlap":
        entry["data_offsets"] = [0, last - first]
        return REFUSED if first else DONE
    if kind == "exchange":  # two tensors of one shape: a valid file
        other = rng.choice([key for key, e in header.items() if e.get("shape") == entry["shape"]])
        header[name], header[other] = header[other], header[name]
        return None
    if kind == "metadata":
        header["__metadata__"] = rng.choice((5, [], {"a": 5}, "x"))
        return REFUSED
    if kind == "value":
        header[name] = rng.choice(ODD_VALUES)
        return REFUSED
    if kind == "rename":
        header[f"{name}_x"] = header[name]
    del header[name]
    return REFUSED


def _alike(dtype: str) -> tuple[str, ...]:
    """Dtypes of the same size that a reader may take for this one: 16-bit floats, and codes as integers."""
    groups = (("F16", "BF16"), ("I32", "U32"), ("I8", "U8"), ("I64", "U64"), ("I16", "U16"))
    return next((group for group in groups if dtype in group), ())


FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def mutate_values(path: Path, rng: random.Random) -> Damage:
    """Stored values of one tensor: NaN, Inf, zeros, one flipped bit, another scale, or anything at all."""
    header, body = header_of(path)
    name = rng.choice([key for key in header if key != "__metadata__"])
    first, last = header[name]["data_offsets"]
    dtype = FLOATS.get(header[name]["dtype"])
    data, known = bytearray(body), None
    kinds = ["ones", "zeros", "flip", "flip", "random", "repeat"]
    kinds += ["scale", "scale", "nan", "one value"] if dtype is not None else []
    kind = rng.choice(kinds)
    if kind == "flip":
        data[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
    elif kind == "random":
        data[first:last] = rng.randbytes(last - first)
    elif kind == "repeat":
        data[first:last] = (data[first : first + 4] * (last - first))[: last - first]
    elif kind in ("scale", "nan", "one value"):
        assert dtype is not None
        values = torch.frombuffer(data[first:last], dtype=dtype).clone()
        if kind == "scale":
            values *= rng.choice((-1.0, 0.5, 1e-3, 1e-30, 1e4, 1e30, 1.01))
        else:
            at = rng.randrange(len(values))
            values[at] = float("nan") if kind == "nan" else rng.choice((0.0, 1.0, -1.0, 1e4, 1e-7, 6e4))
        data[first:last] = values.view(torch.uint8).numpy().tobytes()
    else:
        data[first:last] = (b"\xff" if kind == "ones" else b"\x00") * (last - first)
    if dtype is not None and header[name]["shape"]:
        finite = torch.frombuffer(data[first:last], dtype=dtype).isfinite().all()
        known = None if finite else REFUSED
    write_raw(path, header, bytes(data))
    return Damage(f"{path.name}: {kind} in {name}", known)


Mutation = Callable[[Path, random.Random], Damage]
