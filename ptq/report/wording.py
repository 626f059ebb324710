"""What a record says, as sentences and small tables of text that every view shares.

Mappings are shown in key order: a record read back from its file has lost any other, and must give the same bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from calibration.errors import ToolkitError
from calibration.record import Evaluation, LinearRecord, Protocol, RunRecord
from ptq import catalogue
from ptq.report import figures
from ptq.scheme import BLOCK, SCALE_BITS, SUPER_WIDTH, QuantScheme, parse_scheme

FLOAT, QUANTIZED = "float", "quantized"

_GRIDS = {
    "asym_minmax": "asymmetric grid between the smallest and the largest weight",
    "asym_zero_in": "asymmetric grid that contains zero",
    "asym_float": "asymmetric grid with float zero points",
    "sym_full": "symmetric grid with all levels in use",
    "sym_restricted": "symmetric grid without the lowest level",
    "sym_gptq": "symmetric grid with positive steps",
    "sym_signed": "symmetric grid",
    "binary": "two values per row elsewhere, times a factor per column",
}
_PROTOCOLS = {
    "gptq": "disjoint windows",
    "llama.cpp": "second half of each window scored",
    "hf-stride": "sliding window",
}


@dataclass(frozen=True)
class Metric:
    """The error that a report shows: the output error where calibration data gave one, else that of the weights."""

    field: str
    name: str
    definition: str

    def of(self, linear: LinearRecord) -> float | None:
        value: float | None = getattr(linear, self.field)
        return value


OUTPUT_ERROR = Metric("relative_error", "output error", "‖(Q(W) − W) X‖² / ‖W X‖² on the calibration inputs")
WEIGHT_ERROR = Metric("weight_error", "weight error", "‖Q(W) − W‖² / ‖W‖², no calibration data were gathered")


@dataclass(frozen=True)
class Results:
    """The evaluations under one protocol: the float model first, this run last, baselines between."""

    protocol: Protocol
    evaluations: tuple[Evaluation, ...]
    reference: float | None

    @property
    def quantized(self) -> Evaluation | None:
        return next((e for e in self.evaluations if e.model == QUANTIZED), None)


def metric(record: RunRecord) -> Metric:
    return OUTPUT_ERROR if any(e.relative_error is not None for e in record.linears) else WEIGHT_ERROR


def worst(record: RunRecord, n: int) -> list[LinearRecord]:
    """The ``n`` linears with the largest error; ties in name order."""
    by = metric(record)
    known = [e for e in record.linears if by.of(e) is not None]
    return sorted(known, key=lambda e: (-(by.of(e) or 0.0), e.name))[:n]


def results(evaluations: Iterable[Evaluation]) -> list[Results]:
    """Evaluations grouped by protocol, in the order in which protocols first appear."""
    groups: dict[Protocol, list[Evaluation]] = {}
    for evaluation in evaluations:
        groups.setdefault(evaluation.protocol, []).append(evaluation)
    rank = {FLOAT: 0, QUANTIZED: 2}
    return [
        Results(protocol, tuple(sorted(found, key=lambda e: rank.get(e.model, 1))), float_perplexity(found))
        for protocol, found in groups.items()
    ]


def float_perplexity(evaluations: Iterable[Evaluation]) -> float | None:
    """Of evaluations under one protocol: the float model's own, or the reference of a divergence."""
    found = list(evaluations)
    own = [e.perplexity for e in found if e.model == FLOAT]
    references = [e.divergence.reference_perplexity for e in found if e.divergence is not None]
    return next(iter(own + references), None)


def model_label(model: str) -> str:
    return {QUANTIZED: "this run"}.get(model, _titled(model))


def protocol_title(protocol: Protocol) -> str:
    return f"{protocol.dataset}, {figures.count(protocol.window)}-token windows"


def protocol_sentence(protocol: Protocol) -> str:
    """The whole protocol: all that somebody needs to measure the same number."""
    tokens = "with" if protocol.special_tokens else "without"
    bos = "BOS in front of every window, " if protocol.bos else ""
    joined = {"file as it is": "file taken as it is"}.get(protocol.join, f"rows joined with {protocol.join!r}")
    style = f" ({_PROTOCOLS[protocol.name]})" if protocol.name in _PROTOCOLS else ""
    return (
        f"Protocol {protocol.name}{style}: {protocol.dataset}, {joined}, {tokens} special tokens; window "
        f"{figures.count(protocol.window)}, stride {figures.count(protocol.stride)}, {bos}"
        f"{figures.count(protocol.tokens_scored)} tokens scored; {protocol.dtype} forward, float32 log-probabilities; "
        f"text fingerprint {protocol.text_fingerprint}."
    )


def read_scheme(text: str) -> QuantScheme | None:
    """The scheme, or None where a newer or foreign record names one that is not known here."""
    try:
        return parse_scheme(text)
    except ToolkitError:
        return None


def scheme_sentence(text: str) -> str:
    """``4-bit integer weights, one 16-bit scale per 128 input columns, symmetric grid``"""
    scheme = read_scheme(text)
    if scheme is None:
        return text
    weights = scheme.weights
    line, run = ("output row", "input columns of a row")
    if weights.grouping.axis == "out":
        line, run = ("input column", "output rows of a column")
    if weights.salient_percent is not None:
        return f"one-bit weights, 4 bits in {weights.salient_percent} % of the input columns, {_GRIDS['binary']}"
    if weights.superblocks:
        kind = f"{SCALE_BITS[weights.scale_format]}-bit scale" + ("" if weights.symmetric else " and minimum")
        run = f"{weights.grouping.size} input columns of a row under float16 ones per {SUPER_WIDTH}"
        return f"{weights.bits}-bit integer weights, one {kind} per {run} (K-quant)"
    share = line if weights.grouping.size is None else f"{weights.grouping.size} {run}"
    share = f"block of {BLOCK} x {BLOCK} weights" if weights.grouping.kind == "block" else share
    zero = "" if weights.symmetric else f" and one {weights.bits}-bit zero point"
    if weights.float_format is not None:
        kind = _SCALES.get(weights.scale_format, "one 16-bit scale")
        return f"{weights.bits}-bit {str(weights.float_format).upper()} float weights, {kind} per {share}"
    return f"{weights.bits}-bit integer weights, one 16-bit scale{zero} per {share}, {_GRIDS[weights.quantizer]}"


_SCALES = {"e8m0": "one power of two (E8M0)", "e4m3": "one scale for the whole matrix and one E4M3 scale"}


def schemes(record: RunRecord) -> list[tuple[str, int, int]]:
    """Each scheme in use with its number of linears and of weights, the most weights first."""
    linears: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for entry in record.linears:
        linears[entry.scheme] += 1
        weights[entry.scheme] += entry.shape[0] * entry.shape[1]
    return sorted(((s, linears[s], weights[s]) for s in linears), key=lambda row: (-row[2], row[0]))


def scheme_label(record: RunRecord) -> str:
    """The scheme in a few characters; what a mixed run mixes, up to two."""
    names = [name for name, _, _ in schemes(record)]
    if len(names) > 2:
        return f"mixed ({names[0]} and {len(names) - 1} others)"
    return " + ".join(names) if names else figures.DASH


def method_label(record: RunRecord) -> str:
    """``AWQ + GPTQ``"""
    names = [str(entry.get("name", "")) for entry in record.recipe.get("passes", [])]
    method = str(record.recipe.get("method") or "+".join(filter(None, names)))
    parts = [part.strip() for part in method.split("+")]
    return " + ".join(map(_titled, parts))


def pass_sentence(entry: Mapping[str, Any]) -> str:
    """What the pass does, in a line; empty for one that is not known here."""
    known = catalogue.named(str(entry.get("name", "")).lower())
    return known.summary if known else ""


def _titled(name: str) -> str:
    known = catalogue.named(name.lower())
    return known.title if known else name


def settings(entry: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The settings of a pass, without its name."""
    return [(key, value(entry[key])) for key in sorted(entry) if key != "name"]


def value(item: Any) -> str:
    """A setting as a person would write it."""
    if isinstance(item, bool):
        return "yes" if item else "no"
    if item is None:
        return "none"
    if isinstance(item, list | tuple):
        return ", ".join(value(i) for i in item) or "none"
    if isinstance(item, Mapping):
        return ", ".join(f"{k} {value(v)}" for k, v in sorted(item.items())) or "none"
    return f"{item:g}" if isinstance(item, float) else str(item)


def rules(record: RunRecord) -> list[tuple[str, str]]:
    """The recipe's scheme rules as (which linears, scheme), the first match first."""
    entries = record.recipe.get("schemes", [])
    return [(e["match"], "left in float" if e["scheme"] == "float" else e["scheme"]) for e in entries]


_CALIBRATION = {
    "dataset": "data",
    "samples": "samples",
    "seq_len": "tokens per sample",
    "tokens": "tokens",
    "seed": "seed",
    "join": "rows joined with",
    "special_tokens": "special tokens",
    "bos": "BOS in front of every window",
    "fingerprint": "fingerprint",
}


def calibration(record: RunRecord) -> list[tuple[str, str]]:
    """What the calibration text was, empty for a data-free run."""
    data: Mapping[str, Any] = record.calibration
    keys = [key for key in _CALIBRATION if key in data] + sorted(
        key for key in data if key not in _CALIBRATION and data[key] != ""
    )
    counts = {"samples", "seq_len", "tokens"}  # a seed is a name, not an amount: no thousands separators
    texts = {"join": repr}
    return [
        (
            _CALIBRATION.get(key, key.replace("_", " ")),
            figures.count(data[key]) if key in counts else texts.get(key, value)(data[key]),
        )
        for key in keys
    ]


def coverage(record: RunRecord) -> str:
    """How much of the model was quantized."""
    total, done = record.model.get("parameters"), record.result.get("quantized_weights")
    linears = figures.count(record.result.get("quantized_linears", len(record.linears)))
    share = f", {100 * done / total:.1f} % of all parameters" if total and done else ""
    return f"{linears} linears" + (f" with {figures.large_count(done)} weights{share}" if done else "")


_ANSWERS = ("yes", "expected", "not expected", "not known", "no")


def loads(record: RunRecord) -> list[tuple[str, bool, str, str]]:
    """(program, whether it should load the result, the answer in a word, conditions or reason), those that do first.

    Answers begin with one of a few words: ``yes, with the package compressed-tensors``, ``no: it reads GGUF only``.
    """
    found = []
    for name, answer in (record.result.get("loads_in") or {}).items():
        word = next((word for word in _ANSWERS if str(answer).startswith(word)), "")
        rest = str(answer)[len(word) :].lstrip(" ,;:")
        found.append((str(name), word in ("yes", "expected"), word or "no", rest))
    return sorted(found, key=lambda entry: (not entry[1], entry[0]))


def answer(word: str, why: str) -> str:
    """One entry of `loads` as text."""
    return f"{word} {why}" if why.startswith("(") else f"{word}: {why}" if why else word
