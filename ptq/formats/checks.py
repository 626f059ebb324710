"""Reasons why a format cannot hold a model, shared by several formats, and scales that are never rounded again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch

from calibration.errors import Problem, ToolkitError
from ptq.linears import ModelLayout, PlannedLinear
from ptq.quantized import LORA
from ptq.scheme import GROUP_SIZES, NARROW_SCALES, SUPER_WIDTH

NATIVE = "use --format native"  # holds every layout, so it is a way out of every refusal
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def summary(names: Iterable[str]) -> str:
    """Names with a ``*`` for indices of blocks and experts, each pattern once; a lone name stays as it is."""
    patterns: dict[str, list[str]] = {}
    for name in names:
        patterns.setdefault(_NUMBER.sub("*", name), []).append(name)
    return ", ".join(found[0] if len(found) == 1 else pattern for pattern, found in patterns.items())


def refuse(linears: Iterable[PlannedLinear], reason: str, fix: str) -> list[Problem]:
    """One problem that names these linears, or none where there are none."""
    found = [linear.name for linear in linears]
    return [Problem(summary(found), reason, fix)] if found else []


def matching(layout: ModelLayout, condition: Callable[[PlannedLinear], bool]) -> list[PlannedLinear]:
    """The quantized linears for which the condition holds."""
    return [linear for linear in layout.quantized if condition(linear)]


def bits_problems(layout: ModelLayout, allowed: tuple[int, ...], format_name: str) -> list[Problem]:
    """Widths that the format does not know."""
    wrong = matching(layout, lambda linear: linear.scheme.weights.bits not in allowed)  # type: ignore[union-attr]
    widths = sorted({linear.scheme.weights.bits for linear in wrong if linear.scheme is not None})
    reason = f"{' and '.join(map(str, widths))}-bit weights have no place in '{format_name}'"
    return refuse(wrong, reason, f"use {' or '.join(map(str, allowed))} bits, or {NATIVE}")


def group_problems(layout: ModelLayout) -> list[Problem]:
    """Groups that do not divide the lines along which they run."""
    problems = []
    for linear in layout.quantized:
        assert linear.scheme is not None
        grouping = linear.scheme.weights.grouping
        length, what = grouping.length(linear.shape), "input columns" if grouping.axis == "in" else "output rows"
        width = SUPER_WIDTH if linear.scheme.weights.superblocks else grouping.width(length)
        if length % width:
            problems.append((linear, f"{length} {what} are not a multiple of group size {width}", length))
    found: list[Problem] = []
    for reason in dict.fromkeys(reason for _, reason, _ in problems):
        same = [entry for entry in problems if entry[1] == reason]
        sizes = [str(size) for size in GROUP_SIZES if same[0][2] % size == 0]
        whole = "gchannel (one step per row)" if "columns" in reason else "icchannel (one step per input column)"
        if any(
            linear.scheme is not None and linear.scheme.weights.scale_format in NARROW_SCALES for linear, _, _ in same
        ):
            choice = "the format fixes its groups: give these linears another scheme, fp4-e2m1-gchannel for one"
            found += refuse((linear for linear, _, _ in same), reason, choice)
            continue
        if same[0][0].scheme is not None and same[0][0].scheme.weights.superblocks:
            fix = f'give these linears scheme = "float" or w8a16-gchannel in a rule, the latter with {NATIVE}'
            found += refuse((linear for linear, _, _ in same), reason, fix)
            continue
        choice = f"use group size {' or '.join(sizes)}, or {whole}" if sizes else f"use {whole}"
        found += refuse((linear for linear, _, _ in same), reason, choice)
    return found


def super_problems(layout: ModelLayout, format_name: str) -> list[Problem]:
    """Grids with super-blocks (K-quants), in a format that has one scale per group."""
    wrong = matching(layout, lambda linear: linear.scheme.weights.superblocks)  # type: ignore[union-attr]
    reason = f"is a K-quant with super-blocks, for which '{format_name}' has no place"
    return refuse(wrong, reason, f"use --format gguf, or {NATIVE}")


def axis_problems(layout: ModelLayout, format_name: str) -> list[Problem]:
    """Groups along the outputs, in a format whose groups are runs of input columns."""
    across = matching(layout, lambda linear: linear.scheme.weights.grouping.axis == "out")  # type: ignore[union-attr]
    reason = f"has groups along its outputs, and '{format_name}' knows only groups along the inputs"
    return refuse(across, reason, f"use g instead of ic in the scheme, or {NATIVE}")


def zero_problems(layout: ModelLayout, format_name: str) -> list[Problem]:
    """Zero points that are floats, in a format whose zero points are codes."""
    floats = matching(layout, lambda linear: linear.scheme.weights.float_zeros)  # type: ignore[union-attr]
    reason = f"has float zero points, and '{format_name}' holds integers"
    return refuse(floats, reason, f"use -asym instead of -asym_float in the scheme, or {NATIVE}")


def float_problems(layout: ModelLayout, format_name: str) -> list[Problem]:
    """Codes that stand for floats, in a format of integers."""
    floats = matching(layout, lambda linear: linear.scheme.weights.float_format is not None)  # type: ignore[union-attr]
    schemes = ", ".join(dict.fromkeys(str(linear.scheme) for linear in floats))
    reason = f"'{format_name}' holds integers, and the codes of {schemes} are floats"
    return refuse(floats, reason, f"use a scheme like w4a16-g128, or {NATIVE}")


def divisor_problems(layout: ModelLayout, rows: int, columns: int, format_name: str) -> list[Problem]:
    """Shapes whose rows (outputs) or columns (inputs) are no multiple of what fills whole words."""
    wrong = matching(layout, lambda linear: bool(linear.shape[0] % rows or linear.shape[1] % columns))
    shapes = ", ".join(dict.fromkeys(f"{linear.shape[0]} x {linear.shape[1]}" for linear in wrong))
    needs = f"outputs to be a multiple of {rows}" + (f" and inputs of {columns}" if columns > 1 else "")
    return refuse(wrong, f"shape {shapes}: '{format_name}' needs {needs}", NATIVE)


def conv1d_problems(layout: ModelLayout, format_name: str) -> list[Problem]:
    """GPT-2's transposed linears, whose class the readers of the format do not replace."""
    reason = f"is a Conv1D, and readers of '{format_name}' replace only Linear modules"
    return refuse(matching(layout, lambda linear: linear.conv1d), reason, NATIVE)


def mixed_problems(layout: ModelLayout, format_name: str) -> list[Problem]:
    """More than one combination of bits, group size and symmetry, in a format that describes one per model."""
    kinds: dict[tuple[int, int | None, bool], list[PlannedLinear]] = {}
    for linear in layout.quantized:
        assert linear.scheme is not None
        w = linear.scheme.weights
        kinds.setdefault((w.bits, w.grouping.size, w.symmetric), []).append(linear)
    if len(kinds) < 2:
        return []
    first, *others = sorted(kinds.values(), key=len, reverse=True)
    reason = f"has another scheme ({{}}) than the other linears ({first[0].scheme}), and '{format_name}' holds one"
    fix = f"give every linear the same scheme, or {NATIVE}"
    return [p for linears in others for p in refuse(linears, reason.format(linears[0].scheme), fix)]


def expert_problems(layout: ModelLayout, format_name: str) -> list[Problem]:
    """Experts, in a format whose reader in transformers replaces Linear modules and finds none inside experts."""
    reason = f"is part of an expert; transformers keeps experts in one tensor that '{format_name}' cannot fill"
    return refuse(matching(layout, lambda linear: linear.expert is not None), reason, NATIVE)


def order_problems(layout: ModelLayout, format_name: str) -> list[Problem]:
    """Groups that follow an activation order, in a format without a place for the group of each column."""
    if not layout.reordered:
        return []
    reason = f"groups follow an activation order, and '{format_name}' has no place for the group of each column"
    return [Problem("group_index", reason, f"round with groups of adjacent columns, or {NATIVE}")]


def activation_problems(layout: ModelLayout, format_name: str) -> list[Problem]:
    """Quantized inputs or a quantized KV cache, in a format that describes weights alone."""
    inputs = matching(layout, lambda linear: linear.scheme.inputs is not None)  # type: ignore[union-attr]
    cache = matching(layout, lambda linear: linear.scheme.cache is not None)  # type: ignore[union-attr]
    reason, fix = f"and '{format_name}' describes weights only", f"use a scheme with a16, or {NATIVE}"
    return [
        *refuse(inputs, f"has quantized inputs, {reason}", fix),
        *refuse(cache, f"has a quantized KV cache, {reason}", fix),
    ]


def part_problems(layout: ModelLayout, format_name: str, held: tuple[str, ...] = ()) -> list[Problem]:
    """Tensors beside the codes, in a format without a place for them; it has one for those in ``held``."""
    parts = [name for name in layout.parts if name not in held]
    reason = f"are tensors beside the codes, and '{format_name}' has no place for them"
    if "hadamard" in layout.parts:
        reason = f"transforms inputs while the model runs, and '{format_name}' has no place for that"
        return [Problem("rotate.online", reason, f"set online = false for rotate in a recipe, or {NATIVE}")]
    low_rank = set(LORA) <= set(layout.parts) and format_name == "compressed-tensors"
    fix = NATIVE + "; `ptq export --adapter` then writes a PEFT adapter beside this format" * low_rank
    return [Problem(", ".join(parts), reason, fix)] if parts else []


def stored_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``scale`` (any shape, float32) in ``dtype``, without rounding.

    Our own scales are exact in bfloat16 and in float16. Those of a file that another tool wrote may not be.

    Raises:
        ToolkitError: ``dtype`` does not hold some scale exactly.
    """
    stored = scale.to(dtype)
    if not torch.equal(stored.float(), scale):
        lost = scale[stored.float() != scale][0]
        raise ToolkitError(
            f"scale {lost.item()!r} is not exact in {dtype}, and scales are never rounded after the codes are made",
            f"{NATIVE}, which stores 16-bit scales of either kind, or quantize the float checkpoint anew",
        )
    return stored
