"""Calibration windows, tokenizers, and the words and bytes of tokens."""

from __future__ import annotations

import functools
import json
import logging
import random
from typing import Any

import numpy as np
import pytest
import torch
from byte_tokenizer import BOS, byte_tokenizer
from tokenizers import AddedToken, normalizers, pre_tokenizers

import calibration.text.encoding
from calibration.errors import ToolkitError
from calibration.model.opening import DEMO_FOLDER, load_tokenizer
from calibration.model.pretokenizers import pre_tokenizer
from calibration.text.corpora import Corpus
from calibration.text.crops import TokenBatches, calibration_tokens, check_tokenizer
from calibration.text.encoding import encode_text, token_ids, wanted_bos
from calibration.text.pieces import pieces


def corpus(text: str, special_tokens: bool = False) -> Corpus:
    return Corpus(name="t.txt", source="t.txt", rows=[text], joiner=None, special_tokens=special_tokens)


def documents(rows: list[str], builder: Any) -> Corpus:
    return Corpus(name="d", source="d", rows=rows, joiner=None, special_tokens=True, builder=builder)


# --- calibration windows -------------------------------------------------------------------------------------------


def test_text_crops_are_those_of_the_published_loop() -> None:
    text = "".join(random.Random(1).choices("abcdefgh \n", k=3000))
    tokenizer = byte_tokenizer(bos=True)
    tokens = calibration_tokens(corpus(text, special_tokens=True), tokenizer, samples=128, seq_len=256, seed=3)
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == BOS and tokens.input_ids.shape == (128, 256) and tokens.input_ids.dtype == torch.int64
    random.seed(3)
    for row in tokens.input_ids.tolist():
        i = random.randint(0, len(ids) - 256 - 1)
        assert row == [BOS, *ids[i + 1 : i + 256]]


def test_same_seed_same_windows_and_the_fingerprint_says_so() -> None:
    text = "".join(random.Random(1).choices("abcdefgh", k=1000))
    first, again, other = (calibration_tokens(corpus(text), byte_tokenizer(), 4, 32, seed) for seed in (0, 0, 1))
    assert torch.equal(first.input_ids, again.input_ids) and first.fingerprint == again.fingerprint
    assert not torch.equal(first.input_ids, other.input_ids) and first.fingerprint != other.fingerprint
    reshaped = TokenBatches(first.input_ids.view(8, 16), {})
    assert reshaped.fingerprint != first.fingerprint and len(first.fingerprint) == 16
    assert first.source == {
        "dataset": "t.txt",
        "split": "",
        "revision": "",
        "builder": "text",
        "samples": 4,
        "samples_asked": 4,
        "seq_len": 32,
        "seed": 0,
        "join": "file as it is",
        "special_tokens": False,
        "bos": False,
        "tokens": 128,
        "fingerprint": first.fingerprint,
    }
    json.dumps(first.source)


def test_batches_keep_order_and_drop_nothing() -> None:
    tokens = TokenBatches(torch.arange(28).view(7, 4), {})
    parts = list(tokens.batches(3))
    assert [len(part) for part in parts] == [3, 3, 1] and torch.equal(torch.cat(parts), tokens.input_ids)
    assert (len(tokens), tokens.seq_len) == (7, 4)


def test_document_crops_need_a_document_longer_than_a_window() -> None:
    rows = ["a" * 4, "b" * 5, "c" * 9, "d" * 30]  # with BOS: 5, 6, 10, 31 tokens; 10 is not longer than 10
    tokens = calibration_tokens(documents(rows, "documents"), byte_tokenizer(bos=True), samples=20, seq_len=10, seed=0)
    assert tokens.input_ids.shape == (20, 10)
    letter = byte_tokenizer()("d")["input_ids"][0]
    assert set(tokens.input_ids.unique().tolist()) <= {BOS, letter}

    random.seed(0)
    for row in tokens.input_ids.tolist():
        while True:
            document = byte_tokenizer(bos=True)(rows[random.randint(0, len(rows) - 1)])["input_ids"]
            if len(document) > 10:
                break
        i = random.randint(0, len(document) - 10 - 1)
        assert row == [BOS, *document[i + 1 : i + 10]]

    with pytest.raises(ToolkitError, match="longest of 4 documents: 31 tokens, one window needs 32"):
        calibration_tokens(documents(rows, "documents"), byte_tokenizer(bos=True), samples=1, seq_len=31, seed=0)


def test_blocks_are_all_tokens_over_the_block_length() -> None:
    rows = [f" {'x' * n} " for n in (511, 512, 100, 200, 300, 0)]  # 512 tokens with BOS is the longest taken
    tokens = calibration_tokens(documents(rows, "blocks"), byte_tokenizer(bos=True), samples=6, seq_len=512, seed=7)
    total = 512 + 101 + 201 + 301 + 1
    assert tokens.input_ids.shape == (total // 512, 512)
    assert (tokens.source["samples"], tokens.source["samples_asked"], tokens.source["seed"]) == (2, 6, 42)
    assert int((tokens.input_ids == BOS).sum()) >= 2 and bool((tokens.input_ids[:, 0] == BOS).all())
    with pytest.raises(ToolkitError, match=r"1 documents of at most 512 tokens: .* one window needs 512"):
        calibration_tokens(documents(["abc"], "blocks"), byte_tokenizer(), samples=6, seq_len=512, seed=0)


def test_a_text_must_be_longer_than_a_window() -> None:
    tokens = calibration_tokens(corpus("a" * 33), byte_tokenizer(), samples=2, seq_len=32, seed=0)
    assert tokens.input_ids.shape == (2, 32)
    with pytest.raises(ToolkitError, match=r"t\.txt: 32 tokens, one window needs 33") as caught:
        calibration_tokens(corpus("a" * 32), byte_tokenizer(), samples=2, seq_len=32, seed=0)
    assert "--seq-len" in caught.value.fix


# --- tokenizers ----------------------------------------------------------------------------------------------------


def test_tokens_outside_the_embedding_are_refused() -> None:
    tokenizer = byte_tokenizer()
    check_tokenizer(tokenizer, 257)
    check_tokenizer(tokenizer, 320)  # padded
    tokenizer.add_tokens(["<extra>"])
    with pytest.raises(ToolkitError, match=r"'<extra>' has id 257, .* below 257 \(1 such"):
        check_tokenizer(tokenizer, 257)


def test_bos_is_what_the_tokenizer_adds_by_default() -> None:
    assert wanted_bos(byte_tokenizer(bos=True)) == BOS
    assert wanted_bos(byte_tokenizer(bos=False)) is None


def test_a_long_text_gives_no_warning_about_its_length(caplog: pytest.LogCaptureFixture) -> None:
    import transformers

    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        encode_text(corpus("a" * 500), byte_tokenizer(max_length=64))
        calibration_tokens(corpus("a" * 500), byte_tokenizer(max_length=64), 2, 32, 0)
    transformers.utils.logging.disable_propagation()
    assert "longer than" not in caplog.text


@pytest.mark.parametrize("text", ["", " ", "a", "two  words\n\n", "  é漢字🙂 und mehr　ja\tx", "\n = T = \n a b\n"])
def test_every_word_and_byte_belongs_to_one_token(text: str) -> None:
    for bos in (False, True):
        encoded = encode_text(corpus(text, special_tokens=bos), byte_tokenizer(bos=bos))
        if len(encoded.ids):
            assert int(encoded.words.sum()) == len(text.split())
            assert int(encoded.bytes.sum()) == len(text.encode())
        assert encoded.ids.shape == encoded.words.shape == encoded.bytes.shape


def test_words_of_a_prefix() -> None:
    encoded = encode_text(corpus("ab cd ef"), byte_tokenizer())
    assert np.cumsum(encoded.words.numpy()).tolist() == [1, 1, 1, 2, 2, 2, 3, 3]


ODD_TEXT = (
    "It's 3.14,  isn't it?\n\n = Title = \n a  b\tc d\u00e9j\u00e0 vu \u6f22\u5b57 \U0001f642 x \r\n y . "
    "Z ok <s> no e\u0301 fin 12 345 ab "
)


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_long_texts_have_the_same_tokens_in_pieces(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Ids, words and bytes of every token, with cuts wherever they are possible, for all patterns known here."""
    tokenizer = load_tokenizer(DEMO_FOLDER, False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer(name)
    if name == "qwen2":
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    text = (DEMO_FOLDER / "test.txt").read_text()[:20_000] + ODD_TEXT * 40
    whole = encode_text(corpus(text, special_tokens=True), tokenizer)
    plain = tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
    cut = functools.partial(pieces, length=20)
    parts = list(cut(tokenizer, text))
    assert len(parts) > 400 and "".join(parts) == text
    monkeypatch.setattr(calibration.text.encoding, "pieces", cut)
    found = encode_text(corpus(text, special_tokens=True), tokenizer)
    assert found.ids.tolist() == plain == token_ids(tokenizer, text, True).tolist()
    assert all(torch.equal(getattr(found, part), getattr(whole, part)) for part in ("ids", "words", "bytes"))


def test_special_tokens_go_around_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration.text.encoding, "pieces", functools.partial(pieces, length=4))
    ids = token_ids(byte_tokenizer(bos=True), "one two three four", special_tokens=True)
    assert ids.tolist().count(BOS) == 1 and ids[0] == BOS and len(ids) == 19


def test_other_tokenizers_get_their_text_whole() -> None:
    text = "one two three four " * 4
    for change in (
        {"pre_tokenizer": pre_tokenizers.Metaspace()},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"normalizer": normalizers.Prepend("_")},
    ):
        tokenizer = byte_tokenizer()
        for part, value in change.items():
            setattr(tokenizer.backend_tokenizer, part, value)
        assert list(pieces(tokenizer, text, length=4)) == [text], change
    tokenizer = byte_tokenizer()
    assert len(list(pieces(tokenizer, text, length=4))) > 4
    tokenizer.add_tokens([AddedToken("two", lstrip=True)])
    assert list(pieces(tokenizer, text, length=4)) == [text]
