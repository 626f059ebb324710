"""A long text in pieces that are tokenized one after the other: the same tokens, at a fraction of the memory.

A tokenizer holds about a hundred bytes for every byte of its text while it runs. Byte-level BPE first splits a text
with a pattern and looks at each part alone. All patterns known here (`calibration.model.pretokenizers`) begin a part at
a single space between two letters, wherever it stands: a letter ends what came before, and a space in front of a letter
belongs to what follows. Behind such a place the tokens do not depend on what was in front of it, and the text may be
cut there. Tokenizers of other kinds (a whole text as one word, spaces put in front, added tokens that take spaces in)
get the text whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.errors import ToolkitError
from calibration.model.pretokenizers import pre_name
from calibration.model.reading import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 1 << 18  # characters
_CUT = re.compile(r"[A-Za-z](?= [A-Za-z])")
_NORMAL_FORMS = ("NFC", "NFD", "NFKC", "NFKD")  # change no letter in front of a space


def pieces(tokenizer: PreTrainedTokenizerBase, text: str, length: int = PIECE) -> Iterator[str]:
    """``text`` cut where its tokens are the same as without the cut, every ``length`` characters or a little later;
    whole where the tokenizer is of no kind of which that is known. Joined again they are ``text``."""
    begin = 0
    if len(text) > length and tokenizer.is_fast and cuts_freely(_described(tokenizer.backend_tokenizer)):
        while found := _CUT.search(text, begin + length):
            yield text[begin : found.end()]
            begin = found.end()
    yield text[begin:]


def cuts_freely(tokenizer: Mapping[str, Any]) -> bool:
    """Whether `pieces` cuts a text for a tokenizer, given the ``normalizer``, ``pre_tokenizer`` and ``added_tokens`` of
    its tokenizer.json."""
    normalizer, added = tokenizer.get("normalizer"), tokenizer.get("added_tokens") or []
    if normalizer is not None and normalizer.get("type") not in _NORMAL_FORMS:
        return False
    takes_spaces = any(
        " " in token["content"] or token["lstrip"] or token["rstrip"] or token["single_word"] for token in added
    )
    return pre_name(tokenizer.get("pre_tokenizer")) is not None and not takes_spaces


def folder_cuts_freely(folder: Path) -> bool:
    """`cuts_freely` of a checkpoint's tokenizer, from its file; False where that cannot be told."""
    try:
        return cuts_freely(read_json(folder / "tokenizer.json"))
    except (ToolkitError, AttributeError, KeyError, TypeError):
        return False


def _described(backend: Any) -> dict[str, Any]:
    """What `cuts_freely` looks at, of a `tokenizers.Tokenizer`."""
    parts = {"normalizer": backend.normalizer, "pre_tokenizer": backend.pre_tokenizer}
    found = {name: None if part is None else json.loads(part.__getstate__()) for name, part in parts.items()}
    return {**found, "added_tokens": [_flags(token) for token in backend.get_added_tokens_decoder().values()]}


def _flags(token: Any) -> dict[str, Any]:
    return {name: getattr(token, name) for name in ("content", "lstrip", "rstrip", "single_word")}
