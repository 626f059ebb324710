"""Group sizes that nobody named: the largest on offer that divides the linear. Rows that K-quants do not divide."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ptq.formats.registry import Format
from ptq.linears import ModelLayout, PlannedLinear
from ptq.planning.recipe import Recipe
from ptq.scheme import GROUP_SIZES, K_QUANTS, NARROW_SCALES, SUPER_WIDTH, Grouping, QuantScheme, parse_scheme

SMALLER = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""What rows get that are no multiple of a K-quant's 256 weights: types with blocks of 32, of at least its bits.
llama.cpp takes the same, but for IQ4_NL in the place of Q4_0."""


def with_any_group(scheme: QuantScheme, *shapes: tuple[int, int]) -> QuantScheme:
    """The scheme with the largest group size, its own or smaller, that divides the lines of matrices of all these
    shapes ``(out, in)``; a step per line where none does. Schemes without groups, and those whose format fixes the size
    of a group, are as they were."""
    w = scheme.weights
    fixed = w.scale_format in NARROW_SCALES or w.superblocks
    if w.grouping.kind != "group" or w.grouping.size not in GROUP_SIZES or fixed:
        return scheme
    lengths = [w.grouping.length(shape) for shape in shapes]
    sizes = sorted((size for size in GROUP_SIZES if size <= w.grouping.size), reverse=True)
    found = next((size for size in sizes if not any(length % size for length in lengths)), None)
    grouping = replace(w.grouping, size=found) if found else Grouping("channel", None, w.grouping.axis)
    return replace(scheme, weights=replace(w, grouping=grouping))


def with_whole_blocks(scheme: QuantScheme, shape: tuple[int, int]) -> QuantScheme:
    """The scheme; for a K-quant whose 256 weights do not divide the rows of a matrix ``(out, in)`` the one in
    `SMALLER`, if that has blocks that do."""
    if not scheme.weights.superblocks or shape[1] % SUPER_WIDTH == 0:
        return scheme
    name = next(name for name, quant in K_QUANTS.items() if quant == scheme.weights)
    smaller = parse_scheme(SMALLER[name]).weights
    return scheme if shape[1] % smaller.grouping.width(shape[1]) else replace(scheme, weights=smaller)


def fit_groups(layout: ModelLayout, recipe: Recipe, fmt: Format) -> ModelLayout:
    """The layout with group sizes that divide, where its rules leave them open, and `with_whole_blocks`.

    Linears that engines run as one matrix (q, k and v; gate and up) read the same input and so get the same size; the
    experts of a block get one size together. Where the format does not hold what comes out, because a file of it has
    one scheme, all linears get one size.
    """
    layout = layout.with_schemes({n.name: with_whole_blocks(n.scheme, n.shape) for n in layout.quantized if n.scheme})
    free = [linear for linear in layout.quantized if _is_open(linear, recipe)]
    experts: dict[int, list[tuple[int, int]]] = {}
    for linear in free:
        if linear.expert is not None:
            experts.setdefault(linear.block, []).append(linear.shape)
    together = {n.name: [n.shape] if n.expert is None else experts[n.block] for n in free}
    fitted = _with_groups(layout, free, together)
    refused = len(list(fmt.check(fitted)))
    if not refused:
        return fitted
    everything = [linear.shape for linear in free]
    uniform = _with_groups(layout, free, dict.fromkeys(together, everything))
    return uniform if len(list(fmt.check(uniform))) < refused else fitted


def group_remarks(before: Sequence[PlannedLinear], after: Sequence[PlannedLinear]) -> Iterable[str]:
    """Which linears have another group size than the default, or another type than a K-quant, in words."""
    found: dict[str, dict[str, None]] = {}
    for old, new in zip(before, after, strict=True):
        if old.scheme is not None and new.scheme is not None and old.scheme != new.scheme:
            remark = _remark(old.scheme, new.scheme, new.shape)
            found.setdefault(remark, {})[new.name.rsplit(".", 1)[-1]] = None
    for remark, names in found.items():
        yield f"{remark}: {', '.join(names)}"


def _remark(old: QuantScheme, new: QuantScheme, shape: tuple[int, int]) -> str:
    asked, grouping = old.weights.grouping.size, new.weights.grouping
    length = grouping.length(shape)
    if old.weights.superblocks:
        name = next(small for small in SMALLER.values() if parse_scheme(small).weights == new.weights)
        return f"{name} where the {SUPER_WIDTH} weights of a block of {old.weights_text} do not divide {length} inputs"
    taken = "a step per row" if grouping.size is None else f"group {grouping.size}"
    reason = f"{length} inputs" if length % (asked or 1) else "inputs of others that share a size"
    return f"{taken} where {asked} does not divide ({reason})"


def _is_open(linear: PlannedLinear, recipe: Recipe) -> bool:
    return next(rule for rule in recipe.rules if rule.matches(linear.name)).any_group


def _with_groups(
    layout: ModelLayout, linears: Iterable[PlannedLinear], shapes: Mapping[str, Sequence[tuple[int, int]]]
) -> ModelLayout:
    return layout.with_schemes({n.name: with_any_group(n.scheme, *shapes[n.name]) for n in linears if n.scheme})
