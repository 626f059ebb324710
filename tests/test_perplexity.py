"""Perplexity protocols against the identities they must satisfy, on toy models."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from byte_tokenizer import BOS, byte_tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot
from toy_models import V, bigram, encoded, random_text

from calibration.errors import ToolkitError
from calibration.scoring.perplexity import score
from calibration.scoring.windows import PROTOCOLS, Scoring, batches, cut_windows
from calibration.text.corpora import Corpus
from calibration.text.encoding import encode_text


def uniform(ids: Tensor) -> Tensor:
    return torch.full((*ids.shape, V), 1.5)


def oracle(ids: Tensor) -> Tensor:
    return 1e4 * one_hot(ids.roll(-1, 1), V).float()


SCORINGS = [
    Scoring("gptq", 32),
    Scoring("hf-stride", 32),
    Scoring("hf-stride", 32, stride=5),
    Scoring("hf-stride", 32, stride=32),
    Scoring("llama.cpp", 32),
]


@pytest.mark.parametrize("scoring", SCORINGS, ids=str)
def test_uniform_and_perfect_models(scoring: Scoring) -> None:
    text = random_text(5 * 32 + 7)
    assert score(uniform, text, scoring).perplexity == pytest.approx(V, rel=1e-6)
    assert score(oracle, text, scoring).perplexity == 1.0


def test_gptq_is_the_published_formula_with_and_without_its_factor() -> None:
    text, length, model = random_text(5 * 32 + 7), 32, bigram()
    result = score(model, text, Scoring("gptq", length))
    windows = text.ids[: 5 * length].view(5, length)
    losses = [cross_entropy(model(w[None])[0, :-1], w[1:]).item() for w in windows]
    assert result.perplexity == pytest.approx(math.exp(sum(x * length for x in losses) / (5 * length)), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-6)
    assert result.protocol.tokens_scored == 5 * (length - 1)
    assert result.nll == pytest.approx(sum(losses) * (length - 1), rel=1e-6)


@pytest.mark.parametrize("scoring", SCORINGS, ids=str)
def test_batching_and_chunking_change_nothing(scoring: Scoring, monkeypatch: pytest.MonkeyPatch) -> None:
    text, model, other = random_text(5 * 32 + 7), bigram(), bigram(1)
    one = score(model, text, scoring, reference_fn=other)
    for size, elements in ((3, 1 << 24), (64, V * 7), (1, 1)):
        monkeypatch.setattr("calibration.scoring.perplexity.CHUNK_ELEMENTS", elements)
        many = score(model, text, dataclasses.replace(scoring, batch_size=size), reference_fn=other)
        assert many.protocol == one.protocol and (many.words, many.bytes) == (one.words, one.bytes)
        assert many.perplexity == pytest.approx(one.perplexity, rel=1e-6)
        assert many.divergence is not None and one.divergence is not None
        assert dataclasses.astuple(many.divergence) == pytest.approx(dataclasses.astuple(one.divergence), rel=1e-5)


def test_hf_stride_of_one_window_is_gptq_without_a_tail() -> None:
    text, model = random_text(5 * 32), bigram()
    assert score(model, text, Scoring("hf-stride", 32, stride=32)).nll == pytest.approx(
        score(model, text, Scoring("gptq", 32)).nll, rel=1e-6
    )


@pytest.mark.parametrize(("n", "stride"), [(160, 32), (167, 32), (167, 16), (167, 1), (167, 31), (161, 32), (32, 16)])
def test_hf_stride_scores_every_token_once_with_the_guides_labels(n: int, stride: int) -> None:
    windows = cut_windows(Scoring("hf-stride", 32, stride=stride), n)
    targets = [t for w in windows for t in range(w.start + w.first, w.stop)]
    # The guide's loop: labels before the last `new` tokens are -100, and the shift drops the first label.
    expected, previous = [], 0
    for begin in range(0, n, stride):
        end = min(begin + 32, n)
        new = end - previous
        expected += [t for t in range(begin, end) if t >= end - new and t > begin]
        previous = end
        if end == n:
            break
    assert targets == expected and len(set(targets)) == len(targets)
    if stride < 32:
        assert targets == list(range(1, n))


def test_llama_cpp_scores_the_second_half_behind_bos() -> None:
    seen: list[Tensor] = []

    def model(ids: Tensor) -> Tensor:
        seen.append(ids.clone())
        return bigram()(ids)

    text = random_text(3 * 512 + 100)
    result = score(model, dataclasses.replace(text, bos_id=9), Scoring("llama.cpp", 512))
    assert result.protocol.tokens_scored == 3 * 255
    assert all(
        ids[0, 0] == 9 and torch.equal(ids[0, 1:], text.ids[i * 512 + 1 : (i + 1) * 512]) for i, ids in enumerate(seen)
    )
    first = seen[0]
    losses = cross_entropy(bigram()(first)[0, 256:511], first[0, 257:], reduction="sum")
    only = score(bigram(), dataclasses.replace(text, bos_id=9), Scoring("llama.cpp", 512, max_windows=1))
    assert only.nll == pytest.approx(losses.item(), rel=1e-6)
    assert text.ids[0] != 9, "the text itself must stay as it was"


def test_special_token_rules() -> None:
    tokenizer = byte_tokenizer(bos=True)
    plain = Corpus("t.txt", "t.txt", ["abc def"], None, special_tokens=False)
    published = dataclasses.replace(plain, joiner="\n\n", special_tokens=True)
    for corpus in (plain, published):
        found = encode_text(corpus, tokenizer)
        assert (int(found.ids[0]), found.bos_id, found.special_tokens) == (BOS, BOS, True)
        assert found.words[0] == found.bytes[0] == 0 and len(found.ids) == 8
        none = encode_text(corpus, byte_tokenizer(bos=False))
        assert none.bos_id is None and len(none.ids) == 7 and BOS not in none.ids


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_window_begins_with_bos_where_the_tokenizer_adds_one(protocol: str, published: bool) -> None:
    """The same tokens are scored as without BOS, and each window's model input differs in its first token only."""
    corpus = Corpus("t.txt", "t.txt", ["ab cd " * 40], None, special_tokens=published)
    inputs: dict[bool, list[Tensor]] = {True: [], False: []}
    found = {}
    for bos in (True, False):

        def model(ids: Tensor, seen: list[Tensor] = inputs[bos]) -> Tensor:
            seen.extend(ids)
            return bigram(vocabulary=257)(ids)

        found[bos] = score(model, encode_text(corpus, byte_tokenizer(bos=bos)), Scoring(protocol, 48))
        assert found[bos].protocol.bos == bos and found[bos].windows == len(inputs[bos])
    text = encode_text(corpus, byte_tokenizer(bos=True)).ids
    starts = [w.start for w in cut_windows(Scoring(protocol, 48), len(text))]
    assert len(starts) > 2
    for start, row in zip(starts, inputs[True], strict=True):
        assert row[0] == BOS and torch.equal(row[1:], text[start + 1 : start + len(row)])
    assert not any(BOS in row for row in inputs[False])
    assert found[True].protocol.differences(found[False].protocol)["bos"] == (True, False)


def test_derived_metrics_agree() -> None:
    text = "".join(np.random.default_rng(0).choice(list("ab é\n漢"), 400))
    corpus = Corpus("t.txt", "t.txt", [text], None, special_tokens=False)
    model = bigram(vocabulary=257)
    result = score(model, encode_text(corpus, byte_tokenizer()), Scoring("gptq", 64))
    word_perplexity = math.exp(result.nll / result.words)
    bits_per_byte = result.nll / (result.bytes * math.log(2))
    assert bits_per_byte * result.bytes * math.log(2) == pytest.approx(result.nll)
    assert math.log(word_perplexity) * result.words == pytest.approx(result.nll)
    assert math.log(result.perplexity) * result.protocol.tokens_scored == pytest.approx(result.nll)
    # One token a byte, but a token's bytes are those of the character it completes first.
    assert abs(result.bytes - result.protocol.tokens_scored) < 3 * (len(text.encode()) // 64)
    assert 0 < result.words <= len(text.split())


def test_the_protocol_says_everything() -> None:
    corpus = Corpus("t.txt", "t.txt", ["ab cd " * 40], None, special_tokens=False)
    evaluation = score(
        bigram(vocabulary=257),
        encode_text(corpus, byte_tokenizer()),
        Scoring("gptq", 64, dtype="bfloat16"),
        model="quantized",
        path="reference x 42",
    )
    assert dataclasses.asdict(evaluation.protocol) == {
        "name": "gptq",
        "dataset": "t.txt",
        "text_fingerprint": corpus.fingerprint,
        "join": "file as it is",
        "special_tokens": False,
        "window": 64,
        "stride": 64,
        "tokens_scored": 3 * 63,
        "dtype": "bfloat16",
        "bos": False,
    }
    assert evaluation.windows == 3
    assert (evaluation.model, evaluation.path, evaluation.divergence) == ("quantized", "reference x 42", None)


def test_a_bigram_text_costs_its_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(8, 8, generator=generator)
    p = table.softmax(-1)
    ids = [0]
    for _ in range(20_000):
        ids.append(int(torch.multinomial(p[ids[-1]], 1, generator=generator)))
    stationary = torch.linalg.matrix_power(p.double(), 200)[0]
    entropy = float(-(stationary[:, None] * p.double() * p.double().log()).sum())
    result = score(lambda x: table[x], encoded(torch.tensor(ids)), Scoring("gptq", 1000))
    assert math.log(result.perplexity) == pytest.approx(entropy, abs=4 * 0.8 / math.sqrt(20_000))


# --- errors, limits, progress --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message", "fix"),
    [
        ({"protocol": "gtpq"}, "unknown value 'gtpq'", "did you mean 'gptq'"),
        ({"window": 1}, "no token to score", "at least 2"),
        ({"protocol": "llama.cpp", "window": 2}, "no token to score", "at least 3"),
        ({"window": 32, "stride": 16}, "do not overlap", "hf-stride"),
        ({"protocol": "hf-stride", "window": 32, "stride": 33}, "outside 1 .. 32", "use 16"),
        ({"protocol": "hf-stride", "window": 32, "stride": 0}, "outside 1 .. 32", "use 16"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], message: str, fix: str) -> None:
    with pytest.raises(ToolkitError, match=message) as caught:
        Scoring(**arguments)
    assert fix in caught.value.fix


@pytest.mark.parametrize("protocol", ["gptq", "hf-stride", "llama.cpp"])
def test_a_text_shorter_than_a_window(protocol: str) -> None:
    with pytest.raises(ToolkitError, match="toy: 31 tokens, one window needs 32"):
        score(uniform, random_text(31), Scoring(protocol, 32))
    assert score(uniform, random_text(32), Scoring(protocol, 32)).protocol.tokens_scored > 0


def test_a_model_that_overflows_is_refused() -> None:
    with pytest.raises(ToolkitError, match="model 'quantized': the loss of the window at token 0 is nan"):
        score(lambda ids: uniform(ids) * math.nan, random_text(64), Scoring("gptq", 32), model="quantized")


def test_window_limits_and_progress() -> None:
    seen: list[tuple[int, int]] = []
    text = dataclasses.replace(random_text(10 * 32), max_windows=7)
    scoring = Scoring("gptq", 32, batch_size=3)
    result = score(uniform, text, scoring, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 7), (3, 7), (6, 7), (7, 7)] and result.protocol.tokens_scored == 7 * 31
    fewer = score(uniform, text, dataclasses.replace(scoring, max_windows=2))
    assert fewer.protocol.tokens_scored == 2 * 31
    assert (fewer.words, fewer.bytes) == (2 * 31, 3 * 2 * 31)


def test_batches_hold_windows_of_one_length() -> None:
    windows = cut_windows(Scoring("hf-stride", 32, stride=16), 167)
    grouped = list(batches(windows, 4))
    assert [w for batch in grouped for w in batch] == windows
    assert all(len({w.length for w in batch}) == 1 and len(batch) <= 4 for batch in grouped)
