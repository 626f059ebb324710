"""A run before it runs: options, model, recipe and plan, resolved from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import torch

from calibration.errors import ToolkitError, unknown_value
from calibration.model.skeleton import build_model, check_placed
from calibration.shown import Shown
from calibration.text.corpora import check_name
from calibration.text.generated import GENERATED
from calibration.walk.token_weights import TokenWeights
from ptq.formats.gguf_file import check_file
from ptq.planning.memory import evaluating_bytes, tokenizing_bytes
from ptq.planning.outside_plan import with_outside
from ptq.planning.plan import Plan, make_plan
from ptq.planning.recipe import method_recipe, read_recipe
from ptq.planning.source import Source, TextOptions, open_source
from ptq.sparse.methods import refuse_sparse

META = torch.device("meta")


@dataclass(frozen=True)
class Options(TextOptions):
    """Everything of a quantization run but the model, the recipe and the folder.

    Attributes:
        evaluate: data set to score the result and the float model on, or None.
        eval_windows: score the first so many of its windows only; None: all.
        unseen_experts: ``error``, or ``rtn`` to round experts without calibration tokens without data.
        token_weights: what calibration tokens count, see `calibration.walk.token_weights`.
        command: the command line, for the record.
        metadata: a GGUF file whose tokenizer a GGUF output takes over.
        embeddings, head: schemes of the token embedding and of the head, or ``float``; None leaves them in float, but
            in GGUF they are q8_0 then.
    """

    evaluate: str | None = None
    unseen_experts: str = "error"
    token_weights: TokenWeights = "norm"
    command: str = ""
    eval_windows: int | None = None
    metadata: Path | None = None
    embeddings: str | None = None
    head: str | None = None


@dataclass(frozen=True, repr=False)
class Job(Source, Shown):
    """A run that passed its plan: everything open, nothing written."""

    options: Options
    plan: Plan

    def facts(self) -> Mapping[str, object]:
        plan, sizes = self.plan, self.plan.sizes
        schemes = dict.fromkeys(str(linear.scheme) for linear in plan.layout.quantized)
        data = f"{self.options.samples} x {self.seq_len} tokens of {self.dataset}" if plan.needs_data else "none"
        return {
            "model": f"{self.name}: {self.spec.family}, {self.spec.n_blocks} blocks, {plan.layout.dtype}",
            "method": plan.recipe.method,
            "scheme": ", ".join(schemes),
            "format": f"{plan.format.name} ({plan.format_reason})",
            "calibration": f"{data}; {sizes.forwards} forward passes per block",
            "size": f"{sizes.float_bytes / 1e6:.2f} MB -> {sizes.output_bytes / 1e6:.2f} MB",
            "bits per weight": f"{sizes.bits_per_weight:.4f}",
            "memory": f"about {sizes.peak_bytes / 1e9:.2f} GB above interpreter and libraries",
            "disk": f"up to {sizes.disk_bytes / 1e9:.2f} GB",
        }

    def to_json(self) -> dict[str, Any]:
        """The numbers of the plan, for ``--json``."""
        layout = self.plan.layout
        schemes = {linear.name: str(linear.scheme) for linear in (*layout.quantized, *layout.outside)}
        named = {"model": self.name, "method": self.plan.recipe.method, "format": self.plan.format.name}
        calibration = {"samples": self.options.samples, "seq_len": self.seq_len, "dataset": self.dataset}
        return {
            **named,
            **asdict(self.plan.sizes),
            "calibration": calibration if self.plan.needs_data else None,
            "schemes": schemes,
            "remarks": list(self.plan.remarks),
        }


def prepare(
    model: str | Path,
    *,
    method: str | None = None,
    scheme: str | None = None,
    recipe: str | Path | None = None,
    format: str | None = None,
    target: float | str | None = None,
    options: Options | None = None,
) -> Job:
    """Resolve model, recipe and plan from headers alone.

    Args:
        target: share of activations that the sparsifying parts of ``method`` prune; see `ptq.sparse.methods`.

    Raises:
        ToolkitError, PlanError: whatever can be refused; a model that has activation thresholds, among others.
    """
    options = options or Options()
    if options.token_weights not in get_args(TokenWeights):
        raise unknown_value("--token-weights", options.token_weights, get_args(TokenWeights))
    if (method is None) == (recipe is None):
        raise ToolkitError("needs either a method or a recipe", "pass --method awq, or --recipe FILE.toml")
    if target is not None and recipe is not None:
        raise ToolkitError("--target and --recipe exclude each other", "write target = 0.5 into the recipe's pass")
    if options.unseen_experts not in ("error", "rtn"):
        raise unknown_value("--unseen-experts", options.unseen_experts, ("error", "rtn"))
    if options.eval_windows is not None and (options.eval_windows < 1 or options.evaluate is None):
        raise ToolkitError(
            f"--eval-windows {options.eval_windows}: less than 1, or nothing to score",
            "pass --eval TEXT and a positive number, or leave it out",
        )
    resolved = (
        read_recipe(Path(recipe), scheme, format)
        if recipe is not None
        else method_recipe(method or "", scheme, format, target)
    )
    source = open_source(model, options)
    refuse_sparse(source.folder)
    plan = make_plan(
        source.reader,
        source.config,
        source.spec,
        resolved,
        samples=options.samples,
        seq_len=source.seq_len,
        batch_size=source.batch_size,
        forward_itemsize=source.dtype.itemsize,
    )
    network = build_model(source.config, source.spec, torch.float32, META)
    check_placed(source.reader.infos, network, source.spec)
    plan = with_outside(plan, source.reader.infos, source.spec, network, options.embeddings, options.head)
    if plan.format.name == "gguf":
        check_file(source.folder, plan.layout.config, options.metadata)
    elif options.metadata is not None:
        raise ToolkitError(f"--metadata {options.metadata}: only GGUF files have it", "use --format gguf")
    if plan.needs_data:
        source.check_text()
    if plan.needs_data and source.dataset == GENERATED:
        note = "the model writes its calibration text, and is in memory for that"
        source = replace(source, notes=(*source.notes, note))
        peak = max(plan.sizes.peak_bytes, source.reader.total_bytes)
        plan = replace(plan, sizes=replace(plan.sizes, peak_bytes=peak))
    if options.evaluate is not None:
        check_name(options.evaluate)
    evaluating = evaluating_bytes(source, options.evaluate, options.eval_windows, plan)
    beside = max(tokenizing_bytes(source, options.evaluate, plan), evaluating)
    plan = replace(plan, sizes=replace(plan.sizes, peak_bytes=max(plan.sizes.peak_bytes, beside)))
    opened = {field.name: getattr(source, field.name) for field in fields(Source)}
    return Job(**{**opened, "options": options}, plan=plan)
