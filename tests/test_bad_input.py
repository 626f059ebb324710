"""Every kind of bad input: one message with the thing, the value and the fix; exit code 2; nothing written."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path

import pytest
from broken_checkpoints import MODELS
from byte_tokenizer import byte_tokenizer
from command import done, refused, run_ptq, snapshot, text_file, tiny

import calibration.model.checkpoint

SMALL = ("--samples", "2", "--seq-len", "16", "--scheme", "w4a16-g32")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good models, which tests copy before they break them, a text, and a quantized model."""
    folder = tmp_path_factory.mktemp("good")
    text_file(folder / "text.txt")
    tiny(folder / "llama")
    tiny(folder / "gpt2", "gpt2")
    done("quantize", folder / "llama", "--method", "rtn", *SMALL, "--out", folder / "quantized")
    return folder


@pytest.fixture
def place(models: Path, tmp_path: Path) -> Path:
    """A working folder with ``m``, a copy of the good model, and ``text.txt``."""
    shutil.copytree(models / "llama", tmp_path / "m")
    shutil.copy(models / "text.txt", tmp_path / "text.txt")
    return tmp_path


def says(place: Path, words: list[str | Path], *parts: str) -> str:
    """The command is refused, names all ``parts``, and leaves everything as it was."""
    before = snapshot(place)
    message = refused(*words)
    assert snapshot(place) == before, "something was written"
    for part in parts:
        assert part in message, (part, message)
    return message


def quantize(place: Path, *words: str | Path, model: str | Path = "m", method: str = "gptq") -> list[str | Path]:
    data = ["--dataset", place / "text.txt", *SMALL, "--out", place / "out"]
    return ["quantize", place / model, "--method", method, *data, *words]


@pytest.mark.parametrize("kind", MODELS)
def test_bad_models(place, kind):
    break_it, *parts = MODELS[kind]
    break_it(place)
    says(place, quantize(place), *parts)


OPTIONS = {
    "method": (["--method", "gptqq"], "--method: unknown value 'gptqq'", "did you mean 'gptq'?"),
    "methods": (["--method", "awq+gptg"], "unknown value 'gptg'", "did you mean 'gptq'?"),
    "scheme": (["--scheme", "w4a16g128"], "'w4a16g128' is not a weight scheme", "did you mean 'w4a16-g128'?"),
    "bits": (["--scheme", "w7a16-g128"], "7-bit", "w{2,3,4,5,6,8}"),
    "group": (["--scheme", "w4a16-g48"], "'g48'", "g32"),
    "format": (["--format", "compresed-tensors"], "--format: unknown value", "did you mean 'compressed-tensors'?"),
    "dataset": (["--dataset", "wikitex2"], "unknown data set 'wikitex2'", "did you mean 'wikitext2'?"),
    "file": (["--dataset", "no/such.txt"], "no such file: 'no/such.txt'", "existing"),
    "eval": (["--eval", "wikitxt2"], "unknown data set 'wikitxt2'", "did you mean 'wikitext2'?"),
    "dtype": (["--dtype", "bfloat61"], "--dtype: unknown value 'bfloat61'", "did you mean 'bfloat16'?"),
    "device": (["--device", "cud"], "--device: unknown value 'cud'", "did you mean 'cuda'?"),
    "gpu": (["--device", "cuda:99"], "--device cuda:99", "use --device cpu"),
    "experts": (["--unseen-experts", "rtm"], "--unseen-experts: unknown value 'rtm'", "did you mean 'rtn'?"),
    "seq-len 1": (["--seq-len", "1"], "--seq-len 1", "2 tokens"),
    "samples 0": (["--samples", "0"], "--samples 0", "at least 1"),
    "samples -3": (["--samples", "-3"], "--samples -3", "not within"),
    "two roundings": (["--method", "rtn+gptq"], "rtn+gptq: more than one pass rounds", "keep one of"),
    "order": (["--method", "gptq+awq"], "cannot follow 'gptq'", "write awq+gptq"),
    "resume": (["--resume"], "holds no interrupted run", "leave --resume out"),
    "both": (["--recipe", "r.toml"], "--method and --recipe exclude each other", "leave one out"),
    "out is the model": (["--out", "m", "--overwrite"], "--out", "choose another output folder"),
    "out holds the model": (["--out", ".", "--overwrite"], "--out", "choose another output folder"),
    "out is a file": (["--out", "text.txt"], "is a file", "name a folder"),
    "out in a file": (["--out", "text.txt/out"], "is a file", "name a folder"),
    "out is taken": (["--out", "taken"], "--out taken: the folder is not empty", "--overwrite"),
    "out is a checkpoint": (["--out", "m"], "choose another"),
    "out is the root": (["--out", "/"], "--out /", "name a folder"),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_bad_options(place, kind, monkeypatch):
    words, *parts = OPTIONS[kind]
    (place / "taken").mkdir()
    (place / "taken/file").write_text("mine")
    monkeypatch.chdir(place)
    says(place, quantize(place, *words), *parts)


RECIPES = {
    "unknown key": ('method = "rtn"\nshceme = "w4a16-g32"\n', "unknown key 'shceme'", "did you mean 'scheme'?"),
    "unknown setting": ('[[pass]]\nname = "gptq"\ndampnig = 0.1\n', "'gptq.dampnig'", "did you mean 'damping'?"),
    "unknown rule key": ('method = "rtn"\n[[rule]]\nmatch = "*"\nscheem = "float"\n', "'rule.scheem'", "'scheme'"),
    "unknown pass": ('[[pass]]\nname = "gtpq"\n', "unknown value 'gtpq'", "did you mean 'gptq'?"),
    "unknown order": ('[[pass]]\nname = "gptq"\norder = "activaton"\n', "'activaton'", "did you mean 'activation'?"),
    "wrong type": ('[[pass]]\nname = "gptq"\ndamping = "much"\n', "'much' is not of type float"),
    "method type": ("method = 3\n", "3 is not of type str"),
    "pass type": ('pass = "gptq"\n', "'pass' is not a list of tables", "[[pass]]"),
    "nothing": ("", "needs either 'method' or [[pass]]"),
    "not TOML": ("method = \n", "not readable as TOML"),
    "unmatched rule": ('method = "rtn"\n[[rule]]\nmatch = "*.fc1"\nscheme = "float"\n', "'*.fc1'", "matches no linear"),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_bad_recipes(place, kind):
    text, *parts = RECIPES[kind]
    (place / "r.toml").write_text(text)
    says(place, ["quantize", place / "m", "--recipe", place / "r.toml", *SMALL, "--out", place / "out"], *parts)


def test_bad_recipe_paths(place):
    for name in ("none.toml", "m"):
        words = ["quantize", place / "m", "--recipe", place / name, "--out", place / "out"]
        says(place, words, f"{place / name}: ", "name a TOML file")


def test_what_a_command_needs(place):
    says(place, ["quantize", place / "m", "--out", place / "out"], "--method or --recipe is missing")
    says(place, ["quantize", place / "m", "--method", "rtn"], "--out is missing", "--dry-run")
    assert run_ptq("quantize").code == 2 and run_ptq("quantize", "m", "--samples", "many").code == 2


def test_group_size_that_does_not_divide(place):
    message = says(
        place, quantize(place, "--scheme", "w4a16-g128"),
        "model.layers.*.self_attn.q_proj", "model.layers.*.mlp.gate_proj",
        "64 input columns are not a multiple of group size 128", "model.layers.*.mlp.down_proj", "96 input columns",
    )  # fmt: skip
    fixes = [set(re.findall(r"\d+", fix)) for fix in re.findall(r"use group size ([^,]*)", message)]
    for scheme in (f"w4a16-g{min(set.intersection(*fixes))}", "w4a16-gchannel"):
        assert "gchannel" in message
        done(*quantize(place, "--scheme", scheme, "--out", place / scheme))


def test_scheme_that_the_format_cannot_hold(place):
    words = quantize(place, "--scheme", "w3a16-g32", "--format", "awq")
    says(place, words, "3-bit weights have no place in 'awq'", "use 4 bits, or use --format native")
    done(*words, "--format", "native")
    done(*words, "--scheme", "w4a16-g32", "--out", place / "four")


def test_text_shorter_than_a_window(place):
    (place / "short.txt").write_text("twelve bytes")
    short = quantize(place, "--dataset", place / "short.txt")
    says(place, short, "short.txt: 12 tokens, one window needs 17", "a longer text, or a smaller --seq-len")
    says(place, quantize(place, "--eval", place / "short.txt"), "short.txt: 12 tokens, one window needs 16")
    says(place, ["eval", place / "m", "--dataset", place / "short.txt", "--seq-len", 16], "short.txt: 12 tokens")
    done(*quantize(place, "--dataset", place / "short.txt", "--seq-len", 8, "--eval", place / "short.txt"))


def test_tokenizer_of_another_model(place):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(10)])  # ids 257 .. 266, the model has 260 rows
    tokenizer.save_pretrained(place / "m")
    for words in (quantize(place), quantize(place, "--eval", place / "text.txt", method="rtn"),
                  ["eval", place / "m", "--dataset", place / "text.txt"]):  # fmt: skip
        says(place, words, "'<3>' has id 260", "ids below 260 (7 such tokens)", "use the tokenizer that belongs")


def test_full_disk_before_and_while_writing(place, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    says(place, quantize(place), "0.00 GB free, the run needs", "free some space")
    monkeypatch.undo()

    def full(*args: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(calibration.model.checkpoint, "save_file", full)
    message = refused(*quantize(place))
    assert "the disk is full" in message and "--resume" in message and not (place / "out").exists()
    shutil.rmtree(place / "out.partial")


def test_full_disk_while_exporting(models, place, monkeypatch):
    def full(*args: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(calibration.model.checkpoint, "save_file", full)
    says(place, ["export", models / "quantized", "--format", "native", "--out", place / "out"], "the disk is full")


def test_a_folder_that_cannot_be_written(place, monkeypatch):
    def denied(*args: object, **named: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    says(place, quantize(place), "out: not writable ([Errno 13]", "choose another")


def test_bad_input_of_export(models, place):
    out = ("--out", place / "out")
    words = ["export", models / "quantized", "--format"]
    says(place, [*words, "awk", *out], "--format: unknown value 'awk'", "did you mean 'awq'?")
    says(place, ["export", place / "m", "--format", "awq", *out], "a float checkpoint", "ptq quantize")
    says(place, [*words, "native", "--out", place / "m"], "the folder is not empty", "--overwrite")
    says(place, [*words, "native", "--out", models / "quantized", "--overwrite"], "choose another output folder")
    (place / "out.partial").mkdir()
    (place / "out.partial" / "plan.json").write_text('{"program": "ptq"}')
    message = says(place, [*words, "native", *out], "out.partial: an interrupted run is here", "--overwrite")
    assert "--resume" not in message
    done(*words, "native", *out, "--overwrite")
    shutil.copytree(models / "quantized", place / "q")
    path = place / "q/model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    says(place, ["export", place / "q", "--format", "awq", "--out", place / "out2"], "truncated or corrupt")


def test_bad_input_of_eval(models, place):
    words = ["eval", place / "m", "--dataset", place / "text.txt"]
    says(place, [*words, "--protocol", "gtpq"], "--protocol: unknown value 'gtpq'", "did you mean 'gptq'?")
    says(place, [*words, "--dtype", "float23"], "--dtype: unknown value", "did you mean 'float32'?")
    says(place, [*words, "--stride", 4], "--stride 4", "hf-stride")
    says(place, [*words, "--protocol", "hf-stride", "--stride", 0], "--stride 0", "use")
    for length in (1, 0):
        says(place, [*words, "--seq-len", length], f"window {length}", "--seq-len of at least 2")
    says(place, [*words, "--json", place / "none/x.json"], "none/x.json: no such folder")
    says(place, [*words, "--reference", place / "none"], "none: no such folder")
    says(place, ["eval", models / "quantized", *words[2:], "--kernel", "refrence"], "did you mean 'reference'?")
    (place / "latin.txt").write_bytes("é".encode("latin-1") * 200)
    says(place, [*words, "--dataset", place / "latin.txt"], "not UTF-8 text (byte 0)", "iconv")


def test_bad_input_of_generate_inspect_and_compare(models, place):
    says(place, ["generate", place / "m", "--prompt", "", "--dtype", "float32"], "has no tokens", "at least one word")
    says(place, ["generate", place / "m", "--prompt", "a", "--max-new-tokens", 0], "max new tokens: 0", "at least 1")
    says(place, ["generate", place / "m", "--prompt", "a", "--device", "gpu"], "--device: unknown value 'gpu'")
    says(place, ["inspect", place / "none" / "x"], "no such folder")
    says(place, ["compare", place / "none.json"], "none.json")
    says(place, ["compare", models / "llama"], "llama")


def test_impossible_names_and_unknown_kernels(tmp_path):
    """Wherever they stand; a kernel also where no linear would run on it."""
    model, long = tiny(tmp_path / "model"), "a" * 300
    quantize = ["quantize", model, "--method", "gptq", "--scheme", "w4a16-g32", "--out", tmp_path / "out"]
    for words in ([*quantize, "--dataset", long], ["eval", model, "--dataset", long], ["inspect", long],
                  ["quantize", model, "--recipe", long, "--out", tmp_path / "out"], ["compare", long],
                  ["eval", model, "--dataset", "builtin", "--reference", long]):  # fmt: skip
        said = refused(*words)
        assert "aaaa" in said and not (tmp_path / "out").exists()
    words = ["generate", model, "--prompt", "1", "--max-new-tokens", "1", "--kernel", "intt4"]
    assert "did you mean 'int4'" in refused(*words)
