"""Small files that come from elsewhere: regular ones, of a sane size, holding what they should. One place for all."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tomllib
from pathlib import Path
from typing import Any

from calibration.errors import ToolkitError

LARGEST_JSON = 500_000_000  # bytes: the tokenizer of a large vocabulary has 30 million
DEEPEST_JSON = 64  # levels: what a config nests


def regular_file(path: Path, fix: str = "name a file") -> Path:
    """``path``, if it is a regular file (or a link to one).

    Raises:
        ToolkitError: it is missing, a folder, a pipe or a device (reading those can block or never end), or its name
            is not possible.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise ToolkitError(f"{path}: no such file", fix) from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise ToolkitError(f"{str(path)[:200]}: cannot be opened ({reason})", fix) from None
    if not stat.S_ISREG(mode):
        raise ToolkitError(f"{path}: is {_kind(mode)}, not a file", fix)
    return path


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a pipe" if stat.S_ISFIFO(mode) else "a device" if not stat.S_ISSOCK(mode) else "a socket"


def read_text(path: Path, fix: str = "name a text file", largest: int = LARGEST_JSON) -> str:
    """A regular file in UTF-8.

    Raises:
        ToolkitError: not a regular file, larger than ``largest`` bytes, unreadable, or not UTF-8.
    """
    regular_file(path, fix)
    try:
        if path.stat().st_size > largest:
            raise ToolkitError(f"{path}: {path.stat().st_size} bytes are too many for it", fix)
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ToolkitError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})", fix) from error
    except OSError as error:
        raise ToolkitError(f"{path}: cannot be read ({error.strerror})", "check its permissions") from error


def read_json(path: Path, fix: str = "fetch this file again", missing: str = "") -> dict[str, Any]:
    """A JSON object; ``missing`` is the fix where there is no such file.

    Raises:
        ToolkitError: as `read_text`, or not JSON, not an object, nested deeper than any config.
    """
    text = read_text(regular_file(path, missing or fix), fix)
    try:
        data = json.loads(text)
        too_deep = _depth(data) > DEEPEST_JSON
        if "\\ud" in text.lower():  # half a character, which nobody can print or write
            json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ToolkitError(f"{path}: not readable as JSON ({reason})", fix) from error
    if not isinstance(data, dict):
        raise ToolkitError(f"{path}: holds a {type(data).__name__}, not an object", fix)
    if too_deep:
        raise ToolkitError(f"{path}: nested too deeply", fix)
    return data


def _depth(data: Any) -> int:
    """Levels of lists and objects, counted without recursion."""
    levels, layer = 0, [data]
    while layer and levels <= DEEPEST_JSON:
        nested = [v for v in layer if isinstance(v, dict | list)]
        layer = [child for v in nested for child in (v.values() if isinstance(v, dict) else v)]
        levels += bool(nested)
    return levels


def read_toml(path: Path, fix: str = "mend the line it names") -> dict[str, Any]:
    """A TOML file.

    Raises:
        ToolkitError: as `read_text`, or not TOML.
    """
    text = read_text(path, "name a TOML file", largest=10_000_000)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ToolkitError(f"{path}: not readable as TOML ({error})", fix) from error


def inside(path: Path, folder: Path) -> bool:
    """Whether ``path`` is a regular file that lies in ``folder``, links followed. Links into the blobs of a hub cache
    (``snapshots/REVISION/x`` to ``blobs/HASH``) count as inside: that is how the cache stores every file."""
    try:
        real, home = path.resolve(strict=True), folder.resolve()
        regular = stat.S_ISREG(os.stat(real).st_mode)
    except (OSError, RuntimeError):  # RuntimeError: a link to itself
        return False
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    return regular and (real.is_relative_to(home) or (blobs is not None and real.parent == blobs))


def file_digest(path: Path) -> str:
    """sha256 of a file, in hex digits.

    Raises:
        ToolkitError: not a regular file: to read a pipe can wait for ever.
    """
    with regular_file(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
