"""Calibration windows without any language in them: what a calibration set costs that is as wrong as can be (the
nonsense sets of Paglieri et al. 2024, arXiv 2405.20835, are random punctuation)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from calibration.recorded import CalibrationFacts
from calibration.text.crops import TokenBatches, tokens_fingerprint
from calibration.text.encoding import begin_with_bos, wanted_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RANDOM = "random"
"""What ``--dataset`` says for them."""


def random_tokens(tokenizer: PreTrainedTokenizerBase, samples: int, seq_len: int, seed: int) -> TokenBatches:
    """Windows of ids drawn uniformly from the vocabulary, special tokens left out but for BOS where the tokenizer
    puts one in front of a text; int64 ``[samples, seq_len]``."""
    text = torch.tensor(sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)))
    draws = torch.randint(0, len(text), (samples, seq_len), generator=torch.Generator().manual_seed(seed))
    bos = wanted_bos(tokenizer)
    ids = begin_with_bos(text[draws], bos)
    source: CalibrationFacts = {
        "dataset": RANDOM,
        "builder": "random tokens",
        "samples": samples,
        "samples_asked": samples,
        "seq_len": seq_len,
        "seed": seed,
        "bos": bos is not None,
        "tokens": ids.numel(),
        "fingerprint": tokens_fingerprint(ids),
    }
    return TokenBatches(ids, source)
