"""README.md of an exported checkpoint: Hub metadata, how it was made, what it costs, and how to load it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from calibration.record import RunRecord
from ptq.report import figures, loading, markdown, wording
from ptq.report.figures import code, plain, table

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".parquet", ".md", ".gz", ".zst")
_PLAIN_YAML = re.compile(r"[A-Za-z][\w./-]*( [A-Za-z0-9][\w./-]*)*")
_YAML_WORDS = {"y", "n", "yes", "no", "true", "false", "on", "off", "null"}


def model_card(
    record: RunRecord, base_model: str, files: Mapping[str, int] | None = None, license_id: str | None = None
) -> str:
    """The card as Markdown with YAML front matter.

    Args:
        record: of the run that wrote the checkpoint.
        base_model: Hub id, or the folder the run read: a folder is named in the text but is no metadata.
        files: name to bytes of the files beside the card, listed in name order.
        license_id: the base model's, if it is known; a wrong one is worse than none.
    """
    sections = [_front_matter(record, base_model, license_id), _title(record, base_model)]
    sections += [
        markdown.scope(record),
        markdown.quality(record, own="this checkpoint"),
        loading.section(record, files or {}),
    ]
    sections += [_sizes(record, files or {}), markdown.recipe(record), markdown.calibration(record)]
    sections += [markdown.versions(record), markdown.reproduce(record)]
    return "\n\n".join(filter(None, sections)) + "\n"


def _title(record: RunRecord, base_model: str) -> str:
    bits = figures.bits(record.result.get("bits_per_weight"))
    method, scheme = wording.method_label(record), wording.scheme_label(record)
    text = f"{plain(base_model)} with weights quantized by {plain(method)} to {plain(scheme)} ({bits} bits per weight)."
    return f"# {plain(_name(record, base_model))}\n\n{text} Written by ptq."


def _name(record: RunRecord, base_model: str) -> str:
    """``Llama-3.1-8B-w4a16-g128-sym-awq-gptq``"""
    names = [name for name, _, _ in wording.schemes(record)]
    scheme = names[0] if len(names) == 1 else "mixed" if names else ""
    method = "-".join(part.strip().lower() for part in wording.method_label(record).split("+"))
    return "-".join(filter(None, [re.split(r"[/\\]", base_model.rstrip("/\\"))[-1], scheme, method]))


def _sizes(record: RunRecord, files: Mapping[str, int]) -> str:
    parts = ["## Size", markdown.sizes(record)]
    if files:
        rows = [[code(name), figures.size(files[name])] for name in sorted(files)]
        rows.append(["all files", figures.size(sum(files.values()))])
        parts.append(table(["File", "Size"], rows, right=[1]))
    return "\n\n".join(parts)


def _front_matter(record: RunRecord, base_model: str, license_id: str | None) -> str:
    lines = ["---"]
    if license_id:
        lines.append(f"license: {_yaml(license_id)}")
    if _HUB_ID.fullmatch(base_model):
        lines += [f"base_model: {_yaml(base_model)}", "base_model_relation: quantized"]
    lines += [
        f"library_name: {_library(record)}",
        "pipeline_tag: text-generation",
        f"tags: {_yaml_list(_tags(record))}",
    ]
    dataset = str(record.calibration.get("dataset", ""))
    if "/" in dataset and _HUB_ID.fullmatch(dataset) and not dataset.lower().endswith(_FILE_SUFFIXES):
        lines.append(f"datasets: {_yaml_list([dataset])}")
    return "\n".join([*lines, *_model_index(record, base_model), "---"])


def _library(record: RunRecord) -> str:
    """The library that a download button should offer: not one that the record says cannot load it."""
    if "gguf" in str(record.result.get("format") or "").lower():
        return "gguf"
    answers = {name.lower(): yes for name, yes, _, _ in wording.loads(record)}
    return "transformers" if answers.get("transformers", True) else "ptq"


def _tags(record: RunRecord) -> list[str]:
    """Hub tags: lower case, no duplicates, in the order quantized, format, bits, methods."""
    known = [wording.read_scheme(name) for name, _, _ in wording.schemes(record)]
    bits = sorted({scheme.weights.bits for scheme in known if scheme})
    methods = [part.strip() for part in wording.method_label(record).split("+")]
    tags = ["quantized", "ptq", str(record.result.get("format") or ""), *(f"{b}-bit" for b in bits), *methods]
    return list(dict.fromkeys(tag.lower() for tag in tags if tag))


def _model_index(record: RunRecord, base_model: str) -> list[str]:
    measured = [
        result
        for result in wording.results(record.evaluations)
        if result.quantized and math.isfinite(result.quantized.perplexity)
    ]
    if not measured:
        return []
    lines = ["model-index:", f"- name: {_yaml(_name(record, base_model))}", "  results:"]
    for result in measured:
        own, protocol = result.quantized, result.protocol
        assert own is not None
        kind = re.sub(r"[^a-z0-9]+", "-", protocol.dataset.lower()).strip("-") or "text"
        label = f"PPL, {protocol.window}-token windows, protocol {protocol.name}"
        lines += [
            "  - task: {type: text-generation, name: Language modelling}",
            f"    dataset: {{type: {_yaml(kind)}, name: {_yaml(protocol.dataset)}}}",
            "    metrics:",
            f"    - {{type: perplexity, name: {_yaml(label)}, value: {_yaml_number(own.perplexity)}}}",
        ]
        if result.reference is not None and math.isfinite(result.reference):
            value = _yaml_number(result.reference)
            label = f"PPL of the unquantized model, {label[5:]}"
            lines.append(f"    - {{type: perplexity, name: {_yaml(label)}, value: {value}}}")
    return lines


def _yaml_number(value: float) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".")


def _yaml_list(items: Iterable[str]) -> str:
    return f"[{', '.join(map(_yaml, items))}]"


def _yaml(text: str) -> str:
    """A YAML scalar that reads back as this string: as it is where that is safe, else in double quotes."""
    if _PLAIN_YAML.fullmatch(text) and text.lower() not in _YAML_WORDS:
        return text
    return '"' + "".join(map(_yaml_char, text)) + '"'


def _yaml_char(char: str) -> str:
    if char in '"\\':
        return f"\\{char}"
    return char if char.isprintable() else f"\\U{ord(char):08x}"
