"""The plan: recipe + headers + architecture table -> what will happen, or every reason why it cannot.

Nothing here reads a tensor. ``--dry-run`` prints the plan.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from calibration.architectures import ArchitectureSpec
from calibration.bounds import setting_problems
from calibration.errors import PlanError, Problem, ToolkitError, unknown_value
from calibration.model.checkpoint import CheckpointReader
from calibration.walk.passes import Phase, PlanView, check_order, forwards_per_block
from ptq.formats.checks import NATIVE, matching, refuse
from ptq.formats.registry import FORMATS, PREFERRED, Format, choose
from ptq.linears import ModelLayout, PlannedLinear, float_linears
from ptq.planning.activation_plan import activation_problems
from ptq.planning.architecture_remarks import architecture_remarks
from ptq.planning.grid_plan import super_problems
from ptq.planning.groups import fit_groups, group_remarks
from ptq.planning.recipe import Recipe
from ptq.planning.sizes import Sizes, estimate
from ptq.quantized import BINARY
from ptq.scheme import QuantScheme


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before a weight is read.

    Attributes:
        remarks: sentences about what a user may not expect.
        new_biases: full names of biases that the checkpoint does not have and the output will.
    """

    recipe: Recipe
    spec: ArchitectureSpec
    layout: ModelLayout
    format: Format
    format_reason: str
    sizes: Sizes
    needs_data: bool
    remarks: tuple[str, ...]
    new_biases: tuple[str, ...] = ()

    def model_config(self, config: Any) -> Any:
        """The transformers config of the model that runs while the passes work on it: with biases that they add."""
        changed = copy.deepcopy(config)
        for key, value in self.layout.config.items():
            if self.new_biases and value is True and getattr(changed, key, None) is False:
                setattr(changed, key, value)
        return changed

    def with_schemes(self, schemes: Mapping[str, QuantScheme]) -> Plan:
        """The plan as it was carried out: passes chose these schemes, by full name."""
        layout, sizes = self.layout.with_schemes(schemes), self.sizes
        quantized_bytes = round(layout.quantized_bits / 8)
        sizes = replace(
            sizes,
            output_bytes=sizes.output_bytes - sizes.quantized_bytes + quantized_bytes,
            quantized_bytes=quantized_bytes,
            bits_per_weight=layout.quantized_bits / sizes.quantized_weights if sizes.quantized_weights else 0.0,
        )
        return replace(self, layout=layout, sizes=sizes)

    def schemes(self, block: int) -> dict[str, QuantScheme]:
        """Block-relative linear name -> scheme, for the linears that are quantized."""
        prefix = self.spec.prefix(block)
        return {
            linear.name[len(prefix) :]: linear.scheme
            for linear in self.layout.quantized
            if linear.block == block and linear.scheme is not None
        }


def make_plan(
    reader: CheckpointReader,
    config: Any,
    spec: ArchitectureSpec,
    recipe: Recipe,
    *,
    samples: int,
    seq_len: int,
    batch_size: int,
    forward_itemsize: int = 4,
) -> Plan:
    """Resolve every linear, choose and check the format, and estimate what the run costs.

    Args:
        samples, seq_len, batch_size: of calibration.
        forward_itemsize: bytes per value of the forward dtype.

    Raises:
        PlanError: every problem at once.
        ToolkitError: the checkpoint is quantized already, or the format is unknown.
    """
    if reader.config.get("quantization_config"):
        method = reader.config["quantization_config"].get("quant_method")
        raise ToolkitError(
            f"{reader.folder}: already quantized (quant_method '{method}')",
            "start from the float checkpoint; `ptq export` changes the format of a quantized one",
        )
    refused = list(setting_problems(recipe.passes))
    if refused:
        raise PlanError(refused)  # nothing can be planned from such numbers
    linears, problems = _resolve_linears(reader, spec, recipe)
    problems += check_order(recipe.passes)
    changes = {key: value for p in recipe.passes for key, value in p.config_changes(config).items()}
    added = _new_biases(reader, spec, recipe)
    linears = [replace(linear, bias=linear.bias or linear.name in added) for linear in linears]
    layout = ModelLayout(
        config={**reader.config, **changes},
        linears=tuple(linears),
        other_linears=tuple(other_linears(config, spec)),
        blocks=spec.blocks,
        reordered=any(p.reorders for p in recipe.passes),
        dtype=str(_stored_dtype(reader, linears)).removeprefix("torch."),
        parts=tuple(dict.fromkeys(name for p in recipe.passes for name in p.parts)),
    )
    layout = fit_groups(layout, recipe, FORMATS.get(recipe.format or PREFERRED, FORMATS[PREFERRED]))
    view = PlanView(layout, spec, config, recipe.passes, samples * seq_len)
    problems += [problem for step in recipe.passes for problem in step.check(view)]
    problems += [problem for step in recipe.passes for problem in step.refusals(spec)]
    problems += activation_problems(view)
    problems += _binary_problems(view)
    problems += super_problems(view)
    problems = problems or list(_size_problems(reader, layout))  # a wrong setting is not refused for its size as well
    fmt, reason = _format(recipe, _possible_layouts(layout, recipe), problems)
    if fmt.name == "gguf":
        gates = [step.name for step in recipe.passes if Phase.GATE in step.phases]
        problems += [Problem(n, "makes activation thresholds, for which 'gguf' has no place", NATIVE) for n in gates]
    if problems:
        raise PlanError(dict.fromkeys(problems))
    forwards = forwards_per_block(recipe.passes)
    tokens = samples * seq_len, batch_size * seq_len, seq_len
    sizes = estimate(reader, config, spec, layout, recipe, forwards, tokens, forward_itemsize, fmt.name == "native")
    remarks = list(group_remarks(linears, layout.linears))
    remarks += architecture_remarks(reader, spec)
    remarks += [r for p in recipe.passes for r in p.remarks(view)]
    biases = tuple(f"{name}.bias" for name in added)
    return Plan(recipe, spec, layout, fmt, reason, sizes, forwards > 0, tuple(dict.fromkeys(remarks)), biases)


def _new_biases(reader: CheckpointReader, spec: ArchitectureSpec, recipe: Recipe) -> list[str]:
    """Full names of linears that passes give a bias."""
    found = []
    for step in recipe.passes:
        for index in range(spec.n_blocks):
            prefix = spec.prefix(index)
            stored = [n[len(prefix) :] for n in reader.infos if n.startswith(prefix)]
            found += [prefix + name for name in step.new_biases(spec, index, stored)]
    return found


def _stored_dtype(reader: CheckpointReader, linears: list[PlannedLinear]) -> torch.dtype:
    first = next((linear for linear in linears), None)
    return reader.infos[f"{first.name}.weight"].dtype if first else torch.float32


def _resolve_linears(
    reader: CheckpointReader, spec: ArchitectureSpec, recipe: Recipe
) -> tuple[list[PlannedLinear], list[Problem]]:
    """Scheme and shape of every linear; problems where table and headers, or rules and names, do not meet."""
    linears: list[PlannedLinear] = []
    missing: list[str] = []
    unknown: list[str] = []
    by_block: list[list[PlannedLinear]] = [[] for _ in range(spec.n_blocks)]
    for linear in float_linears(spec, reader.infos):
        by_block[linear.block].append(linear)
    for index, found in enumerate(by_block):
        prefix, block = spec.prefix(index), spec.block(index)
        experts = {linear.name.removeprefix(prefix): linear.expert for linear in found}
        transformed = {prefix + name for p in recipe.passes for name in p.input_transforms(block, experts)}
        missing += [f"{linear.name}.weight" for linear in found if not linear.numel]
        for linear in (linear for linear in found if linear.numel):
            rule = next(r for r in recipe.rules if r.matches(linear.name))
            if rule.scheme is None:
                linears.append(replace(linear, why=f"rule '{rule.match}' = float"))
                continue
            part_bits = _part_bits(recipe, linear.shape) + 32 * (linear.name in transformed)
            linears.append(replace(linear, scheme=rule.scheme, part_bits=part_bits))
        missing += [
            f"{prefix}{group.producer}.weight"
            for group in block.balance
            if f"{prefix}{group.producer}.weight" not in reader.infos
        ]
        known = {*block.linears, *block.routers, *block.kept}
        unknown += [
            n
            for n, info in reader.infos.items()
            if n.startswith(prefix)
            and n.endswith(".weight")
            and len(info.shape) == 2
            and n[len(prefix) : -len(".weight")] not in known
        ]
    problems = []
    table = "compare the checkpoint with its original; if it is a variant, extend calibration/architectures/"
    if missing:
        problems.append(Problem(_some(missing), "in the architecture table, but not in the checkpoint", table))
    if unknown:
        problems.append(
            Problem(_some(unknown), "a linear of the blocks that the architecture table does not name", table)
        )
    for rule in recipe.rules[:-1]:
        if not any(rule.matches(linear.name) for linear in linears):
            example = linears[0].name if linears else spec.prefix(0) + "..."
            fix = f"patterns match full names such as '{example}'; '*' stands for any text"
            problems.append(Problem(f"rule '{rule.match}'", "matches no linear", fix))
    return linears, problems


def _part_bits(recipe: Recipe, shape: tuple[int, int]) -> int:
    return sum(p.part_bits(*shape) for p in recipe.passes)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _size_problems(reader: CheckpointReader, layout: ModelLayout) -> Iterable[Problem]:
    """Linears that would not shrink. (Groups that do not divide are found by every format's check.)"""
    for linear in layout.quantized:
        assert linear.scheme is not None
        before = 8 * reader.infos[f"{linear.name}.weight"].dtype.itemsize
        length = linear.scheme.weights.grouping.length(linear.shape)
        if length % linear.scheme.weights.grouping.width(length):
            continue
        after = linear.scheme.bits_per_weight(*linear.shape) + linear.part_bits / linear.numel
        if after >= before:
            yield Problem(
                linear.name,
                f"{after:.2f} bits per weight are not fewer than its {before}",
                'give it a rule scheme = "float"',
            )


def _binary_problems(view: PlanView[ModelLayout]) -> Iterable[Problem]:
    """One-bit schemes under passes that do not make what such a linear has beside its codes."""
    binary = matching(view.layout, lambda linear: linear.scheme.weights.salient_percent is not None)  # type: ignore[union-attr]
    for step in view.passes:
        if not set(BINARY) <= set(step.parts) and set(step.phases) & {Phase.BALANCE, Phase.CHOOSE, Phase.ROUND}:
            fix = "use ptq1.61 for one-bit weights" if Phase.ROUND in step.phases else f"leave {step.name} out"
            yield from refuse(binary, f"{step.name} does not know one-bit weights with salient columns", fix)


def _possible_layouts(layout: ModelLayout, recipe: Recipe) -> list[ModelLayout]:
    """The layout as planned, and as passes that choose schemes may leave it: all linears with the same alternative."""
    layouts = [layout]
    for step in recipe.passes:
        options = {n.name: step.alternatives(n.scheme, n.shape) for n in layout.quantized if n.scheme is not None}
        count = max((len(schemes) for schemes in options.values()), default=0)
        layouts += [
            layout.with_schemes({name: schemes[i] for name, schemes in options.items() if i < len(schemes)})
            for i in range(count)
        ]
    return layouts


def _format(recipe: Recipe, layouts: list[ModelLayout], problems: list[Problem]) -> tuple[Format, str]:
    """The format asked for, or the first that holds every layout; what speaks against it goes into ``problems``."""
    if recipe.format is None:
        refused = next((possible for possible in layouts if FORMATS[PREFERRED].check(possible)), layouts[0])
        fmt, reason = choose(refused)
        for possible in layouts:
            problems += fmt.check(possible)
        return fmt, reason
    if recipe.format not in FORMATS:
        raise unknown_value("--format", recipe.format, FORMATS)
    fmt = FORMATS[recipe.format]
    for possible in layouts:
        problems += fmt.check(possible)
    return fmt, "asked for"


def other_linears(config: Any, spec: ArchitectureSpec) -> Iterable[str]:
    """Linears outside the table's list that a format has to name as left alone."""
    if "lm_head" not in spec.other_linears:
        yield "lm_head"
    for index in range(spec.n_blocks):
        for router in spec.block(index).routers:
            yield spec.prefix(index) + router
    yield from spec.other_linears
    if getattr(config, "word_embed_proj_dim", None) not in (None, getattr(config, "hidden_size", None)):
        yield from ("model.decoder.project_in", "model.decoder.project_out")
