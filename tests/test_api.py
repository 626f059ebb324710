"""The Python API: what it names, what it takes, and that it does what the command line does."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from command import done, environment, products, text_file, tiny
from transformers import AutoModelForCausalLM

import ptq
from sparsity.files import load_sparsity

FUNCTIONS = [name for name in ptq.__all__ if not inspect.isclass(getattr(ptq, name))]
FEW = {"samples": 8, "seq_len": 32}
WORDS = ("--samples", "8", "--seq-len", "32")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("api")


@pytest.fixture(scope="module")
def text(place):
    return text_file(place / "text.txt")


@pytest.fixture(scope="module")
def llama(place):
    return tiny(place / "llama")


@pytest.fixture(scope="module")
def sparse(place, llama, text):
    ptq.sparsify(llama, method="scap", target=0.6, out=place / "sparse", dataset=text, samples=40, seq_len=32)
    return place / "sparse"


def test_import_is_instant_and_names_everything():
    code = (
        "import sys, ptq; print(dir(ptq)); print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment()).stdout
    names, loaded = out.splitlines()
    assert loaded == "[]" and all(f"'{name}'" in names for name in FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_keyword_is_named_and_typed(name):
    function = getattr(ptq, name)
    parameters = inspect.signature(function).parameters.values()
    assert all(p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)
    assert all(p.annotation not in (p.empty, "Any") for p in parameters)
    assert "Raises:" in function.__doc__


def test_quantize_writes_what_the_command_writes(llama, text, tmp_path):
    words = ("--method", "awq+scap", "--target", "0.4", "--scheme", "w4a16-g32", "--dataset", text)
    done("quantize", llama, *words, "--samples", "40", "--seq-len", "32", "--out", tmp_path / "command")
    command = json.loads((tmp_path / "command" / "report.json").read_text())["recipe"]["command"]
    record = ptq.quantize(
        llama,
        method="awq+scap",
        target=0.4,
        scheme="w4a16-g32",
        dataset=text,
        samples=40,
        seq_len=32,
        out=tmp_path / "python",
        command=command,
    )
    assert products(tmp_path / "python") == products(tmp_path / "command")
    assert record.recipe["method"] == "awq+rtn+scap" and len(repr(record)) < 1000


def test_sparsify_writes_what_the_command_writes(llama, sparse, text, tmp_path):
    words = ("--method", "scap", "--target", "0.6", "--dataset", text, "--samples", "40", "--seq-len", "32")
    done("sparsify", llama, *words, "--out", tmp_path / "command")
    assert products(tmp_path / "command") == products(sparse)


def test_evaluate_gives_the_number_of_the_command(llama, sparse, text):
    def printed(*words):
        return done("eval", *words, "--dataset", text, "--seq-len", "32").splitlines()[-1]

    def found(model, **options):
        return f"perplexity {ptq.evaluate(model, dataset=text, seq_len=32, **options).perplexity:.4f}"

    assert found(sparse) == printed(sparse) != found(llama)
    assert found(sparse, sparse=False) == printed(sparse, "--dense") == found(llama)
    result = ptq.evaluate(sparse, dataset=text, seq_len=32, reference=llama)
    assert "scap 0.6, masks on all positions but the first" in result.path
    assert 0.1 < result.weights_skipped < 0.7 and result.divergence.kl_mean > 0


def test_a_sparsified_demo_is_scored_on_its_own_text(tmp_path):
    ptq.sparsify("demo", method="cats", out=tmp_path / "sparse", samples=40, seq_len=32)
    again = ptq.sparsify(tmp_path / "sparse", method="cats", out=tmp_path / "again", samples=40, seq_len=32)
    assert again.model == {"name": "sparse", "source": "demo"}
    result = ptq.evaluate(tmp_path / "again", seq_len=256, max_windows=4, protocol="decode")
    assert result.protocol.dataset == "builtin, test" and "decode only" in result.path


def test_loading_attaches_thresholds_and_says_so(llama, sparse):
    assert ptq.load_model(llama).path == ptq.load_model(sparse, sparse=False).path == "float"
    masked = ptq.load_model(sparse)
    assert "masks on all positions but the first" in masked.path
    decoding = ptq.load_model(sparse, sparse="decode", dtype="float32")
    assert decoding.path.endswith("decoding sparsely")
    said = ptq.generate(sparse, "the history of", max_new_tokens=6, dtype="float32")
    assert (
        said.linears == decoding.path and said.text == ptq.generate(decoding, "the history of", max_new_tokens=6).text
    )
    assert ptq.generate(sparse, "a b", max_new_tokens=2, sparse=False).linears == "float"
    with pytest.raises(ptq.ToolkitError, match="did you mean 'masks'"):
        ptq.load_model(sparse, sparse="mask")


@torch.no_grad()
def test_masks_prune_behind_a_key_value_cache(sparse):
    """Token by token, as in one pass: with a cache, the second token is no first one."""
    model = ptq.load_model(sparse).model
    ids = torch.randint(0, 200, (1, 12), generator=torch.Generator().manual_seed(1))
    whole, cache, pieces = model(ids, use_cache=False).logits, None, []
    for part in ids.split(3, dim=1):
        out = model(ids if part is None else part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-4 * float(whole.abs().max()))


def test_a_sparsified_model_is_not_quantized(sparse, text, tmp_path):
    for call in (ptq.quantize, ptq.study_sensitivity):
        with pytest.raises(ptq.ToolkitError, match="has activation thresholds"):
            call(
                sparse, out=tmp_path / "out", dataset=text, **FEW, **({"method": "rtn"} if call is ptq.quantize else {})
            )
    assert not list(tmp_path.iterdir())


def test_a_model_in_memory(llama, text, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama, dtype="auto")
    options = {"method": "gptq", "scheme": "w4a16-g32", "dataset": text, **FEW}
    ptq.quantize(model, tokenizer=byte_tokenizer(), out=tmp_path / "memory", **options)
    ptq.quantize(llama, out=tmp_path / "folder", **options)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("memory", "folder")]
    assert weights[0] == weights[1]
    scored = ptq.evaluate(model, tokenizer=byte_tokenizer(), reference=llama, dataset=text, seq_len=32)
    assert scored.divergence.kl_mean == 0
    assert ptq.generate(model, "a b", tokenizer=byte_tokenizer(), max_new_tokens=2).new_tokens > 0
    with pytest.raises(ptq.ToolkitError, match="without its tokenizer"):
        ptq.quantize(model, method="rtn", out=tmp_path / "none")
    with pytest.raises(ptq.ToolkitError, match="has its own"):
        ptq.quantize(llama, tokenizer=byte_tokenizer(), method="rtn", out=tmp_path / "none")


def test_texts_in_memory(llama, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [f"row {i} says {i * i % 97} and nothing else" for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    table = datasets.Dataset.from_dict({"number": list(range(60)), "text": rows})
    ids = torch.randint(0, 200, (10, 40), generator=torch.Generator().manual_seed(2))

    def calibrated(dataset, name):
        options = {"method": "gptq", "scheme": "w4a16-g32", **FEW}
        return ptq.quantize(llama, dataset=dataset, out=tmp_path / name, **options).calibration["fingerprint"]

    of_file = calibrated(tmp_path / "rows.jsonl", "file")
    assert of_file == calibrated(rows, "rows") == calibrated(table, "table") != calibrated(ids, "ids")
    scored = ptq.evaluate(llama, dataset=rows, seq_len=32)
    assert scored.perplexity == ptq.evaluate(llama, dataset=table, seq_len=32).perplexity
    assert ptq.evaluate(llama, dataset=ids, seq_len=40).protocol.tokens_scored == 10 * 39
    for wrong in ([], [1, 2], torch.ones(3, 3), torch.ones(5, dtype=torch.long), 7, table.remove_columns("text")):
        with pytest.raises(ptq.ToolkitError, match="dataset: "):
            ptq.evaluate(llama, dataset=wrong, seq_len=32)
    with pytest.raises(ptq.ToolkitError, match="windows of one text"):
        ptq.evaluate(llama, dataset=ids, seq_len=32, protocol="hf-stride")


def test_a_cut_window_is_told_and_progress_is_a_callback(llama, text, tmp_path):
    """The tiny model takes 64 tokens."""

    def told(call, **options):
        seen = []
        call(llama, **options, seq_len=80, progress=lambda *step: seen.append(step))
        stages = {(name, total) for name, done, total, _ in seen if name != "note" and done == total}
        assert stages or call is ptq.evaluate
        return [detail for name, _, _, detail in seen if name == "note"]

    few = {"dataset": text, "samples": 4}
    note = "--seq-len 80 is longer than the model's context: cut to 64"
    assert told(ptq.quantize, method="gptq", scheme="w4a16-g32", out=tmp_path / "q", **few) == [note]
    assert told(ptq.sparsify, method="scap", out=tmp_path / "s", **{**few, "samples": 20}) == [note]
    assert told(ptq.analyze, out=tmp_path / "a", **few) == [note]
    assert told(ptq.study_sensitivity, schemes=["w4a16-g32"], out=tmp_path / "w", **few) == [note]
    assert told(ptq.fit, bpw=4.5, schemes=["w4a16-g32", "w3a16-g32"], **few) == [note]
    assert told(ptq.evaluate, dataset=text) == [note]


def test_results_print_well(llama, sparse, text):
    score = ptq.evaluate(llama, dataset=text, seq_len=32)
    for result in (
        score,
        ptq.plan(llama, method="rtn", scheme="w4a16-g32"),
        load_sparsity(sparse),
        ptq.load_model(llama),
    ):
        assert 3 < len(str(result).splitlines()) < 16 and repr(result) == str(result)
        assert result._repr_html_().count("<tr>") == len(str(result).splitlines()) - 1
    assert f"{score.perplexity:.4f}" in str(score)
    table = Path(__file__).parent.parent / "benchmarks" / "demo_gptq.csv"
    found = ptq.predict([table], params=1.77e6, tokens=7.86e6, bits=[3])
    assert "block 0" in str(ptq.inspect(llama)) and "3 bits" in str(found)
