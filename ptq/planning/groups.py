"""Group sizes that nobody named: the largest on offer that divides the linear."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ptq.formats.registry import Format
from ptq.linears import ModelLayout, PlannedLinear
from ptq.planning.recipe import Recipe
from ptq.scheme import GROUP_SIZES, Grouping, QuantScheme


def with_any_group(scheme: QuantScheme, *shapes: tuple[int, int]) -> QuantScheme:
    """The scheme with the largest group size, its own or smaller, that divides the lines of matrices of all these
    shapes ``(out, in)``; a step per line where none does. Schemes without groups, and those whose format fixes the size
    of a group, are as they were."""
    w = scheme.weights
    if w.grouping.kind != "group" or w.grouping.size not in GROUP_SIZES or w.scale_format in ("e8m0", "e4m3"):
        return scheme
    lengths = [w.grouping.length(shape) for shape in shapes]
    sizes = sorted((size for size in GROUP_SIZES if size <= w.grouping.size), reverse=True)
    found = next((size for size in sizes if not any(length % size for length in lengths)), None)
    grouping = replace(w.grouping, size=found) if found else Grouping("channel", None, w.grouping.axis)
    return replace(scheme, weights=replace(w, grouping=grouping))


def fit_groups(layout: ModelLayout, recipe: Recipe, fmt: Format) -> ModelLayout:
    """The layout with group sizes that divide, where its rules leave them open.

    Linears that engines run as one matrix (q, k and v; gate and up) read the same input and so get the same size; the
    experts of a block get one size together. Where the format does not hold what comes out, because a file of it has
    one scheme, all linears get one size.
    """
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
    """Which linears have another group size than the default, in words."""
    found: dict[tuple[int | None, int | None, int], dict[str, None]] = {}
    for old, new in zip(before, after, strict=True):
        if old.scheme is not None and new.scheme is not None and old.scheme != new.scheme:
            asked, grouping = old.scheme.weights.grouping.size, new.scheme.weights.grouping
            key = (grouping.size, asked, grouping.length(new.shape))
            found.setdefault(key, {})[new.name.rsplit(".", 1)[-1]] = None
    for (size, asked, length), names in found.items():
        taken = "a step per row" if size is None else f"group {size}"
        reason = f"{length} inputs" if length % (asked or 1) else "inputs of others that share a size"
        yield f"{taken} where {asked} does not divide ({reason}): {', '.join(names)}"


def _is_open(linear: PlannedLinear, recipe: Recipe) -> bool:
    return next(rule for rule in recipe.rules if rule.matches(linear.name)).any_group


def _with_groups(
    layout: ModelLayout, linears: Iterable[PlannedLinear], shapes: Mapping[str, Sequence[tuple[int, int]]]
) -> ModelLayout:
    return layout.with_schemes({n.name: with_any_group(n.scheme, *shapes[n.name]) for n in linears if n.scheme})
