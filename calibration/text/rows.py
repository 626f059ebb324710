"""Files of rows (.jsonl, .json, .csv, .parquet) and what a row says: a text, or a conversation.

A row is read by its keys: ``text``; ``messages`` (a list of ``{"role": ..., "content": ...}``); ``prompt`` with
``completion`` (texts, or lists of messages); ``instruction`` with ``output``, and ``input`` where there is one, as
Alpaca's descendants have it (the input stands behind the instruction and a blank line).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from calibration.errors import ToolkitError
from calibration.model.reading import read_text, regular_file

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
KEYS = "text, messages, prompt and completion, or instruction and output"
Message = dict[str, str]
Chat = tuple[Message, ...]
"""A conversation: messages with ``role`` and ``content``."""


def read_rows(path: Path) -> list[str | Chat]:
    """The rows of a file, all texts or all conversations.

    Raises:
        ToolkitError: not a readable file of its kind, a row without a text or conversation, or both kinds in one file.
    """
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    rows = [content(row, where) for where, row in readers[path.suffix](path)]
    return one_kind(rows, str(path))


def one_kind(rows: list[str | Chat], label: str) -> list[str | Chat]:
    """``rows``, if they are all texts or all conversations."""
    if rows and len({isinstance(row, str) for row in rows}) > 1:
        raise ToolkitError(f"{label}: some rows are texts, others conversations", "split it into two files")
    return rows


def content(row: Any, where: str) -> str | Chat:
    """The text or conversation of one row; ``where`` begins the error.

    Raises:
        ToolkitError: it has neither, or one of a wrong shape.
    """
    if isinstance(row, str):
        return row
    if not isinstance(row, Mapping):
        raise ToolkitError(f"{where}: no row with {KEYS} (found: {type(row).__name__})", 'write {"text": "..."}')
    if isinstance(row.get("text"), str):
        return str(row["text"])
    if row.get("messages") is not None:
        return _messages(row["messages"], f"{where}: messages")
    if row.get("prompt") is not None and row.get("completion") is not None:
        return (
            *_turn(row["prompt"], "user", f"{where}: prompt"),
            *_turn(row["completion"], "assistant", f"{where}: completion"),
        )
    if isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str):
        asked = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
        return ({"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]})
    found = f"keys {', '.join(map(str, row)) or 'none'}"
    raise ToolkitError(
        f"{where}: no string under the key 'text', nor a conversation (found: {found})", f"give every row {KEYS}"
    )


def _turn(value: Any, role: str, where: str) -> Chat:
    return ({"role": role, "content": value},) if isinstance(value, str) else _messages(value, where)


def _messages(value: Any, where: str) -> Chat:
    fix = 'write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ToolkitError(f"{where}: not a list of messages", fix)
    for message in value:
        whole = isinstance(message, Mapping) and all(isinstance(message.get(k), str) for k in ("role", "content"))
        if not whole:
            raise ToolkitError(f"{where}: a message without a role and a text as its content", fix)
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    regular_file(path, "give a readable .jsonl file")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
                raise ToolkitError(f"{path}, line {number}: not JSON ({error})", "one JSON object a line") from None
            if isinstance(entry, str):
                raise ToolkitError(f"{path}, line {number}: no object (found: str)", f"give every line {KEYS}")
            yield f"{path}, line {number}", entry


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    fix = "give a JSON list of rows, or write .txt for a text that is taken as it is"
    text = read_text(path, fix)
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ToolkitError(f"{path}: not JSON ({error})", fix) from None
    if not isinstance(entries, list):
        raise ToolkitError(f"{path}: holds a {type(entries).__name__}, not a list of rows", fix)
    yield from ((f"{path}, row {number}", entry) for number, entry in enumerate(entries))


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    regular_file(path, "give a readable .csv file")
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            yield from ((f"{path}, row {number}", row) for number, row in enumerate(csv.DictReader(lines)))
    except UnicodeDecodeError as error:
        raise ToolkitError(f"{path}: not UTF-8 (byte {error.start})", "convert it, e.g. `iconv -t utf-8`") from None
    except (csv.Error, OSError) as error:
        raise ToolkitError(f"{path}: not a readable .csv file ({error})", "give .jsonl") from None


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    regular_file(path, "give a readable .parquet file")
    try:
        columns = pyarrow.parquet.read_schema(path).names
        wanted = wanted_columns(columns)
        if not wanted:
            raise ToolkitError(f"{path}: no column 'text' (found: {', '.join(columns)})", f"name its columns {KEYS}")
        rows = pyarrow.parquet.read_table(path, columns=wanted).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ToolkitError(f"{path}: not a readable parquet file ({error})", "give another file") from None
    for number, row in enumerate(rows):
        if wanted == ["text"] and not isinstance(row["text"], str):
            raise ToolkitError(f"{path.name}, row {number}: no text ({row['text']!r})", "remove rows without text")
        yield f"{path}, row {number}", row


def wanted_columns(columns: Iterable[str]) -> list[str]:
    """Those of the columns that say what a row is, of the first kind that is whole; none where none is."""
    known = set(columns)
    for kind in (("text",), ("messages",), ("prompt", "completion"), ("instruction", "output")):
        if set(kind) <= known:
            return [*kind, *(["input"] if "instruction" in kind and "input" in known else [])]
    return []
