"""Calibration windows: from a corpus, a tokenizer and a seed to token ids.

The calibration builders are those of GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978), with Python's own random
generator for the same crops; where the published code fails (a document of exactly one window) we are stricter.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from calibration.errors import ToolkitError
from calibration.model.checkpoint import CheckpointReader
from calibration.recorded import CalibrationFacts
from calibration.text.chats import as_text
from calibration.text.corpora import Corpus
from calibration.text.encoding import begin_with_bos, token_ids, too_short, wanted_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AWQ_SHUFFLE_SEED = 42
AWQ_LONGEST_DOCUMENT = 512
# After so many documents in a row without one that is long enough, a data set is taken to have none.
LONGEST_SEARCH = 10_000


@dataclass(frozen=True)
class TokenBatches:
    """Calibration windows.

    Attributes:
        input_ids: int64 ``[n, seq_len]``; every row is real text, there is no padding.
        source: dataset, split, revision, builder, samples, samples_asked, seq_len, seed, join, special_tokens,
            tokens, fingerprint: what a run record keeps of the calibration set.
    """

    input_ids: Tensor
    source: CalibrationFacts

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def seq_len(self) -> int:
        return self.input_ids.shape[1]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over shape and ids, first 16 hex digits; see `tokens_fingerprint`."""
        return tokens_fingerprint(self.input_ids)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """The windows in order, int64 ``[<= batch_size, seq_len]`` at a time; only the last may have fewer rows."""
        assert batch_size > 0, batch_size
        yield from self.input_ids.split(batch_size)


def tokens_fingerprint(ids: Tensor) -> str:
    """sha256 (first 16 hex digits) over the shape and the ids, int64 ``[n, seq_len]``."""
    digest = hashlib.sha256(repr(tuple(ids.shape)).encode())
    digest.update(ids.contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Refuse a tokenizer that can emit an id without an embedding row. ``vocab_size`` is the number of those rows.

    Rows without a token (padded vocabularies) are fine.

    Raises:
        ToolkitError: names the first such token, its id and how many there are.
    """
    outside = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= vocab_size)
    if outside:
        i, token = outside[0]
        raise ToolkitError(
            f"tokenizer: token {token!r} has id {i}, the model has embeddings for ids below {vocab_size} "
            f"({len(outside)} such tokens)",
            "use the tokenizer that belongs to this model, or resize the model's embeddings",
        )


def calibration_tokens(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, samples: int, seq_len: int, seed: int
) -> TokenBatches:
    """Calibration windows of a corpus, built as the literature does for it.

    ``text``: one tokenizer call, then random crops. ``documents`` (C4): a random document longer than a window, then
    a random crop of it. ``blocks`` (the Pile): the first ``samples`` short documents after a shuffle with seed 42
    (always: the published set is one fixed set, and 42 is the seed recorded), concatenated and cut; this gives fewer
    windows than asked for, and ``source`` has both numbers.

    Where the tokenizer puts BOS in front of a text, it takes the place of the first token of every window.

    Raises:
        ToolkitError: the text is not longer than one window.
    """
    assert samples > 0 and seq_len > 0, (samples, seq_len)
    corpus = as_text(corpus, tokenizer)
    if corpus.builder == "blocks":
        ids, seed = _blocks(corpus, tokenizer, samples, seq_len), AWQ_SHUFFLE_SEED
    elif corpus.builder == "documents":
        ids = _document_crops(corpus, tokenizer, samples, seq_len, random.Random(seed))
    else:
        ids = _text_crops(corpus, tokenizer, samples, seq_len, random.Random(seed))
    bos = wanted_bos(tokenizer)
    ids = begin_with_bos(ids, bos)
    source: CalibrationFacts = {
        "dataset": corpus.source,
        "split": corpus.split,
        "revision": corpus.revision,
        "builder": corpus.builder,
        "samples": ids.shape[0],
        "samples_asked": samples,
        "seq_len": seq_len,
        "seed": seed,
        "join": corpus.join,
        "special_tokens": corpus.special_tokens,
        "bos": bos is not None,
        "tokens": ids.numel(),
        "fingerprint": tokens_fingerprint(ids),
    }
    return TokenBatches(ids, source)


def read_ids(path: Path, samples: int, seq_len: int, vocab_size: int) -> Tensor:
    """Token ids of a safetensors file with ``input_ids``, an integer tensor ``[n, length]``, as int64.

    Raises:
        ToolkitError: no such tensor, fewer windows or shorter ones than asked for, ids outside the vocabulary.
    """
    with CheckpointReader.of_file(path) as file:
        info = file.infos.get("input_ids")
        if info is None or len(info.shape) != 2 or info.dtype.is_floating_point:
            raise ToolkitError(
                f"{path}: no integer tensor input_ids [n, length] in it", "store token ids there, or give a text file"
            )
        ids = file.tensor("input_ids").to(torch.int64)
    if ids.shape[0] < samples or ids.shape[1] < seq_len:
        raise ToolkitError(
            f"{path}: {ids.shape[0]} windows of {ids.shape[1]} tokens, {samples} of {seq_len} are asked for",
            f"use --samples {ids.shape[0]} --seq-len {ids.shape[1]} or less",
        )
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise ToolkitError(
            f"{path}: token ids {int(ids.min())} .. {int(ids.max())}, the model has {vocab_size}",
            "tokenize the text with this model's tokenizer",
        )
    return ids


def read_tokens(path: Path, samples: int, seq_len: int, vocab_size: int) -> TokenBatches:
    """Windows that are tokenized already: a safetensors file with ``input_ids``, an integer tensor ``[n, length]``.

    The first ``samples`` windows are taken, cut to ``seq_len`` tokens.

    Raises:
        ToolkitError: no such tensor, too few or too short windows, ids outside the vocabulary.
    """
    ids = read_ids(path, samples, seq_len, vocab_size)[:samples, :seq_len].contiguous()
    source: CalibrationFacts = {
        "dataset": path.name,
        "builder": "tokens",
        "samples": samples,
        "samples_asked": samples,
        "seq_len": seq_len,
        "tokens": ids.numel(),
        "fingerprint": tokens_fingerprint(ids),
    }
    return TokenBatches(ids, source)


def _text_crops(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, samples: int, seq_len: int, rng: random.Random
) -> Tensor:
    ids = token_ids(tokenizer, corpus.text, corpus.special_tokens)
    if len(ids) <= seq_len:  # randint(0, -1) would have no value
        raise too_short(corpus.label, len(ids), seq_len + 1)
    starts = [rng.randint(0, len(ids) - seq_len - 1) for _ in range(samples)]
    return torch.stack([ids[start : start + seq_len] for start in starts])


def _document_crops(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, samples: int, seq_len: int, rng: random.Random
) -> Tensor:
    if not corpus.rows:
        raise too_short(corpus.label, 0, seq_len + 1)
    crops: list[Tensor] = []
    lengths: dict[int, int] = {}  # of documents found too short: not tokenized again
    while len(crops) < samples:
        index = rng.randint(0, len(corpus.rows) - 1)
        if index in lengths:
            continue
        ids = token_ids(tokenizer, corpus.rows[index], corpus.special_tokens)
        if len(ids) > seq_len:
            start = rng.randint(0, len(ids) - seq_len - 1)
            crops.append(ids[start : start + seq_len].clone())
            continue
        lengths[index] = len(ids)
        if not crops and len(lengths) >= min(len(corpus.rows), LONGEST_SEARCH):
            what = f"{corpus.label}: the longest of {len(lengths)} documents"
            raise too_short(what, max(lengths.values()), seq_len + 1)
    return torch.stack(crops)


def _blocks(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, documents: int, seq_len: int) -> Tensor:
    # The permutation of `datasets.Dataset.shuffle(seed=42)`.
    order = np.random.default_rng(AWQ_SHUFFLE_SEED).permutation(len(corpus.rows))
    ids: list[int] = []
    taken = 0
    for index in order:
        document = token_ids(tokenizer, corpus.rows[int(index)].strip(), corpus.special_tokens)
        if not len(document) or len(document) > AWQ_LONGEST_DOCUMENT:
            continue
        ids.extend(document.tolist())
        taken += 1
        if taken == documents:
            break
    if len(ids) < seq_len:
        what = f"{corpus.label}: {taken} documents of at most {AWQ_LONGEST_DOCUMENT} tokens"
        raise too_short(what, len(ids), seq_len)
    blocks = len(ids) // seq_len
    return torch.tensor(ids[: blocks * seq_len], dtype=torch.int64).view(blocks, seq_len)
