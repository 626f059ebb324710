"""A tokenizer that puts BOS in front of a text: BOS in front of every window, in calibration and in scoring."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from byte_tokenizer import BOS, byte_tokenizer
from command import VOCABULARY, done, text_file
from tiny_models import save_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from calibration.record import read_record
from calibration.scoring.windows import PROTOCOLS
from calibration.text.crops import read_tokens
from calibration.text.generated import generate_tokens
from calibration.text.samples import model_tokens

WINDOW = 24


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two copies of one model; the tokenizer of one of them adds BOS. A text, and the same text as rows."""
    folder = tmp_path_factory.mktemp("bos")
    text = text_file(folder / "text.txt").read_text()
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": row * 20}) + "\n" for row in text.split("\n")))
    for name, bos in (("with", True), ("without", False)):
        save_tiny("llama", folder / name, vocab_size=VOCABULARY, intermediate_size=128)
        byte_tokenizer(bos=bos).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("dataset", ["text.txt", "rows.jsonl", "builtin", "random"])
def test_calibration(place: Path, dataset: str) -> None:
    name = str(place / dataset) if "." in dataset else dataset
    found = {}
    for folder in ("with", "without"):
        config = AutoConfig.from_pretrained(place / folder)
        found[folder] = model_tokens(place / folder, config, name, 6, WINDOW, 0, False)
    ids = found["with"].input_ids
    assert ids.shape == (6, WINDOW) and bool((ids[:, 0] == BOS).all()) and not bool((ids[:, 1:] == BOS).any())
    assert not bool((found["without"].input_ids == BOS).any())
    assert (found["with"].source["bos"], found["without"].source["bos"]) == (True, False)


def test_text_of_the_models_own(place: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "with")
    for bos in (True, False):
        tokens = generate_tokens(model, byte_tokenizer(bos=bos), 3, 12, 0, lambda _: None)
        assert tokens.input_ids.shape == (3, 12) and bool((tokens.input_ids[:, 0] == BOS).all()) == bos
        assert not bool((tokens.input_ids[:, 1:] == BOS).any())


def test_ids_of_a_file_stay_as_they_are(place: Path) -> None:
    from safetensors.torch import save_file

    ids = torch.randint(0, 256, (3, WINDOW))
    save_file({"input_ids": ids}, place / "ids.safetensors")
    assert torch.equal(read_tokens(place / "ids.safetensors", 3, WINDOW, VOCABULARY).input_ids, ids)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_eval_says_and_does_it(place: Path, protocol: str) -> None:
    words = ("--seq-len", WINDOW, "--max-windows", 3, "--protocol", protocol)
    out = {
        (folder, data): done("eval", place / folder, "--dataset", place / data, *words)
        for folder in ("with", "without")
        for data in ("text.txt", "rows.jsonl")
    }
    for (folder, _), text in out.items():
        assert ("BOS in front of every window" in text) == (folder == "with")
    last = {key: text.splitlines()[-1] for key, text in out.items()}
    assert last["with", "text.txt"] != last["without", "text.txt"]
    if protocol == "gptq":
        assert float(last["with", "text.txt"].split()[1]) == pytest.approx(_by_hand(place), rel=1e-5)


def _by_hand(place: Path) -> float:
    """Disjoint windows of the text behind BOS, their first token exchanged for BOS, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(place / "with")
    ids = torch.tensor(byte_tokenizer(bos=True)((place / "text.txt").read_text())["input_ids"])[: 3 * WINDOW]
    windows = ids.view(3, WINDOW).clone()
    windows[:, 0] = BOS
    with torch.no_grad():
        loss = model(windows, labels=windows).loss
    return float(loss.exp())


def test_a_run_records_it(place: Path) -> None:
    words = ("--method", "awq", "--scheme", "w4a16-g32", "--samples", 3, "--seq-len", WINDOW, "--eval-windows", 2)
    text = place / "text.txt"
    done("quantize", place / "with", *words, "--dataset", text, "--eval", text, "--out", place / "run")
    record = read_record(place / "run")
    assert record.calibration["bos"] is True and all(e.protocol.bos for e in record.evaluations)
    assert "BOS in front of every window" in (place / "run" / "report.md").read_text()
