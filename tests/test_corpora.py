"""Sources of text: files, hub sets (from local copies with the repositories' own layout), errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from byte_tokenizer import BOS, byte_tokenizer

from calibration.errors import ToolkitError
from calibration.model.opening import DEMO_FOLDER
from calibration.progress import Silent
from calibration.text.corpora import load_corpus
from calibration.text.crops import calibration_tokens
from calibration.text.encoding import encode_text
from calibration.text.hub_sets import Unreachable, _revision
from ptq.planning.source import TextOptions, open_source


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing cached and no network, whatever this machine has."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def write_parquet(path: Path, column: str, rows: list[str | None]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: pa.array(rows, pa.string())}), path)


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_plain_file_is_taken_as_it_is(tmp_path: Path) -> None:
    text = "one\r\n\r\ntwo é\n"
    path = tmp_path / "notes.md"
    path.write_bytes(text.encode())
    found = load_corpus(str(path), "score")
    assert (found.text, found.special_tokens, found.join, found.label) == (text, False, "file as it is", "notes.md")
    assert encode_text(found, byte_tokenizer(bos=True)).ids[0] == BOS


def test_jsonl_and_parquet_rows_are_joined_by_a_blank_line(tmp_path: Path) -> None:
    rows = ["", " = Title = \n", "text\n"]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\n".join(json.dumps({"text": row, "id": 1}) for row in rows) + "\n\n")
    write_parquet(tmp_path / "rows.parquet", "text", list(rows))
    for path in (lines, tmp_path / "rows.parquet"):
        found = load_corpus(str(path), "calibrate")
        assert found.text == "\n\n".join(rows)
        assert found.join == r'"\n\n"' and found.special_tokens


def test_builtin_text_comes_with_the_toolkit() -> None:
    demo = Path(load_corpus.__code__.co_filename).parent / "demo"
    if not demo.is_dir():
        pytest.skip("calibration/demo is not there")
    train, test = load_corpus("builtin", "calibrate"), load_corpus("builtin", "score")
    assert train.text and test.text and train.text != test.text
    assert (train.label, test.label) == ("builtin, train", "builtin, test") and not test.special_tokens


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"body": "y", "id": 3}\n', "line 2: no string under the key 'text'.*body, id"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 5}\n', "line 2: no string"),
        ("a.jsonl", b'{"text": "x"}\n["x"]\n', "line 2: .*found: list"),
        ("a.jsonl", b"not json\n", "line 1: not JSON"),
        ("a.parquet", b"not parquet", "not a readable parquet file"),
        ("a.txt", b"caf\xe9", "not UTF-8 text .byte 3"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ToolkitError, match=message) as caught:
        load_corpus(str(tmp_path / name), "score")
    assert caught.value.fix


def test_parquet_without_text(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", "body", ["x"])
    with pytest.raises(ToolkitError, match=r"no column 'text' \(found: body"):
        load_corpus(str(tmp_path / "a.parquet"), "score")
    write_parquet(tmp_path / "b.parquet", "text", ["x", None])
    with pytest.raises(ToolkitError, match="row 1: no text"):
        load_corpus(str(tmp_path / "b.parquet"), "score")


@pytest.mark.parametrize(
    ("name", "message", "fix"),
    [
        ("wikitext-2", "unknown data set 'wikitext-2'", "did you mean 'wikitext2'"),
        (
            "nothing-like-it",
            "unknown data set",
            "use one of: wikitext2, c4, ptb, pileval, ultrachat, open-platypus, builtin",
        ),
        ("no/such.txt", "no such file: 'no/such.txt'", "path of an existing"),
        ("such.jsonl", "no such file", "path of an existing"),
    ],
)
def test_unknown_names_and_missing_files(name: str, message: str, fix: str) -> None:
    with pytest.raises(ToolkitError, match=message) as caught:
        load_corpus(name, "score")
    assert fix in caught.value.fix


# --- hub sets, from local copies with the repositories' own layout ------------------------------------------------


@pytest.mark.parametrize("with_readme", [True, False])
def test_wikitext_from_a_copy_of_its_repository(tmp_path: Path, hub_cache: None, with_readme: bool) -> None:
    repo = tmp_path / "Salesforce" / "wikitext"
    rows: dict[str, list[str | None]] = {"train": ["", " = A = \n"], "test": ["", " = B = \n", "b\n"]}
    for config in ("wikitext-2-raw-v1", "wikitext-103-raw-v1"):
        for split, texts in rows.items():
            write_parquet(repo / config / f"{split}-00000-of-00001.parquet", "text", [*texts, f"{config[:10]}"])
    if with_readme:
        configs = "".join(
            f"- config_name: {config}\n  data_files:\n"
            + "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in rows)
            for config in ("wikitext-2-raw-v1", "wikitext-103-raw-v1")
        )
        (repo / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    found = load_corpus("wikitext2", "score", hub_root=tmp_path)
    assert found.text == "\n\n".join(["", " = B = \n", "b\n", "wikitext-2"])
    assert found.label == "Salesforce/wikitext wikitext-2-raw-v1, test"
    assert found.special_tokens and found.join == r'"\n\n"'
    assert load_corpus("wikitext2", "calibrate", hub_root=tmp_path).rows[1] == " = A = \n"


def test_c4_scores_the_first_documents_and_calibrates_on_single_ones(tmp_path: Path, hub_cache: None) -> None:
    import gzip

    folder = tmp_path / "allenai" / "c4" / "en"
    folder.mkdir(parents=True)
    for name in ("c4-train.00000-of-01024", "c4-validation.00000-of-00008"):
        lines = "".join(json.dumps({"text": f"{name[3:5]}{i}"}) + "\n" for i in range(1200))
        (folder / f"{name}.json.gz").write_bytes(gzip.compress(lines.encode()))
    score = load_corpus("c4", "score", hub_root=tmp_path)
    assert score.text == " ".join(f"va{i}" for i in range(1100))
    assert (score.split, score.join, score.max_windows, score.builder) == ("validation", '" "', 256, "text")
    calibrate = load_corpus("c4", "calibrate", hub_root=tmp_path)
    assert (len(calibrate.rows), calibrate.rows[7], calibrate.builder) == (1200, "tr7", "documents")
    tokens = calibration_tokens(calibrate, byte_tokenizer(), samples=3, seq_len=4, seed=0)
    assert tokens.source["join"] == "none: every window from one document"


def test_ptb_sentences_are_joined_by_a_space(tmp_path: Path, hub_cache: None) -> None:
    repo = tmp_path / "ptb-text-only" / "ptb_text_only" / "penn_treebank"
    write_parquet(repo / "train" / "0000.parquet", "sentence", ["a b", "c"])
    write_parquet(repo / "test" / "0000.parquet", "sentence", ["d", "e"])
    assert load_corpus("ptb", "calibrate", hub_root=tmp_path).text == "a b c"
    assert load_corpus("ptb", "score", hub_root=tmp_path).text == "d e"


def test_pile_documents_are_shuffled_as_datasets_does(tmp_path: Path, hub_cache: None) -> None:
    import datasets

    folder = tmp_path / "mit-han-lab" / "pile-val-backup"
    folder.mkdir(parents=True)
    lines = "".join(json.dumps({"text": f" {i:04d} ", "meta": {}}) + "\n" for i in range(50))
    (folder / "val.jsonl").write_text(lines)
    pile = load_corpus("pileval", "calibrate", hub_root=tmp_path)
    tokens = calibration_tokens(pile, byte_tokenizer(), samples=8, seq_len=16, seed=0)
    shuffled = datasets.Dataset.from_dict({"text": list(pile.rows)}).shuffle(seed=42)
    expected = "".join(row.strip() for row in shuffled["text"][:8])
    assert byte_tokenizer().decode(tokens.input_ids.flatten()) == expected
    with pytest.raises(ToolkitError, match="nothing held back to score") as caught:
        load_corpus("pileval", "score", hub_root=tmp_path)
    assert "wikitext2, c4, ptb" in caught.value.fix


def test_a_folder_of_parquet_files(tmp_path: Path, hub_cache: None) -> None:
    write_parquet(tmp_path / "set" / "train-00000-of-00001.parquet", "text", ["a", "b"])
    write_parquet(tmp_path / "set" / "test-00000-of-00001.parquet", "text", ["c"])
    assert load_corpus(str(tmp_path / "set"), "calibrate").text == "a\n\nb"
    assert load_corpus(str(tmp_path / "set"), "score").text == "c"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ToolkitError, match=r"data set .*empty"):
        load_corpus(str(tmp_path / "empty"), "score")


def test_offline_is_one_error_with_a_fix(hub_cache: None) -> None:
    for name in ("wikitext2", "c4", "ptb", "pileval"):
        with pytest.raises(ToolkitError, match="not cached, and the hub cannot be reached") as caught:
            load_corpus(name, "calibrate")
        assert "FILE.txt" in caught.value.fix


def test_an_unreachable_hub_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client would ask five times per file; afterwards the hub may be asked again."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    asked = []

    def head(url: str, timeout: float) -> None:
        asked.append(url)
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=head))
    with pytest.raises(Unreachable):
        load_corpus("wikitext2", "calibrate")
    assert len(asked) == 1 and not datasets.config.HF_HUB_OFFLINE and not huggingface_hub.constants.HF_HUB_OFFLINE


def test_without_a_hub_the_default_text_is_the_built_in_one(
    tmp_path: Path, hub_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where no text was named; it is said."""
    told: list[str] = []
    display = Silent()
    monkeypatch.setattr(display, "message", told.append)
    copy = shutil.copytree(DEMO_FOLDER, tmp_path / "own")  # not the demo, whose own text it is
    found = open_source(copy, TextOptions(samples=2, seq_len=16)).windows(display)
    built_in = open_source("demo", TextOptions(samples=2, seq_len=16)).windows(display)
    assert torch.equal(found.input_ids, built_in.input_ids)
    assert len(told) == 1 and "cannot be reached" in told[0] and "--dataset" in told[0]
    with pytest.raises(Unreachable):
        open_source(copy, TextOptions(dataset="wikitext2", samples=2, seq_len=16)).windows(display)


def test_the_commit_is_read_from_what_was_downloaded() -> None:
    commit = "b0" * 20
    assert _revision({f"hf://datasets/Salesforce/wikitext@{commit}/w/test.parquet": {}}) == commit
    assert _revision({"folder/local.parquet": {}}) == _revision(None) == ""
