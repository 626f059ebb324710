"""Files that come from elsewhere are read strictly, and files of ours are written whole, wherever they are named."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from command import refused, run_ptq, text_file, tiny
from fuzz.tensor_files import header_of, write_raw
from safetensors.torch import save_file

from calibration.bounds import check_counts, setting_problems
from calibration.errors import ToolkitError
from calibration.model.checkpoint import write_atomically
from calibration.model.contents import small_files
from calibration.model.headers import INDEX_FILE, read_header, shards_of
from calibration.model.reading import file_digest, read_json, read_toml
from calibration.record import Protocol
from ptq.methods import METHODS
from ptq.report.compare import read_evaluations


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4, 4), "b": torch.zeros(4, 4)}, path)
    return path


def set_entry(name: str, key: str, value: object):
    def change(header: dict) -> object:
        header[name][key] = value
        return header

    return change


HEADERS = {
    "overlap": set_entry("b", "data_offsets", [0, 64]),
    "metadata": lambda header: {**header, "__metadata__": 5},
    "float shape": set_entry("a", "shape", [4, 4.0]),
    "bool shape": set_entry("a", "shape", [True, 16]),
    "negative shape": set_entry("a", "shape", [-4, -4]),
    "list": lambda header: list(header),
    "unknown dtype": set_entry("a", "dtype", "X"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_are_as_strict_as_the_library(shard, kind):
    assert set(read_header(shard)) == {"a", "b"}
    header, body = header_of(shard)
    write_raw(shard, HEADERS[kind](header), body)
    with pytest.raises(ToolkitError, match=r"model\.safetensors"):
        read_header(shard)


def test_a_name_that_is_there_twice(shard):
    header, body = header_of(shard)
    text = json.dumps(header).replace('"b":', '"a":').encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + body)
    with pytest.raises(ToolkitError, match="'a' is there twice"):
        read_header(shard)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "", ".", "a/b"])
def test_an_index_names_files_beside_it_only(tmp_path, name):
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ToolkitError, match="which is no file beside it"):
        shards_of(tmp_path)


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, said in ((tmp_path / "pipe", "a pipe"), (tmp_path, "a folder"), (Path("/dev/zero"), "a device")):
        for read in (read_json, read_toml, read_header, file_digest):
            with pytest.raises(ToolkitError, match=f"is {said}, not a file"):
                read(path)
    with pytest.raises(ToolkitError, match="cannot be opened"):
        read_json(tmp_path / ("a" * 300))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": ' + "[" * 100 + "]" * 100 + "}", "[]", "{", '{"a": ' + "9" * 5000 + "}"]
)
def test_json_that_is_no_config(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ToolkitError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


def test_damaged_evaluations(tmp_path):
    protocol = Protocol("gptq", "text", "0", " ", False, 8, 8, 7, "float32")
    entry = {"model": "float", "protocol": vars(protocol), "perplexity": 2.0, "nll": 1.0, "words": 1, "bytes": 1}
    path = tmp_path / "e.json"
    path.write_text(json.dumps({"schema_version": 1, "evaluations": [entry]}))
    assert read_evaluations(path)[0].perplexity == 2
    for wrong in ({"perplexity": "x"}, {"perplexity": True}, {"protocol": 3}, {"words": 1.5}, {"pruned": []}):
        path.write_text(json.dumps({"schema_version": 1, "evaluations": [entry | wrong]}))
        with pytest.raises(ToolkitError, match="not a list of evaluations"):
            read_evaluations(path)


def test_links_and_hidden_files_are_no_part_of_a_checkpoint(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (tmp_path / "secret").write_text("secret")
    for name in ("config.json", "LICENSE", ".env.json", "pytorch_model.bin", "model.safetensors.index.json"):
        (folder / name).write_text("{}")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    (folder / "inside.txt").symlink_to(folder / "config.json")
    (folder / "dangling.txt").symlink_to(folder / "nowhere")
    assert [p.name for p in small_files(folder)] == ["LICENSE", "config.json", "inside.txt"]


def test_writing_follows_links_and_spares_what_is_no_file(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == b"new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(tmp_path / "pipe", b"through")
    assert os.read(reader, 100) == b"through" and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    os.close(reader)
    with pytest.raises(ToolkitError, match="is a folder"):
        write_atomically(tmp_path, b"x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "pipe", "target"]


def test_json_on_standard_output(tmp_path):
    table = tmp_path / "mine.csv"
    table.write_text("params,tokens,bits,delta\n1e8,1e10,3,0.07724\n1e8,1e10,4,0.01421\n")
    words = ["predict", table, "--params", "1e9", "--tokens", "1e11", "--bits", "3,4", "--json"]
    result = run_ptq(*words, "-")
    assert result.code == 0 and len(json.loads(result.out)["predictions"]) == 2 and "| bits |" in result.err
    assert "is a folder" in refused(*words, tmp_path) and "no such folder" in refused(*words, tmp_path / "no" / "x")


@pytest.mark.parametrize(
    ("method", "setting", "value"),
    [("awq", "grid", 10**30), ("rotate", "seed", 2**63), ("norm-tweak", "depth_scale", float("nan")),
     ("gptq", "damping", 1e-300), ("adaquant", "iterations", 10**9), ("norm-tweak", "rate", float("inf"))],
)  # fmt: skip
def test_settings_out_of_proportion(method, setting, value):
    assert not list(setting_problems([METHODS[method]()]))
    (problem,) = setting_problems([METHODS[method](**{setting: value})])
    assert problem.subject == f"{method}.{setting}" and str(getattr(METHODS[method](), setting)) in problem.fix


def test_every_default_is_in_proportion():
    assert not list(setting_problems([method() for method in METHODS.values()]))
    check_counts(samples=128, seed=2**63 - 1, seq_len=None)
    for name, value in (("samples", 2**63), ("seed", 2**63), ("seq_len", -(10**7))):
        with pytest.raises(ToolkitError, match=f"--{name.replace('_', '-')} {value}"):
            check_counts(**{name: value})


@pytest.mark.parametrize("count", [-1, 0, 1, 3, 10**9])
def test_layers_that_are_not_those_stored(tmp_path, count):
    model = tiny(tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": count}))
    words = ["quantize", model, "--method", "rtn", "--scheme", "w4a16-g32", "--out", tmp_path / "out"]
    refused(*words)
    assert not (tmp_path / "out").exists()


def test_a_lone_surrogate(tmp_path):
    model = tiny(tmp_path / "m")
    text_file(tmp_path / "text.txt")
    (tmp_path / "rows.jsonl").write_text('{"text": "one \\ud800 two"}\n' * 300)
    assert "lone surrogates" in refused("generate", model, "--prompt", "a \ud800", "--dtype", "float32")
    words = ["quantize", model, "--method", "gptq", "--scheme", "w4a16-g32", "--samples", "2", "--seq-len", "16"]
    assert "lone surrogates" in refused(*words, "--dataset", tmp_path / "rows.jsonl", "--out", tmp_path / "out")
