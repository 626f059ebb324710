"""Records are checked down to the last leaf where they are read: nothing that a view could stumble over gets past."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import pytest
from command import done, run_ptq, text_file, tiny
from fuzz.mutations import json_paths

from calibration.errors import ToolkitError
from calibration.model.typed import Count, Finite, built
from calibration.record import read_record, read_timings
from calibration.walk.finished import FinishedBlocks
from ptq.planning.source import is_of_demo
from ptq.report import card, html, markdown
from ptq.report.compare import compare_paths
from ptq.study.measured import read_measurements
from sparsity.files import load_sparsity

ODD: tuple[Any, ...] = (
    None, True, 0, -1, 10**400, 1e308, float("nan"), "", "x", "\ud800", [], [1, "x"], {"a": [1]},
)  # fmt: skip
FILES = ("report.json", "timings.json")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its numbers; of what there are many in its record, one is left."""
    place = tmp_path_factory.mktemp("records")
    words = ["--scheme", "w4a16-g32", "--dataset", text_file(place / "text.txt"), "--seq-len", "16"]
    words += ["--samples", "2", "--eval", place / "text.txt", "--eval-windows", "2"]
    done("quantize", tiny(place / "model"), "--method", "gptq", *words, "--out", place / "run")
    report = json.loads((place / "run" / "report.json").read_text())
    report |= {"linears": report["linears"][:1], "evaluations": report["evaluations"][1:], "versions": {"ptq": "1"}}
    report["recipe"]["passes"] = [{"name": "gptq", "order": "activation"}]
    (place / "run" / "report.json").write_text(json.dumps(report))
    return place / "run"


def changed(data: Any, at: tuple[Any, ...], value: Any) -> Any:
    """The document with another value at a place, None: without that place."""
    data = copy.deepcopy(data)
    parent = data
    for key in at[:-1]:
        parent = parent[key]
    parent[at[-1]] = value
    return data


def damaged(data: Any) -> list[Any]:
    """With every leaf and every inner node replaced, and with every key left out."""
    found = []
    for at in json_paths(data)[1:]:
        found += [changed(data, at, value) for value in ODD]
        without = copy.deepcopy(data)
        parent = without
        for key in at[:-1]:
            parent = parent[key]
        del parent[at[-1]]
        found.append(without)
    return found


def views(run: Path) -> str:
    """All that is made of a record, as text."""
    record, timings = read_record(run), read_timings(run)
    texts = [markdown.render(record), html.render(record), str(record)]
    return "\n".join([*texts, str(compare_paths([run])), f"{timings} {read_measurements([run], tokens=1e12)}"])


@pytest.mark.parametrize("name", FILES)
def test_no_record_that_is_read_breaks_a_view(run, tmp_path, name):
    for file in FILES:
        (tmp_path / file).write_bytes((run / file).read_bytes())
    assert views(tmp_path).encode()
    read = 0
    for data in damaged(json.loads((run / name).read_text())):
        (tmp_path / name).write_text(json.dumps(data))
        try:
            assert views(tmp_path).encode()
            read += 1
        except ToolkitError as error:
            assert any(word in str(error) for word in (name, "eval", "leave it out", "quantize every linear")), error
        assert not is_of_demo(tmp_path)
    assert read > 10  # settings of passes, numbers of the same kind


def test_commands_refuse_damaged_records(run, tmp_path):
    """Whatever stands in the record: a message and exit code 2, or what was asked for."""
    model = tmp_path / "model"
    model.mkdir()
    for path in run.iterdir():
        if path.is_file():
            (model / path.name).write_bytes(path.read_bytes())
    commands = [["compare", model], ["inspect", model], ["upload", model, "org/name"]]
    commands += [["predict", model, "--params", "1e9", "--tokens", "1e11", "--bits", "4"]]
    cases = damaged(json.loads((run / "report.json").read_text()))
    ends = set()
    for data in random.Random(0).sample(cases, 25):
        (model / "report.json").write_text(json.dumps(data))
        for words in commands:
            end = run_ptq(*words)
            assert end.code == 0 or (end.code == 2 and "fix:" in end.err), (words, end)
            ends.add((words[0], end.code))
        with contextlib.suppress(ToolkitError):
            assert card.model_card(read_record(model), "org/base").encode()
    assert {("compare", 0), ("compare", 2), ("inspect", 0), ("upload", 2), ("predict", 2)} <= ends


def test_where_a_record_is_damaged(run, tmp_path):
    whole = json.loads((run / "report.json").read_text())
    for at, value, said in (
        (("recipe", "passes"), 3, "'recipe.passes' is '3'"),
        (("linears", 0, "shape", 1), 0, "'linears.0.shape.1' is '0'"),
        (("evaluations", 0, "divergence", "kl_mean"), "x", "'evaluations.0.divergence.kl_mean' is 'x'"),
        (("more",), 1, "'more' is not known"),
    ):
        (tmp_path / "report.json").write_text(json.dumps(changed(whole, at, value)))
        with pytest.raises(ToolkitError, match=rf"report\.json: damaged: {said}"):
            read_record(tmp_path)
    del whole["model"]["source"], whole["result"]["outside"], whole["calibration"]["bos"]  # older records lack these
    (tmp_path / "report.json").write_text(json.dumps(whole))
    assert read_record(tmp_path).model["name"] == "model"
    del whole["result"]["format"]
    (tmp_path / "report.json").write_text(json.dumps(whole))
    with pytest.raises(ToolkitError, match=r"'result\.format' is missing"):
        read_record(tmp_path)


def test_a_report_of_another_program_does_not_stop_a_run(tmp_path):
    model = tiny(tmp_path / "model")
    (model / "report.json").write_text('{"coverage": 97}')
    words = ["--dataset", text_file(tmp_path / "text.txt"), "--seq-len", "16", "--max-windows", "2"]
    assert "perplexity" in done("eval", model, *words)
    assert not is_of_demo(model)


def test_no_damaged_sparsity_file_breaks_a_view(tmp_path):
    model, words = tiny(tmp_path / "model"), ["--dataset", text_file(tmp_path / "text.txt"), "--seq-len", "16"]
    sparse = tmp_path / "sparse"
    done("sparsify", model, "--method", "teal", "--target", "0.5", "--samples", "64", *words, "--out", sparse)
    whole = json.loads((sparse / "sparsity.json").read_text())
    whole["settings"]["search"] = {"perplexity_increase": 0.1}
    read = 0
    for data in random.Random(0).sample(damaged({**whole, "sites": whole["sites"][:1]}), 150):
        rest = whole["sites"][1:] if isinstance(data.get("sites"), list) else []
        data = {**data, "sites": [*data["sites"], *rest]} if rest else data
        (sparse / "sparsity.json").write_text(json.dumps(data))
        try:
            found = load_sparsity(sparse)
            assert found is not None and str(found).encode()
            read += 1
        except ToolkitError:
            pass
    assert read > 10


def test_a_damaged_block_record_is_no_finished_block(tmp_path):
    """Also with digests that fit, as another program would write them."""
    import torch
    from safetensors.torch import save_file

    class Spec:
        n_blocks = 1

        def prefix(self, index: int) -> str:
            return f"{index}."

    blocks = FinishedBlocks(tmp_path, Spec())  # type: ignore[arg-type]
    save_file({"a": torch.ones(1)}, blocks.tensors_path(0))
    entry = {"scheme": "w4a16-g32-sym", "errors": {"weight": 0.1}, "notes": {"awq.alpha": 0.5}}
    whole = {"forwards": 2, "linears": {"q_proj": entry}}

    def write(record: dict[str, Any]) -> None:
        digests = blocks._digests(0, json.loads(json.dumps(record)))
        blocks.record_path(0).write_text(json.dumps({**record, "sha256": digests}))

    write(whole)
    assert blocks.count() == 1 and blocks.linears(0)["0.q_proj"]["scheme"] == "w4a16-g32-sym"
    for at, value in (
        (("forwards",), "x"),
        (("linears",), []),
        (("linears", "q_proj", "scheme"), 3),
        (("linears", "q_proj", "errors", "weight"), "x"),
        (("linears", "q_proj", "notes"), None),
    ):
        write(changed(whole, at, value))
        assert blocks.count() == 0


class Keys(TypedDict):
    name: str
    count: NotRequired[Count]


@dataclass(frozen=True)
class Nested:
    shape: tuple[int, int]
    keys: Keys
    share: Finite = 0.0
    kind: Literal["a", 1] | None = None
    many: tuple[Keys, ...] = ()


def test_typed_values():
    made = built(Nested, {"shape": [1, 2], "keys": {"name": "n", "other": {}}, "many": [{"name": "m", "count": 3}]})
    assert made == Nested((1, 2), {"name": "n", "other": {}}, many=({"name": "m", "count": 3},))  # type: ignore
    assert built(Nested, {"shape": (1, 2), "keys": {"name": ""}, "kind": 1, "share": 1}).kind == 1
    whole: dict[str, Any] = {"shape": [1, 2], "keys": {"name": "n"}}
    for wrong, said in (
        ({"shape": [1]}, "'shape' is"),
        ({"shape": [1, True]}, r"'shape\.1' is 'True'"),
        ({"shape": [1, 10**30]}, r"'shape\.1' is"),
        ({"shape": "12"}, "'shape' is"),
        ({"keys": {}}, r"'keys\.name' is missing"),
        ({"keys": {"name": "n", "count": -1}}, r"'keys\.count' is '-1'"),
        ({"keys": {"name": None}}, r"'keys\.name' is 'None'"),
        ({"share": float("nan")}, "'share' is 'nan'"),
        ({"share": float("inf")}, "'share' is 'inf'"),
        ({"kind": True}, "'kind' is 'True'"),
        ({"many": [{"name": "m"}, 3]}, r"'many\.1' is '3'"),
        ({"size": 1}, "'size' is not known"),
    ):
        with pytest.raises(TypeError, match=said):
            built(Nested, {**whole, **wrong})
    with pytest.raises(TypeError, match="'keys' is missing"):
        built(Nested, {"shape": [1, 2]})
    with pytest.raises(TypeError):
        built(Nested, 3)
