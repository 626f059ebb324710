"""README.md of an exported checkpoint: Hub metadata, how it was made, what it costs, and how to load it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from calibration.record import RunRecord
from ptq.report import figures, loading, markdown, wording
from ptq.report.figures import code, plain, table

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".parquet", ".md", ".gz", ".zst")


@dataclass(frozen=True)
class Facts:
    """What a card says of the base model.

    Attributes:
        base_model: its hub id, where the run read a copy from a folder.
        license: an identifier of the hub. language: ISO 639 codes.
    """

    base_model: str | None = None
    license: str | None = None
    language: tuple[str, ...] = ()


def facts_of(folder: Path) -> Facts:
    """License and languages as the card in a model's folder names them; none where there is no readable card."""
    from huggingface_hub.repocard import metadata_load

    file = folder / "README.md"
    try:
        data = (metadata_load(file) if file.is_file() else None) or {}
    except (OSError, ValueError, yaml.YAMLError):  # somebody's card: the run does not depend on it
        return Facts()
    license_id, language = data.get("license"), data.get("language") or ()
    languages = (language,) if isinstance(language, str) else tuple(map(str, language))
    return Facts(license=license_id if isinstance(license_id, str) else None, language=languages)


def model_card(
    record: RunRecord, base_model: str, files: Mapping[str, int] | None = None, facts: Facts | None = None
) -> str:
    """The card as Markdown with YAML front matter.

    Args:
        record: of the run that wrote the checkpoint.
        base_model: Hub id, or the folder the run read: a folder is named in the text but is no metadata.
        files: name to bytes of the files beside the card, listed in name order.
        facts: what is known of the base model; a wrong license is worse than none.
    """
    sections = [_front_matter(record, base_model, facts or Facts()), _title(record, base_model)]
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


def _front_matter(record: RunRecord, base_model: str, facts: Facts) -> str:
    from huggingface_hub import ModelCardData

    base = facts.base_model or (base_model if _HUB_ID.fullmatch(base_model) else None)
    data = ModelCardData(
        language=list(facts.language) or None,
        license=facts.license,
        base_model=base,
        base_model_relation="quantized" if base else None,
        library_name=_library(record),
        pipeline_tag="text-generation",
        tags=_tags(record),
        datasets=_datasets(record) or None,
        **_results(record, base_model),
    )
    return f"---\n{data.to_yaml()}\n---"


def _datasets(record: RunRecord) -> list[str]:
    """The calibration set by its hub id, where it has one: ``Salesforce/wikitext`` of a source and configuration."""
    name, _, _ = str(record.calibration.get("dataset", "")).partition(" ")
    known = "/" in name and _HUB_ID.fullmatch(name) and not name.lower().endswith(_FILE_SUFFIXES)
    return [name] if known else []


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


def _results(record: RunRecord, base_model: str) -> dict[str, Any]:
    """Perplexities as the hub's model index has them, with the name they stand under; nothing where none is finite."""
    from huggingface_hub import EvalResult

    found = []
    for result in wording.results(record.evaluations):
        own, protocol = result.quantized, result.protocol
        if own is None or not math.isfinite(own.perplexity):
            continue
        kind = re.sub(r"[^a-z0-9]+", "-", protocol.dataset.lower()).strip("-") or "text"
        label = f"PPL, {protocol.window}-token windows, protocol {protocol.name}"
        values = {label: own.perplexity}
        if result.reference is not None and math.isfinite(result.reference):
            values[f"PPL of the unquantized model, {label[5:]}"] = result.reference
        found += [
            EvalResult(
                task_type="text-generation",
                task_name="Language modelling",
                dataset_type=kind,
                dataset_name=protocol.dataset,
                metric_type="perplexity",
                metric_name=name,
                metric_value=round(value, 4),
            )
            for name, value in values.items()
        ]
    return {"model_name": _name(record, base_model), "eval_results": found} if found else {}
