"""Whole runs of the command on tiny checkpoints and on the demo."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from command import done, process, refused, run_ptq, text_file, tiny

from calibration.model.checkpoint import CheckpointReader
from calibration.record import read_record, read_timings
from ptq.formats.reading import read_linear
from ptq.formats.registry import FORMATS, format_of
from ptq.methods import COMBINATIONS, METHODS
from ptq.quantized import QuantizedTensor
from sparsity.methods import METHODS as SPARSIFIERS

FAST = ("--samples", "3", "--seq-len", "24", "--scheme", "w4a16-g32")
LAST_LINE = re.compile(r"perplexity \d+\.\d{4}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and two models."""
    folder = tmp_path_factory.mktemp("cli")
    text_file(folder / "text.txt")
    tiny(folder / "llama", intermediate_size=128)  # shapes that every format can hold
    tiny(folder / "gpt2", "gpt2")
    return folder


@pytest.fixture(scope="module")
def runs(place: Path) -> dict[str, Path]:
    """Finished runs: one per method, and AWQ with an evaluation."""
    made = {}
    for method in ("rtn", "gptq", "awq", "awq+gptq"):
        extra = ["--eval", place / "text.txt"] if method == "awq" else []
        made[method] = place / f"run-{method}"
        words = ["--method", method, "--dataset", place / "text.txt", *FAST, "--out", made[method], *extra]
        out = done("quantize", place / "llama", *words)
        assert "quantized 14 linears to 4.5000 bits per weight" in out and "read back and compared: 14" in out
        assert "left in float: 3 tensors outside the blocks" in out
    return made


def codes(folder: Path) -> dict[str, QuantizedTensor]:
    with CheckpointReader(folder) as reader:
        fmt = format_of(reader.config)
        schemes = fmt.schemes(reader.config, reader.infos, reader.tensor)
        return {name: read_linear(reader, fmt, name, scheme, shape) for name, (scheme, shape) in schemes.items()}


def assert_same_codes(a: dict[str, QuantizedTensor], b: dict[str, QuantizedTensor]) -> None:
    assert a.keys() == b.keys() and a
    for name, one in a.items():
        two = b[name]
        assert torch.equal(one.codes, two.codes) and torch.equal(one.scale, two.scale), name
        assert (one.zero is None) == (two.zero is None), name
        assert one.zero is None or two.zero is None or torch.equal(one.zero, two.zero), name


def test_a_run_leaves_a_checkpoint_and_reports(runs):
    folder = runs["awq"]
    names = {p.name for p in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert names >= {"generation_config.json", "report.json", "report.md", "report.html", "timings.json"}
    assert not [n for n in names if n.endswith((".tmp", ".part")) or n == "blocks"]
    record = read_record(folder)
    assert record.recipe["method"] == "awq+rtn" and record.result["format"] == "compressed-tensors"
    assert len(record.linears) == 14 and [e.model for e in record.evaluations] == ["float", "quantized"]
    assert record.calibration["samples"] == 3 and record.calibration["seq_len"] == 24
    assert "--out DIR" in record.recipe["command"]
    page = (folder / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html") and "<svg" in page
    assert not re.search(r"(src|href)=.https?:", page), "opens without network"
    for name in ("report.md", "README.md", "report.html"):
        shown = [float(number) for number in re.findall(r"\d+\.\d+", (folder / name).read_text())]
        assert any(number == pytest.approx(record.evaluations[1].perplexity, rel=5e-4) for number in shown), name
    timings = read_timings(folder)
    assert timings.seconds > 0 and timings.peak_rss_bytes >= timings.base_rss_bytes > 0
    assert read_record(runs["gptq"]).recipe["method"] == "gptq" and read_record(runs["rtn"]).calibration == {}


def test_methods_differ(runs):
    found = [codes(folder) for folder in runs.values()]
    name = next(iter(found[0]))
    for i, one in enumerate(found):
        for two in found[i + 1 :]:
            assert not torch.equal(one[name].codes, two[name].codes)


def test_eval_prints_and_writes_the_same_numbers(place, runs):
    text, sink = place / "text.txt", place / "score.json"
    out = done("eval", runs["awq"], "--dataset", text, "--seq-len", 24, "--reference", place / "llama", "--json", sink)
    last = out.splitlines()[-1]
    assert LAST_LINE.fullmatch(last) and "KL mean" in out and "top-1 agreement" in out and "rows joined by" in out
    data = json.loads(sink.read_text())
    (entry,) = data["evaluations"]
    assert f"perplexity {entry['perplexity']:.4f}" == last
    recorded = read_record(runs["awq"]).evaluations[1]
    assert entry["perplexity"] == pytest.approx(recorded.perplexity, rel=1e-6)
    plain = done("eval", place / "llama", "--dataset", text, "--seq-len", 24).splitlines()
    assert f"perplexity {entry['divergence']['reference_perplexity']:.4f}" == plain[-1]


@pytest.mark.parametrize("protocol", ["gptq", "llama.cpp", "hf-stride"])
def test_eval_protocols_and_cut_windows(place, runs, protocol):
    stride = ["--stride", 16] if protocol == "hf-stride" else []
    result = run_ptq("eval", runs["rtn"], "--dataset", place / "text.txt", "--protocol", protocol, *stride)
    assert LAST_LINE.fullmatch(result.out.splitlines()[-1]), result.err
    assert "--seq-len 2048 is longer than the model's context: cut to 64" in result.err
    assert f"protocol {protocol}, window 64, stride {16 if stride else 64}" in result.out


def test_compare(place, runs):
    text = place / "text.txt"
    for name, window in (("a", 24), ("b", 24), ("c", 32)):
        sink = ("--json", place / f"{name}.json")
        done("eval", place / "llama", "--dataset", text, "--seq-len", window, *sink)
    table = done("compare", place / "a.json", place / "b.json", runs["awq"])
    assert "| a" in table and "| b" in table and "run-awq" in table
    message = refused("compare", place / "a.json", place / "c.json")
    assert "different protocols" in message and "window" in message
    assert "no evaluation" in refused("compare", runs["rtn"], runs["awq"])


def test_generate(runs):
    out = done("generate", runs["gptq"], "--prompt", "12 and", "--max-new-tokens", 5, "--dtype", "float32")
    assert out.startswith("12 and") and "[5 tokens" in out and "tokens/s" in out
    assert (
        out.splitlines()[0]
        == done(
            "generate", runs["gptq"], "--prompt", "12 and", "--max-new-tokens", 5, "--dtype", "float32"
        ).splitlines()[0]
    )


def test_inspect(place, runs):
    out = done("inspect", place / "llama")
    assert "llama, 2 blocks, context 64" in out and "(float)" in out and "stage 0: self_attn.q_proj [64, 64]" in out
    assert "not in" in out or "scales can be absorbed exactly in" in out
    quantized = done("inspect", runs["awq"])
    assert "(quantized, compressed-tensors)" in quantized and "14 quantized linears" in quantized
    assert "w4a16-g32-sym, kernel" in quantized


@pytest.mark.parametrize("kind", ["sym", "asym"])
def test_every_format_and_exports_in_a_ring(place, runs, kind):
    """The same codes in every format, by ``quantize`` and by ``export``, each from one and to one other."""
    folders = {}
    folder_formats = [name for name in FORMATS if name != "gguf"]  # one file: tests/test_gguf_files.py
    for name in folder_formats:
        out = place / f"{kind}-{name}"
        scheme = ("--scheme", f"w4a16-g32-{kind}")
        words = ["--method", "rtn", *FAST, *scheme, "--format", name, "--out", out]
        done("quantize", place / "llama", *words)
        written = read_record(out).result["format"]
        assert written == name or (name == "gptq" and kind == "asym" and written == "gptq_v2")
        folders[name] = out
    expected = codes(folders["native"])
    for folder, name in zip(folders.values(), [*folder_formats[1:], folder_formats[0]], strict=True):
        assert_same_codes(codes(folder), expected)
        out = place / "converted"
        text = done("export", folder, "--format", name, "--out", out, "--overwrite")
        assert "every linear read back and compared" in text
        assert_same_codes(codes(out), expected)
        assert (out / "tokenizer.json").exists() and not (out / "report.json").exists()


def test_default_scheme_and_format(place):
    dry = ("--method", "rtn", "--dry-run", "--scheme", "w4a16-g32")
    out = done("quantize", place / "gpt2", *dry)
    assert "format native (compressed-tensors cannot hold this model: " in out and "Conv1D" in out
    message = refused("quantize", place / "gpt2", *dry, "--format", "compressed-tensors")
    assert "Conv1D" in message and "--format native" in message
    out = done("quantize", "demo", "--method", "awq", "--dry-run")
    assert "w4a16-g128-sym" in out and "4.1250 bits per weight" in out and "format compressed-tensors" in out
    assert "w4a16-g128-asym" in done("quantize", "demo", "--method", "awq", "--dry-run", "--format", "awq")
    assert "method awq+rtn" in out and "method gptq" in done("quantize", "demo", "--method", "gptq", "--dry-run")


def test_dry_run_reads_no_weights_and_writes_nothing(place, tmp_path, monkeypatch):
    def no_reading(self: CheckpointReader, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(CheckpointReader, "tensor", no_reading)
    words = ["--method", "awq", "--scheme", "w4a16-g32", "--dataset", place / "text.txt", "--out", tmp_path / "out"]
    out = done("quantize", place / "llama", *words, "--dry-run")
    assert list(tmp_path.iterdir()) == []
    for part in ("scheme", "bits per weight", "forward pass", "memory about", "disk up to", "loads in transformers"):
        assert part in out, part
    assert "loads in vLLM" in out and "loads in llama.cpp: no" in out
    assert "note: --seq-len 2048 is longer than the model's context: cut to 64" in out


def test_overwrite(place, tmp_path):
    out = tmp_path / "out"
    words = ["quantize", place / "llama", "--method", "rtn", *FAST, "--out", out]
    out.mkdir()
    done(*words)  # an empty folder is no obstacle
    (out / "mine.txt").write_text("keep me")
    assert "not empty" in refused(*words) and (out / "mine.txt").exists()
    done(*words, "--overwrite")
    assert not (out / "mine.txt").exists() and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_recipe_file(place, tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'scheme = "w3a16-g32"\n[[pass]]\nname = "gptq"\norder = "group"\n'
        '[[rule]]\nmatch = "*.down_proj"\nscheme = "w8a16-g64"\n[[rule]]\nmatch = "*.0.*.q_proj"\nscheme = "float"\n'
    )
    words = ["--recipe", recipe, "--samples", 3, "--seq-len", 24, "--dataset", place / "text.txt"]
    out = done("quantize", place / "llama", *words, "--out", tmp_path / "out")
    assert "left in float: 1 linears of the blocks (rule '*.0.*.q_proj' = float)" in out
    schemes = {n: str(q.scheme) for n, q in codes(tmp_path / "out").items()}
    assert len(schemes) == 13 and schemes["model.layers.1.mlp.down_proj"] == "w8a16-g64-sym"
    assert schemes["model.layers.0.self_attn.k_proj"] == "w3a16-g32-sym"


def test_demo_and_the_order_of_bit_widths(tmp_path):
    """The demo is real enough that float < 4 bit < 2 bit in perplexity, on its own held-out text."""
    text = tmp_path / "held-out.txt"
    text.write_text((Path(__file__).parents[1] / "calibration/demo/test.txt").read_text()[:6000])
    scores = []
    for scheme in ("w4a16-g128", "w2a16-g128"):
        out = tmp_path / scheme
        words = ["--method", "rtn", "--scheme", scheme, "--seq-len", 256, "--out", out, "--eval", text]
        done("quantize", "demo", *words)
        scores.append([e.perplexity for e in read_record(out).evaluations])
    assert scores[0][0] == scores[1][0] and scores[0][0] < scores[0][1] < scores[1][1]


def test_a_real_process_that_is_refused(place, tmp_path):
    bad = process("quantize", place / "llama", "--method", "awk", "--out", tmp_path / "out")
    assert bad.returncode == 2 and bad.stdout == "" and "Traceback" not in bad.stderr
    known = ", ".join([*METHODS, *SPARSIFIERS, *COMBINATIONS])
    assert bad.stderr == (f"error: --method: unknown value 'awk'\n    fix: did you mean 'awq'? use one of: {known}\n")


def test_a_real_process_that_succeeds(place, tmp_path):
    good = process("quantize", place / "llama", "--method", "rtn", *FAST, "--out", tmp_path / "out")
    assert good.returncode == 0 and "written to" in good.stdout and "Traceback" not in good.stderr
    assert "verify ..." in good.stderr


def test_help_names_every_method():
    words = {word.strip(".,;:") for word in done("quantize", "--help").replace("│", " ").split()}
    assert not [name for name in [*METHODS, *SPARSIFIERS, *COMBINATIONS] if name not in words]
    words = {word.strip(".,;:") for word in done("sparsify", "--help").replace("│", " ").split()}
    assert not [name for name in SPARSIFIERS if name not in words]
