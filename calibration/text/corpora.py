"""Where texts come from: data sets of the Hugging Face hub, local files, and the text that comes with the toolkit.

Follows the published protocols: WikiText-2 rows are joined by a blank line (they keep their own line end), the first
1100 documents of C4's first validation shard and the sentences of the Penn Treebank by one space ("new" variants of
Frantar et al. 2022, arXiv 2210.17323), and the calibration documents of C4 and the Pile are not joined at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from calibration.errors import ToolkitError, nearest
from calibration.model.reading import regular_file
from calibration.text.hub_sets import (
    HUB_SETS,
    Builder,
    Purpose,
    check_readable,
    load_dataset,
    load_hub_split,
    text_column,
)
from calibration.text.rows import SUFFIXES, Chat, content, one_kind, read_rows

BUILTIN = "builtin"
AS_IT_IS = "file as it is"
KNOWN_NAMES = (*HUB_SETS, BUILTIN)


@dataclass(frozen=True)
class Corpus:
    """A text and everything that says which text it is.

    Attributes:
        name: as asked for (``wikitext2``) or the file's name.
        source: hub id and configuration, or the file's name.
        split: of a set that has splits, else empty. revision: the commit (40 hex digits) of a hub set, where known.
        rows: the texts of the rows; one row for a plain file.
        joiner: what `text` puts between rows; None: rows stay apart (or there is only one).
        special_tokens: whether the tokenizer adds its own (BOS ...), as the published protocols do and plain files
            do not.
        builder: how calibration windows are cut from it.
        max_windows: how many windows its scoring protocol uses at most.
        chats: conversations in place of rows, see `calibration.text.chats.as_text`, which makes rows of them.
        joined_by: how rows became one text, in words, where `joiner` does not say it.
    """

    name: str
    source: str
    rows: Sequence[str]
    joiner: str | None
    special_tokens: bool
    split: str = ""
    revision: str = ""
    builder: Builder = "text"
    max_windows: int | None = None
    chats: Sequence[Chat] = ()
    joined_by: str = ""

    @property
    def label(self) -> str:
        """``Salesforce/wikitext wikitext-2-raw-v1, test, revision b08601e04326``, or the file's name."""
        parts = [self.source, self.split, f"revision {self.revision[:12]}" if self.revision else ""]
        return ", ".join(part for part in parts if part)

    @property
    def join(self) -> str:
        """How rows became one text, for the record: ``"\\n\\n"`` or ``" "`` with quotes, else in words."""
        if self.builder == "documents":
            return "none: every window from one document"
        if self.builder == "blocks":
            return "none: tokens of documents concatenated"
        if self.joined_by:
            return self.joined_by
        return AS_IT_IS if self.joiner is None else json.dumps(self.joiner)

    @cached_property
    def text(self) -> str:
        """All rows as one text."""
        return ("" if self.joiner is None else self.joiner).join(self.rows)

    @property
    def fingerprint(self) -> str:
        """sha256 of the UTF-8 text, first 16 hex digits."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()[:16]


def check_name(name_or_path: str) -> None:
    """Refuse what is neither a known set nor an existing path, and a set whose files cannot be read here, without
    reading anything.

    Raises:
        ToolkitError: with the nearest known name, or the package to install.
    """
    if name_or_path in HUB_SETS:
        check_readable(name_or_path)
    path = Path(name_or_path)
    if name_or_path not in KNOWN_NAMES and not path.exists():
        what = "no such file:" if path.suffix or len(path.parts) > 1 else "unknown data set"
        raise ToolkitError(
            f"--dataset: {what} '{name_or_path}'",
            f"{nearest(name_or_path, KNOWN_NAMES)}use one of: {', '.join(KNOWN_NAMES)}, "
            "or the path of an existing .txt, .jsonl, .json, .csv or .parquet file",
        )


def load_corpus(name_or_path: str, purpose: Purpose, hub_root: Path | None = None) -> Corpus:
    """The text to calibrate on (train) or to score (test).

    Args:
        name_or_path: one of `KNOWN_NAMES`; or a path. A ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file is a set
            of rows (`calibration.text.rows`), texts joined by a blank line or conversations; a folder with files as a
            hub repository has them is one with a column of text; any other file is UTF-8 text, taken as it is. A known
            name wins over a file of that name: write ``./c4``.
        hub_root: folder with local copies of hub repositories (``hub_root/Salesforce/wikitext/...``), read instead
            of the hub.

    Raises:
        ToolkitError: unknown name, no such file, unreadable file, hub out of reach, no protocol for this purpose.
    """
    if name_or_path in HUB_SETS:
        return _load_hub(name_or_path, purpose, hub_root)
    if name_or_path == BUILTIN:
        split = "train" if purpose == "calibrate" else "test"
        corpus = _plain_file(Path(__file__).parents[1] / "demo" / f"{split}.txt")
        return replace(corpus, name=BUILTIN, source=BUILTIN, split=split)
    path = Path(name_or_path)
    if path.is_dir():
        return _load_folder(path, purpose)
    check_name(name_or_path)
    if path.suffix in SUFFIXES:
        return of_rows(read_rows(path), name=path.name, source=path.name)
    return _plain_file(path)


def of_rows(rows: Sequence[str | Chat], **named: Any) -> Corpus:
    """Texts, joined by a blank line, or conversations, as a corpus. Its other fields are ``named``."""
    texts = [row for row in rows if isinstance(row, str)]
    chats = [row for row in rows if not isinstance(row, str)]
    return Corpus(rows=texts, chats=chats, joiner="\n\n", special_tokens=True, **named)


def _plain_file(path: Path) -> Corpus:
    regular_file(path, "give a readable text file")
    try:
        # Bytes, not text mode: that would turn \r\n into \n, and the file is taken as it is.
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ToolkitError(
            f"{path}: not UTF-8 text (byte {error.start})", "convert it, e.g. `iconv -t utf-8`, or give a text file"
        ) from None
    except OSError as error:
        raise ToolkitError(f"{path}: {error.strerror}", "give a readable text file") from None
    return Corpus(name=path.name, source=path.name, rows=[text], joiner=None, special_tokens=False)


def _checked_rows(label: str, rows: list[Any]) -> list[str]:
    for number, row in enumerate(rows):
        if not isinstance(row, str):
            raise ToolkitError(f"{label}, row {number}: no text ({row!r})", "remove rows without text")
    return rows


def _load_hub(name: str, purpose: Purpose, hub_root: Path | None) -> Corpus:
    hub = HUB_SETS[name]
    score = purpose == "score"
    part = hub.score if score else hub.calibrate
    if part is None:
        scored = ", ".join(n for n, s in HUB_SETS.items() if s.score is not None)
        raise ToolkitError(
            f"--dataset {name}: has one split, which is for calibration; there is nothing held back to score",
            f"score on one of: {scored}, or on a text file",
        )
    rows, revision = load_hub_split(hub, part, hub_root)
    if hub.builder == "chats":
        found = one_kind([content(row, f"{hub.source}, row {number}") for number, row in enumerate(rows)], hub.source)
        return of_rows(found, name=name, source=hub.source, split=part.split, revision=revision)
    if score and hub.first_rows is not None:
        rows = rows[: hub.first_rows]
    if part.joiner is not None:
        rows = _checked_rows(hub.source, list(rows))
    return Corpus(
        name=name,
        source=hub.source,
        rows=rows,
        joiner=part.joiner,
        special_tokens=True,
        split=part.split,
        revision=revision,
        builder="text" if score else hub.builder,
        max_windows=hub.max_windows if score else None,
    )


def _load_folder(path: Path, purpose: Purpose) -> Corpus:
    split = "train" if purpose == "calibrate" else "test"
    dataset = load_dataset(str(path), str(path), {"split": split})
    rows = _checked_rows(str(path), list(text_column(dataset, str(path), ("text", "sentence"))))
    return Corpus(
        name=path.name, source=path.resolve().name, rows=rows, joiner="\n\n", special_tokens=True, split=split
    )
