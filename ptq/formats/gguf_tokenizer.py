"""The tokenizer of a checkpoint as keys of a GGUF file, or those of another GGUF file.

Byte-level BPE (``gpt2``) needs the name of its pre-tokenizer, because llama.cpp has its patterns built in: here it is
found from the pattern in ``tokenizer.json``, and a pattern without a name is refused rather than guessed. SentencePiece
(``llama``) is read from ``tokenizer.model``, whose protocol buffer is simple enough to need no package.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from calibration.errors import ToolkitError
from calibration.model.pretokenizers import pre_name

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
OTHER_FILE = "pass --metadata FROM.gguf, a file of the same model whose tokenizer is taken over"


def tokenizer_keys(folder: Path, vocabulary: int) -> dict[str, Any]:
    """``tokenizer.*`` keys of a checkpoint's tokenizer with so many rows of the embedding.

    Raises:
        ToolkitError: there is none, or llama.cpp has no name for its kind.
    """
    path, pieces = folder / "tokenizer.json", folder / "tokenizer.model"
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if pieces.is_file() and (data is None or data["model"].get("byte_fallback")):
        keys = _sentencepiece(pieces, vocabulary)
        added = _added(data)
        for index, (text, special) in added.items():
            if index < vocabulary and keys["tokenizer.ggml.token_type"][index] != BYTE:
                kind = CONTROL if special else USER_DEFINED
                kind = UNKNOWN if keys["tokenizer.ggml.token_type"][index] == UNKNOWN else kind
                keys["tokenizer.ggml.tokens"][index] = text if special else text.replace("▁", " ")
                keys["tokenizer.ggml.token_type"][index] = kind
    elif data is not None:
        keys = _byte_level(data, folder, vocabulary)
    else:
        raise ToolkitError(f"{folder}: neither tokenizer.json nor tokenizer.model in it", OTHER_FILE)
    return keys | _special_tokens(folder, keys["tokenizer.ggml.tokens"], data)


def _added(data: dict[str, Any] | None) -> dict[int, tuple[str, bool]]:
    """Added tokens by id: text, and whether they are special."""
    entries = (data or {}).get("added_tokens", [])
    return {int(entry["id"]): (str(entry["content"]), bool(entry.get("special"))) for entry in entries}


def _byte_level(data: dict[str, Any], folder: Path, vocabulary: int) -> dict[str, Any]:
    model, name = data["model"], pre_name(data.get("pre_tokenizer"))
    if model.get("type") != "BPE" or data.get("normalizer") not in (None, {"type": "NFC"}) or name is None:
        raise ToolkitError(
            f"{folder}/tokenizer.json: llama.cpp has no name known here for this kind of tokenizer", OTHER_FILE
        )
    tokens, kinds = [f"[PAD{i}]" for i in range(vocabulary)], [UNUSED] * vocabulary
    named = {index: (text, NORMAL) for text, index in model["vocab"].items()}
    named |= {i: (text, CONTROL if special else USER_DEFINED) for i, (text, special) in _added(data).items()}
    for index, (text, kind) in named.items():
        if index >= vocabulary:
            raise ToolkitError(
                f"{folder}/tokenizer.json: token {index} ('{text}') is beyond the {vocabulary} rows of the embedding",
                "the tokenizer belongs to another model: copy the right one into the folder",
            )
        tokens[index], kinds[index] = text, kind
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if not merges:
        raise ToolkitError(
            f"{folder}/tokenizer.json: no merges, without which llama.cpp reads no such file", OTHER_FILE
        )
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
    }


def _sentencepiece(path: Path, vocabulary: int) -> dict[str, Any]:
    tokens, kinds = [f"[PAD{i}]" for i in range(vocabulary)], [UNUSED] * vocabulary
    scores = [-10000.0] * vocabulary
    for index, (text, score, kind) in enumerate(_pieces(path)):
        if index < vocabulary:
            tokens[index], scores[index], kinds[index] = text, score, kind
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
    }


def _fields(data: bytes, where: Path) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of the fields of a protocol buffer message: integers, and bytes for all that has a length."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    try:
        while place < len(data):
            key = varint()
            wire = key & 7
            if wire == 0:
                yield key >> 3, varint()
                continue
            size = varint() if wire == 2 else {5: 4, 1: 8}[wire]
            if place + size > len(data):
                raise IndexError
            yield key >> 3, data[place : place + size]
            place += size
    except (IndexError, KeyError):
        raise ToolkitError(f"{where}: not a SentencePiece model", "fetch this file again") from None


def _pieces(path: Path) -> Iterator[tuple[str, float, int]]:
    """Text, score and type of every piece: field 1 of the model, whose fields are 1, 2 and 3."""
    for number, value in _fields(path.read_bytes(), path):
        if number == 1 and isinstance(value, bytes):
            piece = dict(_fields(value, path))
            text, score = piece.get(1, b""), piece.get(2, b"\0\0\0\0")
            assert isinstance(text, bytes) and isinstance(score, bytes)
            kind = piece.get(3, NORMAL)
            yield text.decode("utf-8"), struct.unpack("<f", score)[0], int(kind)


def _special_tokens(folder: Path, tokens: list[str], data: dict[str, Any] | None) -> dict[str, Any]:
    """Ids of special tokens, whether BOS and EOS are added, and the chat template."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    place = {text: index for index, text in reversed(list(enumerate(tokens)))}
    keys: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = config.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text in place:
            keys[f"tokenizer.ggml.{key}_token_id"] = place[text]
    keys["tokenizer.ggml.add_bos_token"] = _adds(config, data, "bos")
    keys["tokenizer.ggml.add_eos_token"] = _adds(config, data, "eos")
    template = folder / "chat_template.jinja"
    chat = template.read_text(encoding="utf-8") if template.is_file() else config.get("chat_template")
    if isinstance(chat, str):
        keys["tokenizer.chat_template"] = chat
    return keys


def _adds(config: dict[str, Any], data: dict[str, Any] | None, which: str) -> bool:
    """Whether the tokenizer puts this token around a text: as its post-processor does, else as its config says."""
    processor = (data or {}).get("post_processor") or {}
    steps = processor.get("processors", [processor])
    templates = [step["single"] for step in steps if step.get("type") == "TemplateProcessing"]
    if not templates:
        default = which == "bos" and data is None  # SentencePiece files of Llama's kind
        return bool(config.get(f"add_{which}_token", default))
    ends = [entry.get("SpecialToken", {}).get("id") for entry in templates[0]]
    token = config.get(f"{which}_token")
    text = token.get("content") if isinstance(token, dict) else token
    return text is not None and bool(ends) and ends[0 if which == "bos" else -1] == text
