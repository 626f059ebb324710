"""The model card reads back as metadata; comparisons refuse what cannot be compared."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from report_records import PROTOCOL, RECORDS, evaluations, linears, record

from calibration.errors import ToolkitError
from calibration.record import RunRecord, Timings
from ptq.report.card import Facts, model_card
from ptq.report.compare import compare, compare_paths, read_evaluations


def test_card_front_matter_reads_back_as_yaml() -> None:
    yaml = pytest.importorskip("yaml")
    card = model_card(
        RECORDS["small"], "org/tiny", {"model.safetensors": 5_702_000_000}, Facts(license="llama3.1", language=("en",))
    )
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == "org/tiny" and head["base_model_relation"] == "quantized"
    assert head["license"] == "llama3.1" and head["language"] == ["en"] and head["library_name"] == "transformers"
    assert head["tags"] == ["quantized", "ptq", "compressed-tensors", "4-bit", "awq", "gptq"]
    assert head["datasets"] == ["allenai/c4"]
    local = yaml.safe_load(model_card(RECORDS["small"], "./tiny", None, Facts(base_model="org/x")).split("---\n")[1])
    assert local["base_model"] == "org/x" and local["base_model_relation"] == "quantized"
    metrics = [m for result in head["model-index"][0]["results"] for m in result["metrics"]]
    assert [m["value"] for m in metrics] == [6.4117, 6.1382]
    hostile_head = yaml.safe_load(model_card(RECORDS["hostile"], "C:\\models\\x", None).split("---\n")[1])
    assert "license" not in hostile_head and "base_model" not in hostile_head and "datasets" not in hostile_head


def test_card_passes_the_hub_reader() -> None:
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard(model_card(RECORDS["small"], "org/tiny")).data
    assert data.eval_results[0].metric_value == 6.4117 and data.license is None


def test_card_shows_a_snippet_only_where_it_loads() -> None:
    card = model_card(RECORDS["small"], "org/tiny")
    assert "vllm serve MODEL" in card and "AutoModelForCausalLM.from_pretrained" in card and "llama-cli" not in card
    assert "- llama.cpp: reads GGUF only" in card and "dequantize=True" not in card
    entries = tuple(dataclasses.replace(e, scheme="w4a16-g32-asym") for e in linears(1))
    assert "CompressedTensorsConfig(dequantize=True)" in model_card(record(entries), "org/tiny")
    mixed = (*entries, *linears(1))  # dequantizing applies one scheme to all, so it must not be suggested
    assert "dequantize=True" not in model_card(record(mixed), "org/tiny")
    gguf = record(result={"format": "gguf", "loads_in": {"llama.cpp": "yes", "transformers": "yes"}})
    card = model_card(gguf, "org/tiny", {"tiny.gguf": 10})
    assert "llama-cli -m tiny.gguf" in card and 'gguf_file="tiny.gguf"' in card and "library_name: gguf" in card


TIMINGS = Timings(123.4, {}, 2_000_000_000, 1, "cpu", 2)


def with_bits(bits: float, perplexity: float) -> RunRecord:
    run = record(evaluations=evaluations(own=perplexity))
    return dataclasses.replace(run, result={**run.result, "bits_per_weight": bits})


def test_compare_orders_by_bits_then_perplexity() -> None:
    runs = [("c", with_bits(8.1, 6.14), None), ("b", with_bits(4.1, 6.5), None), ("a", with_bits(4.1, 6.4), TIMINGS)]
    found = compare(runs, [("file", list(evaluations()[:1]))])
    assert [row.run for row in found.rows] == ["a", "b", "c", "file"]
    assert found.rows[0].change == pytest.approx(6.4 - 6.1382) and found.rows[0].seconds == 123.4
    text = found.to_markdown()
    for cell in ("AWQ + GPTQ", "w4a16-g32-sym", "compressed-tensors", "5.70 GB", "6.400", "+0.262", "123.4", "2.00 GB"):
        assert cell in text
    assert text.count("288,627 tokens scored") == 1


def test_compare_refuses_different_protocols_and_names_the_fields() -> None:
    other = dataclasses.replace(PROTOCOL, window=512, dtype="float32")
    runs = [("a", record(), None), ("b", record(evaluations=evaluations(other)), None)]
    with pytest.raises(
        ToolkitError, match=r"'a' and 'b'.*window 2048 and 512, dtype 'bfloat16' and 'float32'"
    ) as error:
        compare(runs)
    assert "stride" not in error.value.message and "ptq eval" in error.value.fix


def test_compare_uses_the_protocol_that_all_share() -> None:
    other = dataclasses.replace(PROTOCOL, window=512)
    both = record(evaluations=evaluations(other, own=9.0) + evaluations())
    found = compare([("both", both, None), ("one", record(), None)])
    assert found.protocol == PROTOCOL and {row.perplexity for row in found.rows} == {6.4117} and not found.also
    found = compare([("x", both, None), ("y", both, None)])
    assert found.protocol == other and found.also == (PROTOCOL,) and "also share" in found.to_markdown()
    assert compare([("x", both, None)], protocol=PROTOCOL).rows[0].perplexity == 6.4117


@pytest.mark.parametrize("run", [record(evaluations=()), record(evaluations=evaluations()[2:])])
def test_compare_refuses_a_run_without_evaluation(run: RunRecord) -> None:
    with pytest.raises(ToolkitError, match="run 'b' has no evaluation"):
        compare([("a", record(), None), ("b", run, None)])


def test_compare_refuses_nothing_and_equal_names() -> None:
    with pytest.raises(ToolkitError, match="nothing to compare"):
        compare([])
    with pytest.raises(ToolkitError, match="same name"):
        compare([("a", record(), None), ("a", record(), None)])


def test_compare_reads_folders_and_evaluation_files(tmp_path: Path) -> None:
    for name in ("one/run", "two/run"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "report.json").write_text(record().to_json(), encoding="utf-8")
    (tmp_path / "one/run/timings.json").write_text(TIMINGS.to_json(), encoding="utf-8")
    data = {"schema_version": 1, "evaluations": [dataclasses.asdict(e) for e in evaluations()]}
    file = tmp_path / "eval.json"
    file.write_text(json.dumps(data), encoding="utf-8")
    assert tuple(read_evaluations(file)) == evaluations()
    found = compare_paths([tmp_path / "one/run", tmp_path / "two/run/report.json", file])
    assert {row.run for row in found.rows} == {
        "one/run", "two/run", f"{tmp_path.name}/eval.json: quantized", f"{tmp_path.name}/eval.json: rtn",
        f"{tmp_path.name}/eval.json: float",
    }  # fmt: skip
    assert sorted(row.seconds or 0.0 for row in found.rows)[-1] == 123.4


VERSION_1 = '{"schema_version": 1, "evaluations": %s}'
UNREADABLE = [
    "{",
    "[]",
    '{"schema_version": 2, "evaluations": []}',
    VERSION_1 % "[{}]",
    VERSION_1 % '[{"protocol": {"x": 1}}]',
]


@pytest.mark.parametrize("text", UNREADABLE)
def test_unreadable_evaluations_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "eval.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ToolkitError, match=r"eval\.json"):
        read_evaluations(file)
    with pytest.raises(ToolkitError, match=r"missing\.json"):
        read_evaluations(tmp_path / "missing.json")
