"""Calibration text of the model's own: oracles of its generator, whole runs, and models that cannot write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from command import done, products, refused, tiny
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from tiny_runs import edit_config, rewrite

from calibration.record import read_record
from calibration.text.generated import GREEDY, first_tokens, generate_tokens

WORDS = ("--scheme", "w4a16-g32", "--samples", "6", "--seq-len", "24", "--dataset", "generated")


def silent(_: str) -> None:
    return None


def vocabulary(*tokens: str) -> object:
    """A tokenizer with these tokens, the first of which is special."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=tokens[0]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=tokens[0])


def test_first_tokens():
    marked = vocabulary(
        "</s>", "\u0120the", "the", "\u0120", "\u0120aaa", "\u0120aab", "\u0120straße", "\u01203rd", "\u0120A"
    )
    assert first_tokens(marked) == [1, 5, 8]
    assert first_tokens(vocabulary("stop", "the", "1", "x")) == [1, 3]


def test_generated_windows():
    """Full length, distinct allowed first tokens, greedy at first, the same under a seed, no special tokens."""
    model, tokenizer = tiny_model("llama", vocab_size=260), byte_tokenizer()
    written = generate_tokens(model, tokenizer, 40, 32, 5, silent)
    ids, allowed = written.input_ids, first_tokens(tokenizer)
    assert ids.shape == (40, 32) and written.source["tokens"] == 40 * 32 and written.source["dataset"] == "generated"
    assert set(ids[:, 0].tolist()) <= set(allowed) and len(allowed) == 52
    assert len(set(ids[:, 0].tolist())) == 40
    assert not torch.isin(ids, torch.tensor(tokenizer.all_special_ids)).any()
    with torch.no_grad():
        best = model(ids, use_cache=False).logits.argmax(-1)
    agree = (ids[:, 1:] == best[:, :-1]) | (best[:, :-1] >= 256)  # no text: a new first token
    for i, row in enumerate(agree):
        assert row[: GREEDY[i % 3] - 1].all()
    assert not agree[:, 5:].all(dim=1).any(), "the rest is sampled"
    again = generate_tokens(model, tokenizer, 40, 32, 5, silent)
    other = generate_tokens(model, tokenizer, 40, 32, 6, silent)
    assert torch.equal(again.input_ids, ids) and not torch.equal(other.input_ids, ids)


def test_an_end_of_text_is_followed_by_a_new_first_token():
    model, tokenizer = tiny_model("llama", vocab_size=260), byte_tokenizer()
    with torch.no_grad():
        model.lm_head.weight[256] = 50 * model.model.norm.weight  # the special token is often the likeliest one
    ids = generate_tokens(model, tokenizer, 8, 32, 0, silent).input_ids
    with torch.no_grad():
        ended = model(ids, use_cache=False).logits.softmax(-1)[:, :-1, 256] > 0.999
    assert ended.any() and not (ids == 256).any()
    assert torch.isin(ids[:, 1:][ended], torch.tensor(first_tokens(tokenizer))).all()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("generated") / "llama")


def test_whole_runs_give_the_same_bytes(model, tmp_path):
    for name in ("one", "two"):
        out = done("quantize", model, "--method", "gptq", *WORDS, "--out", tmp_path / name)
        assert "6 x 24 tokens of generated" in out and "in memory" in out
    assert products(tmp_path / "one") == products(tmp_path / "two")
    assert read_record(tmp_path / "one").calibration["builder"] == "generated"


def test_models_that_cannot_write_are_refused_in_the_plan(tmp_path):
    words = ["--method", "gptq", *WORDS, "--dry-run"]
    headless = tiny(tmp_path / "headless")
    rewrite(headless, lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.weight"})
    message = refused("quantize", headless, *words)
    assert "has no lm_head.weight, so it cannot generate text" in message and "--dataset" in message
    judge = edit_config(tiny(tmp_path / "judge"), architectures=["LlamaForSequenceClassification"])
    assert "is a LlamaForSequenceClassification, which does not write text" in refused("quantize", judge, *words)
    numbers = tiny(tmp_path / "numbers")
    vocabulary("</s>", "1", "2").save_pretrained(numbers)
    assert "no token of the vocabulary begins a word" in refused("quantize", numbers, *words)
    done("quantize", numbers, "--method", "rtn", "--scheme", "w4a16-g32", "--dry-run")
    ids = {"input_ids": torch.randint(0, 256, (6, 24))}
    save_file(ids, tmp_path / "ids.safetensors")  # the way out: a text of one's own
    assert load_file(tmp_path / "ids.safetensors").keys() == ids.keys()
    done("quantize", numbers, "--method", "gptq", *WORDS[:-1], tmp_path / "ids.safetensors", "--dry-run")
