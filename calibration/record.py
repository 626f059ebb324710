"""The run record: what was run, on what, with which numbers. Reports are views of it and compute nothing.

Two files hold it. ``report.json`` is a function of the inputs alone: the same run writes the same bytes, resumed or
not. ``timings.json`` has what differs from run to run: seconds and memory.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calibration.errors import ToolkitError, foreign
from calibration.model.reading import read_json
from calibration.model.typed import Count, Positive, Size, built
from calibration.recorded import CalibrationFacts, LeftFacts, ModelFacts, RecipeFacts, ResultFacts
from calibration.shown import Shown

SCHEMA_VERSION = 1
REPORT_FILE = "report.json"
TIMINGS_FILE = "timings.json"
_NO_RUN = "name the output folder of a finished `ptq quantize` run"


@dataclass(frozen=True)
class Protocol:
    """Everything that decides what a perplexity means. Two numbers compare only where their protocols are equal.

    Attributes:
        name: ``gptq`` (disjoint windows), ``llama.cpp`` or ``hf-stride``.
        dataset: name or file name of the text, with its split and revision where it has them.
        text_fingerprint: sha256 (first 16 hex digits) of the UTF-8 text that was tokenized.
        join: how rows became one text: ``"\\n\\n"``, ``" "``, or ``file as it is``.
        special_tokens: whether the tokenizer added its special tokens.
        window, stride: tokens.
        tokens_scored: targets that entered the mean.
        dtype: of the forward pass. Log-probabilities are always float32.
        bos: whether BOS stands in place of the first token of every window.
    """

    name: str
    dataset: str
    text_fingerprint: str
    join: str
    special_tokens: bool
    window: int
    stride: int
    tokens_scored: int
    dtype: str
    bos: bool = False

    def differences(self, other: Protocol) -> dict[str, tuple[Any, Any]]:
        """The fields in which two protocols differ, with both values."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return {k: (mine[k], theirs[k]) for k in mine if mine[k] != theirs[k]}


@dataclass(frozen=True)
class Divergence:
    """Distance from the reference model on the same tokens (natural logarithms, float32 log-softmax).

    Attributes:
        kl_mean, kl_p99: KL(reference || model) in nats, mean and 99th percentile over scored tokens.
        top1_agreement: fraction of scored positions where both models prefer the same token.
        delta_nll: mean NLL difference (model - reference) in nats per token.
        delta_nll_se: its paired standard error over windows (0 where there is one window).
        reference_perplexity: of the reference, on the same tokens.
        kl_se: standard error of ``kl_mean`` over windows (0 where there is one, and in records that do not say).
    """

    kl_mean: float
    kl_p99: float
    top1_agreement: float
    delta_nll: float
    delta_nll_se: float
    reference_perplexity: float
    kl_se: float = 0.0


@dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """One model scored under one protocol. ``model`` says which: ``float``, ``quantized`` or a name.

    ``nll`` is the total negative log-likelihood in nats; words and bytes are those of the text that was scored, so
    that word and byte perplexities can be derived. ``windows`` were scored (0 in records that do not say). Of a model
    with activation thresholds, ``pruned`` has the share of values pruned on this text by kind of site (``down_proj
    input``), and ``weights_skipped`` the share of the blocks' weights that a decoded token need not read.
    """

    model: str
    protocol: Protocol
    perplexity: float
    nll: float
    words: int
    bytes: int
    divergence: Divergence | None = None
    path: str = "float"  # how linears were computed: "float", or the kernels used, e.g. "reference x 42"
    pruned: dict[str, float] = field(default_factory=dict)
    weights_skipped: float | None = None
    windows: int = 0

    def facts(self) -> Mapping[str, object]:
        p, d = self.protocol, self.divergence
        found: dict[str, object] = {
            "perplexity": f"{self.perplexity:.4f}",
            "text": p.dataset,
            "protocol": f"{p.name}, window {p.window}, {p.tokens_scored} tokens scored, {p.dtype}",
            "linears": self.path,
        }
        if d is not None:
            found["reference perplexity"] = f"{d.reference_perplexity:.4f}"
            found["KL to the reference"] = f"{d.kl_mean:.6f} nats"
            found["top-1 agreement"] = f"{d.top1_agreement:.2%}"
        if self.weights_skipped is not None:
            found["weights skipped"] = f"{self.weights_skipped:.2%} per decoded token"
        return found


@dataclass(frozen=True)
class LinearRecord:
    """One quantized linear.

    Attributes:
        name: full name in the checkpoint, without ``.weight``.
        block: index of the decoder block.
        shape: ``[out, in]``.
        relative_error: ||(Q(W) - W) X||^2 / ||W X||^2 on the calibration inputs, from the Gram matrix; None where no
            data were gathered (plain RTN gathers none).
        weight_error: ||Q(W) - W||^2 / ||W||^2.
        notes: what the passes reported, e.g. ``{"awq.alpha": 0.45}``.
    """

    name: str
    block: Count
    shape: tuple[Size, Size]
    scheme: str
    bits_per_weight: Positive
    weight_error: float
    relative_error: float | None = None
    notes: dict[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class RunRecord(Shown):
    """The whole run. Every field is plain JSON (`calibration.recorded`) or one of the dataclasses above.

    Attributes:
        model, recipe, calibration, result: what was quantized, how, on which text (empty if data-free), to what.
        left: everything that stayed in float.
        versions: of this toolkit and the libraries below it.
    """

    model: ModelFacts
    recipe: RecipeFacts
    calibration: CalibrationFacts
    result: ResultFacts
    linears: tuple[LinearRecord, ...]
    left: tuple[LeftFacts, ...]
    evaluations: tuple[Evaluation, ...]
    versions: dict[str, str]
    schema_version: int = SCHEMA_VERSION

    def facts(self) -> Mapping[str, object]:
        before, result = self.model["bytes"], self.result
        scores = {f"{e.model} perplexity": f"{e.perplexity:.4f}" for e in self.evaluations}
        kl = next((f"{e.divergence.kl_mean:.5f} nats" for e in self.evaluations if e.divergence is not None), None)
        return {
            "model": self.model["name"],
            "method": self.recipe["method"],
            "scheme": ", ".join(dict.fromkeys(entry["scheme"] for entry in self.recipe["schemes"])),
            "format": result["format"],
            "linears": f"{result['quantized_linears']} quantized, {result['verified']} read back and compared",
            "bits per weight": f"{result['bits_per_weight']:.4f}",
            "size": f"{before / 1e6:.2f} MB -> {result['bytes'] / 1e6:.2f} MB",
            **scores,
            **({} if kl is None else {"KL to the float model": kl}),
        }

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"


@dataclass(frozen=True)
class Timings:
    """What differs between two runs of the same thing.

    Attributes:
        seconds: wall time of the whole run; ``stages`` splits it by name.
        peak_rss_bytes: highest resident set; ``base_rss_bytes`` what interpreter and libraries took when it began.
        device, threads: where it ran.
        resumed_from: number of blocks that were already there.
        processes: that shared the run.
        wire_bytes: of tensors that the first of them sent to others and received from them.
    """

    seconds: float
    stages: dict[str, float]
    peak_rss_bytes: int
    base_rss_bytes: int
    device: str
    threads: int
    resumed_from: int = 0
    processes: int = 1
    wire_bytes: int = 0

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"


def read_record(run: Path) -> RunRecord:
    """``report.json`` of a run (its folder, or the file itself).

    Raises:
        ToolkitError: no such file, not JSON, written by a newer schema, or damaged.
    """
    path = run if run.suffix == ".json" else run / REPORT_FILE
    data = read_json(path, _NO_RUN)
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ToolkitError(
            f"{path}: schema version {data.get('schema_version')}, this version reads {SCHEMA_VERSION}",
            "compare runs written by the same version of ptq, or repeat the run",
        )
    with foreign(f"{path}: damaged", _NO_RUN):
        return built(RunRecord, data)


def read_timings(run: Path) -> Timings | None:
    """``timings.json`` beside a record, or None where there is none."""
    folder = run.parent if run.suffix == ".json" else run
    path = folder / TIMINGS_FILE
    if not path.exists():
        return None
    with foreign(f"{path}: damaged", _NO_RUN):
        return built(Timings, read_json(path, _NO_RUN))
