"""A text as token ids, with the words and bytes each token stands for."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from calibration.errors import ToolkitError, foreign
from calibration.text.chats import as_text
from calibration.text.corpora import Corpus

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


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, special_tokens: bool) -> list[int]:
    """One text in one call, without the warning that it is longer than the model's context (it is never fed whole).

    Fast tokenizers are asked for ids alone: without offsets a large text takes half the time and less memory.
    """
    with foreign("the tokenizer refuses the text", NOT_TEXT):
        if tokenizer.is_fast:
            backend = tokenizer.backend_tokenizer
            backend.no_truncation()
            backend.no_padding()
            return list(backend.encode_batch_fast([text], add_special_tokens=special_tokens)[0].ids)
        encoded = tokenizer(text, add_special_tokens=special_tokens, return_attention_mask=False, verbose=False)
        return list(encoded["input_ids"])


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
    return ids[0] if ids and ids[0] == tokenizer.bos_token_id else None


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
    """The whole text in one tokenizer call.

    Where the tokenizer puts BOS in front of a text by default the result begins with it, and ``bos_id`` says that every
    window does: of published sets and of plain files alike. Other special tokens are added to published sets only.

    Words and bytes of a token are exact with a fast tokenizer. Others do not say where a token came from: there the
    text's words and bytes are spread evenly over its tokens.
    """
    corpus = as_text(corpus, tokenizer)
    text, bos = corpus.text, wanted_bos(tokenizer)
    special = corpus.special_tokens and bos is None
    if tokenizer.is_fast:
        # verbose=False: the warning that the text is longer than the model's context is about feeding it whole.
        with foreign(f"{corpus.label}: the tokenizer refuses the text", NOT_TEXT):
            encoded = tokenizer(
                text,
                add_special_tokens=special,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            )
        ids = encoded["input_ids"]
        ends = np.array([end for _, end in encoded["offset_mapping"]], dtype=np.int64)
        words, counts = _attribute(text, ends)
    else:
        ids = token_ids(tokenizer, text, special)
        words = np.diff(np.linspace(0, len(text.split()), len(ids) + 1).round().astype(np.int64))
        counts = np.diff(np.linspace(0, len(text.encode("utf-8")), len(ids) + 1).round().astype(np.int64))
    return EncodedText(
        ids=torch.tensor(ids, dtype=torch.int64),
        words=torch.from_numpy(words),
        bytes=torch.from_numpy(counts),
        dataset=corpus.label,
        fingerprint=corpus.fingerprint,
        join=corpus.join,
        special_tokens=special,
        max_windows=corpus.max_windows,
    ).with_bos(bos)


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
