"""A tokenizer of bytes, made without any file."""

from __future__ import annotations

from typing import Any

BOS = 256


def byte_tokenizer(bos: bool = False, max_length: int = 64) -> Any:
    """One token a byte (ids 0 .. 255 in the byte-level alphabet's order), ``<s>`` = 256; BOS in front if asked."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)} | {"<s>": BOS}
    # llama.cpp wants a merge: two bytes that no text has, in the place of one that UTF-8 has not
    first, second, unused = "Āāÿ"  # bytes 0, 1 and 255
    vocabulary[first + second] = vocabulary.pop(unused)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(first, second)]))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", model_max_length=max_length)
