"""A text as token ids, with the words and bytes each token stands for."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from calibration.errors import ToolkitError, foreign
from calibration.text.chats import as_text
from calibration.text.corpora import Corpus
from calibration.text.pieces import pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedText:
    """One text as tokens, with what each token stands for.

    Attributes:
        ids: int64 ``[n]``.
        words, bytes: int64 ``[n]``: words that begin in a token, and its UTF-8 bytes. They sum to those of the text.
        dataset, fingerprint, join, special_tokens: as in `calibration.record.Protocol`.
        max_windows: how many windows the data set's protocol scores at most.
        bos_id: what takes the place of the first token of every window; None: nothing.
    """

    ids: Tensor
    words: Tensor
    bytes: Tensor
    dataset: str
    fingerprint: str
    join: str
    special_tokens: bool
    max_windows: int | None = None
    bos_id: int | None = None

    @classmethod
    def of_windows(cls, windows: Tensor, dataset: str) -> EncodedText:
        """Windows of ids, int64 ``[n, length]``, one behind the other; what their tokens stand for is not known."""
        ids = windows.flatten()
        none = torch.zeros_like(ids)
        digest = hashlib.sha256(ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest()[:16]
        return cls(ids, none, none, dataset, digest, "", False)

    def with_bos(self, bos_id: int | None) -> EncodedText:
        """The same text behind BOS, which stands for no words and no bytes; None: unchanged."""
        if bos_id is None:
            return self
        zero = torch.zeros(1, dtype=torch.int64)
        return dataclasses.replace(
            self,
            ids=torch.cat((zero + bos_id, self.ids)),
            words=torch.cat((zero, self.words)),
            bytes=torch.cat((zero, self.bytes)),
            special_tokens=True,
            bos_id=bos_id,
        )


NOT_TEXT = "give text without lone surrogates (half of a character such as \\ud800), and the model's own tokenizer"


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, special_tokens: bool) -> Tensor:
    """The tokens of one text, int64 ``[n]``, without the warning that it is longer than the model's context (it is
    never fed whole). Long texts are tokenized in pieces, with the same result, see `calibration.text.pieces`.

    Fast tokenizers are asked for ids alone: without offsets a large text takes half the time and less memory.
    """
    with foreign("the tokenizer refuses the text", NOT_TEXT):
        if not tokenizer.is_fast:
            encoded = tokenizer(text, add_special_tokens=special_tokens, return_attention_mask=False, verbose=False)
            return torch.tensor(encoded["input_ids"], dtype=torch.int64)
        backend = _unbounded(tokenizer)
        before, after = _around(backend) if special_tokens else ([], [])
        found = [np.array(before, dtype=np.int64)]
        for piece in pieces(tokenizer, text):
            ids = backend.encode_batch_fast([piece], add_special_tokens=False)[0].ids
            found.append(np.array(ids, dtype=np.int64))
        return torch.from_numpy(np.concatenate([*found, np.array(after, dtype=np.int64)]))


def _unbounded(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The fast tokenizer below, which cuts and pads nothing."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def _around(backend: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a fast tokenizer puts in front of a text, and behind it."""
    encoded = backend.encode("a", add_special_tokens=True)
    special = encoded.special_tokens_mask
    begin = special.index(0) if 0 in special else len(special)  # a tokenizer without a token for "a": all in front
    return list(encoded.ids[:begin]), list(encoded.ids[begin + special.count(0) :])


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """A prompt as the tokenizer gives it to the model, int64 ``[1, n]``.

    Raises:
        ToolkitError: it is not text (a lone surrogate, as the shell makes of bytes that are not UTF-8), or has no
            tokens.
    """
    with foreign("prompt: the tokenizer refuses it", NOT_TEXT):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
    if ids.shape[1] == 0:
        raise ToolkitError(f"prompt: '{prompt}' has no tokens", "give a prompt of at least one word")
    return ids


def wanted_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS id if the tokenizer puts one at the start of a text by default, else None."""
    ids = token_ids(tokenizer, "", special_tokens=True)
    return int(ids[0]) if len(ids) and ids[0] == tokenizer.bos_token_id else None


def too_short(what: str, found: int, needed: int) -> ToolkitError:
    """The error for a text that has ``found`` tokens where one window needs ``needed``."""
    return ToolkitError(
        f"{what}: {found} tokens, one window needs {needed}", "give a longer text, or a smaller --seq-len"
    )


def begin_with_bos(windows: Tensor, bos_id: int | None) -> Tensor:
    """Windows int64 ``[n, length]`` with BOS in place of their first token, which nothing predicts; None: unchanged.

    A model that has always seen BOS in front of a text takes a window without it for something else: Gemma's perplexity
    is seven times as high. The published protocols put it in front of the whole text, where one window sees it.
    """
    if bos_id is None:
        return windows
    windows = windows.clone()
    windows[:, 0] = bos_id
    return windows


def encode_text(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> EncodedText:
    """A whole text as tokens.

    Where the tokenizer puts BOS in front of a text by default the result begins with it, and ``bos_id`` says that every
    window does: of published sets and of plain files alike. Other special tokens are added to published sets only.

    Words and bytes of a token are exact with a fast tokenizer. Others do not say where a token came from: there the
    text's words and bytes are spread evenly over its tokens.
    """
    corpus = as_text(corpus, tokenizer)
    text, bos = corpus.text, wanted_bos(tokenizer)
    special = corpus.special_tokens and bos is None
    if tokenizer.is_fast:
        with foreign(f"{corpus.label}: the tokenizer refuses the text", NOT_TEXT):
            ids, words, counts = _attributed(tokenizer, text, special)
    else:
        ids = token_ids(tokenizer, text, special).numpy()
        words = np.diff(np.linspace(0, len(text.split()), len(ids) + 1).round().astype(np.int64))
        counts = np.diff(np.linspace(0, len(text.encode("utf-8")), len(ids) + 1).round().astype(np.int64))
    return EncodedText(
        ids=torch.from_numpy(ids),
        words=torch.from_numpy(words),
        bytes=torch.from_numpy(counts),
        dataset=corpus.label,
        fingerprint=corpus.fingerprint,
        join=corpus.join,
        special_tokens=special,
        max_windows=corpus.max_windows,
    ).with_bos(bos)


def _attributed(
    tokenizer: PreTrainedTokenizerBase, text: str, special: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, words and bytes of the tokens of a text, int64 ``[n]`` each, by a fast tokenizer."""
    backend = _unbounded(tokenizer)
    before, after = _around(backend) if special else ([], [])
    columns = []
    for piece in pieces(tokenizer, text):
        encoded = backend.encode_batch([piece], add_special_tokens=False)[0]
        ends = np.fromiter((end for _, end in encoded.offsets), dtype=np.int64, count=len(encoded.offsets))
        columns.append((np.array(encoded.ids, dtype=np.int64), *_attribute(piece, ends)))
    ids, words, counts = (np.concatenate(column) for column in zip(*columns, strict=True))
    around = (len(before), len(after))
    ids = np.concatenate([np.array(before, dtype=np.int64), ids, np.array(after, dtype=np.int64)])
    return ids, np.pad(words, around), np.pad(counts, around)


def _attribute(text: str, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Word beginnings and bytes of each token, int64 ``[n]`` each, from the character where each token ends, ``[n]``.

    A token gets every character after the previous token's end, so that characters that belong to no token (spaces a
    tokenizer drops) or to two (one character in several byte tokens) are counted once. Special tokens end at 0.
    """
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    spaces = np.array([point for point in np.unique(points) if chr(point).isspace()], dtype=np.uint32)
    is_space = np.isin(points, spaces)
    begins = ~is_space & np.concatenate(([True], is_space[:-1])) if len(points) else is_space
    ends = np.maximum.accumulate(ends)
    if len(ends):
        ends[-1] = len(points)  # trailing characters that no token covers
    edges = np.concatenate(([0], ends))
    return tuple(np.diff(np.concatenate(([0], np.cumsum(values)))[edges]) for values in (begins, sizes))  # type: ignore[return-value]
