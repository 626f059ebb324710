"""The calibration windows of a model: its tokenizer on a data set, or ids from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calibration.memory import return_freed
from calibration.model.classes import text_config
from calibration.model.opening import load_tokenizer
from calibration.text.corpora import load_corpus
from calibration.text.crops import TokenBatches, calibration_tokens, check_tokenizer, read_tokens
from calibration.text.random_tokens import RANDOM, random_tokens


def model_tokens(
    folder: Path, config: Any, dataset: str, samples: int, seq_len: int, seed: int, trust_remote_code: bool
) -> TokenBatches:
    """Windows of ``dataset`` as the model in ``folder`` tokenizes it; of a ``.safetensors`` file the ids as they are;
    of ``random`` any ids.

    Args:
        config: of transformers; its ``vocab_size`` bounds the ids.

    Raises:
        ToolkitError: unknown or unreadable data set, text that is too short, a tokenizer that does not fit.
    """
    vocabulary = int(text_config(config).vocab_size)
    path = Path(dataset)
    if path.suffix == ".safetensors" and path.is_file():
        return read_tokens(path, samples, seq_len, vocabulary)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    check_tokenizer(tokenizer, vocabulary)
    if dataset == RANDOM:
        return random_tokens(tokenizer, samples, seq_len, seed)
    corpus = load_corpus(dataset, "calibrate")
    tokens = calibration_tokens(corpus, tokenizer, samples, seq_len, seed)
    del corpus
    return_freed()
    return tokens
