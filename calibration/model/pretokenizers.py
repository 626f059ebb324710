"""Names that llama.cpp has for pre-tokenizers of byte-level BPE, and the steps of a tokenizer.json they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_TAIL = r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "llama-bpe": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_TAIL}",
    "qwen2": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_TAIL}",
    "tekken": rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED}*{_SMALL}+|[^\r\n\p{{L}}\p{{N}}]?{_CASED}+{_SMALL}*{_TEKKEN_TAIL}",
}
"""Pre-tokenizers of one pattern."""
WHOLE_WORDS = ("llama-bpe", "tekken")
"""Tokenizers that take a word that is a token as it is, whatever the merges say."""
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # token types of GGUF


def pre_name(pre_tokenizer: Any) -> str | None:
    """llama.cpp's name of the ``pre_tokenizer`` of a tokenizer.json, or None for one it is not known for.

    ``gpt-2`` is the built-in pattern of a ByteLevel step alone; ``smollm`` cuts single digits first.
    """
    steps = [pre_tokenizer] if pre_tokenizer and pre_tokenizer.get("type") != "Sequence" else []
    steps = steps or list((pre_tokenizer or {}).get("pretokenizers", []))
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    before, built_in = steps[:-1], steps[-1].get("use_regex", True)
    if not before:
        return "gpt-2" if built_in else None
    if len(before) > 1:
        return None
    if before[0].get("type") == "Digits" and before[0].get("individual_digits") and built_in:
        return "smollm"
    if before[0].get("type") == "Split" and not built_in and before[0].get("behavior") == "Isolated":
        pattern = before[0].get("pattern", {}).get("Regex", "")
        return next((name for name, known in PATTERNS.items() if known == pattern), None)
    return None


def pre_tokenizer(name: str) -> Any | None:
    """The ``tokenizers`` object of a name, the inverse of `pre_name`; None for a name that is not known here."""
    from tokenizers import Regex, pre_tokenizers

    if name in PATTERNS:
        split = pre_tokenizers.Split(Regex(PATTERNS[name]), "isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    return whole if name == "gpt-2" else None


def byte_level_tokenizer(keys: Mapping[str, Any]) -> Any | None:
    """The transformers tokenizer that ``tokenizer.*`` keys of a GGUF file describe; None where it is no byte-level BPE
    with a pre-tokenizer known here."""
    name = str(keys.get("tokenizer.ggml.pre", ""))
    steps = pre_tokenizer(name) if keys.get("tokenizer.ggml.model") == "gpt2" else None
    if steps is None:
        return None
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = list(keys["tokenizer.ggml.tokens"]), [int(k) for k in keys["tokenizer.ggml.token_type"]]
    vocabulary = {text: i for i, (text, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != UNUSED}
    merges = [tuple(pair.split(" ", 1)) for pair in keys.get("tokenizer.ggml.merges", [])]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=name in WHOLE_WORDS))
    tokenizer.pre_tokenizer, tokenizer.decoder = steps, decoders.ByteLevel()
    for text, kind in zip(tokens, kinds, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(text, special=kind == CONTROL, normalized=False)])
    named = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    ids = {short: keys.get(f"tokenizer.ggml.{key}_token_id") for key, short in named.items()}
    special = {f"{short}_token": tokens[int(index)] for short, index in ids.items() if index is not None}
    if keys.get("tokenizer.ggml.add_bos_token") and "bos_token" in special:
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, int(ids["bos"] or 0))]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    made.chat_template = keys.get("tokenizer.chat_template")
    return made
