"""Pairs between which a scale per channel cancels: found by trying, and kept only where random scales prove them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from calibration.architectures.derivation.inputs import Observed, Readers, close, is_linear, key, widths
from calibration.architectures.spec import Balance, Heads
from calibration.model.classes import setting

MEAN_OF_LOG = 0.7


@dataclass(frozen=True)
class NormFacts:
    """How a norm that absorbs scales works: what it adds to its stored gain, whether it subtracts the mean."""

    offset: float
    subtracts_mean: bool
    inner: bool


def scales(n: int, generator: torch.Generator) -> torch.Tensor:
    """Positive, far from one, ``[n]``."""
    return torch.exp(MEAN_OF_LOG * torch.randn(n, generator=generator))


def norm_pair(seen: Observed, group: Readers) -> tuple[Balance, NormFacts] | str:
    """The norm in front of a group, or why no scale can go into it."""
    assert group.norm is not None
    block, generator = seen.block, seen.probe.generator
    norm = block.get_submodule(group.norm)
    assert isinstance(norm.weight, torch.Tensor)
    s = scales(norm.weight.numel(), generator)
    readers = dict.fromkeys(group.paths, lambda x: x * s)
    names = ", ".join(group.linears) or group.paths[0]
    if not seen.unchanged(readers, {group.norm: lambda y: y / s}):
        return f"{names}: something else reads the output of {group.norm}"
    if seen.unchanged(readers, {}):
        return f"{names}: nothing depends on them"
    curved = next((path for path in group.paths if not _takes_scales(seen, path, s)), None)
    if curved is not None:
        return f"{names}: {curved} reads the same tensor, and does not multiply it by its weight alone"
    facts = _norm_facts(seen, group.norm, s, group.inner)
    if facts is None:
        return f"{names}: the gain of {group.norm} is not a plain factor"
    experts = seen.probe.experts.get(seen.index)
    inside = (
        [f"{experts.module}.{e}.{name}" for e in range(experts.count) for name in (experts.gate, experts.up)]
        if experts and group.experts
        else []
    )
    return Balance(group.norm, (*group.linears, *inside, *group.routers), "norm"), facts


def _takes_scales(seen: Observed, path: str, s: torch.Tensor) -> bool:
    """Whether scaled columns of a reader's weight do what a scaled input does."""
    module = seen.block.get_submodule(path)
    experts = seen.probe.experts.get(seen.index)
    if type(module) is nn.Linear or (experts is not None and path == experts.module):
        return True
    call = next(call for call in seen.calls if call.path == path)
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    with torch.no_grad():
        wanted = _tensors(module(call.entered[0] * s, *call.entered[1:]))
        kept = weight.data.clone()
        weight.data.mul_(s if isinstance(module, nn.Linear) or not is_linear(module) else s[:, None])
        found = _tensors(module(*call.entered))
        weight.data.copy_(kept)
    return all(close(a.float(), b.float()) for a, b in zip(wanted, found, strict=True))


def _tensors(result: object) -> list[torch.Tensor]:
    parts = result if isinstance(result, tuple) else (result,)
    return [part for part in parts if isinstance(part, torch.Tensor)]


def _norm_facts(seen: Observed, path: str, s: torch.Tensor, inner: bool) -> NormFacts | None:
    norm = seen.block.get_submodule(path)
    call = next(call for call in seen.calls if call.path == path)
    weight, bias = norm.weight, norm._parameters.get("bias")
    assert isinstance(weight, nn.Parameter) and call.left is not None
    mean = close(norm(call.entered[0]), norm(call.entered[0] + 3.0))
    kept, kept_bias = weight.data.clone(), None if bias is None else bias.data.clone()
    for offset in (0.0, 1.0):
        with torch.no_grad():
            weight.data.copy_((kept + offset) / s - offset)
            if bias is not None:
                bias.data.div_(s)
            fits = close(call.left / s, norm(*call.entered))
            weight.data.copy_(kept)
            if bias is not None and kept_bias is not None:
                bias.data.copy_(kept_bias)
        if fits:
            return NormFacts(offset, mean, inner)
    return None


def linear_pair(seen: Observed, consumer: str) -> Balance | None:
    """The linear in front of a linear whose rows take the scales of its columns, or None."""
    module, generator = seen.linears[consumer], seen.probe.generator
    order = list(seen.linears)
    candidates = order[: order.index(consumer)][::-1]
    fed = next((group for group in seen.groups if consumer in group.linears), None)
    if fed is not None and fed.paths != [consumer]:
        return None
    for producer in candidates:
        for rows, heads in _row_sets(seen, seen.linears[producer], module):
            n = widths(module)[1] if heads is None else heads.key_value * heads.width
            if _cancels(seen, producer, consumer, rows, heads, scales(n, generator)):
                return _kind_of_pair(seen, producer, consumer, rows, heads)
    return None


def _cancels(
    seen: Observed,
    producer: str,
    consumer: str,
    rows: tuple[int, int] | None,
    heads: Heads | None,
    s: torch.Tensor,
) -> bool:
    """The pair cancels, and the consumer alone does not leave the block as it is."""
    spread = heads.spread(s) if heads is not None else s
    entering = {consumer: lambda x: x * spread}

    def divided(y: torch.Tensor) -> torch.Tensor:
        first, last = rows or (0, y.shape[-1])
        return torch.cat([y[..., :first], y[..., first:last] / s, y[..., last:]], dim=-1)

    return seen.unchanged(entering, {producer: divided}) and not seen.unchanged(entering, {})


def _kind_of_pair(
    seen: Observed, producer: str, consumer: str, rows: tuple[int, int] | None, heads: Heads | None
) -> Balance | None:
    """A pair of attention values lets any rotation of a head through as well; a product does not."""
    for layout in [heads] if heads is not None else _same_heads(seen, widths(seen.linears[consumer])[1]):
        turn = torch.linalg.qr(torch.randn(layout.width, layout.width, generator=seen.probe.generator))[0]

        def turned(x: torch.Tensor, turn: torch.Tensor = turn) -> torch.Tensor:
            return (x.unflatten(-1, (-1, len(turn))) @ turn).flatten(-2)

        def made(y: torch.Tensor, turned: Callable[[torch.Tensor], torch.Tensor] = turned) -> torch.Tensor:
            first, last = rows or (0, y.shape[-1])
            return torch.cat([y[..., :first], turned(y[..., first:last]), y[..., last:]], dim=-1)

        def read(x: torch.Tensor, turn: torch.Tensor = turn) -> torch.Tensor:
            return (x.unflatten(-1, (-1, len(turn))) @ turn.T).flatten(-2)

        if seen.unchanged({consumer: read}, {producer: made}):
            return Balance(producer, (consumer,), "value", rows=rows, heads=layout)
    return Balance(producer, (consumer,), "linear", rows=rows) if heads is None else None


def _counts(seen: Observed, names: tuple[str, ...]) -> list[int]:
    values = (setting(seen.probe.text, name) for name in names)
    return [int(v) for v in values if isinstance(v, int) and v > 0]


def _head_widths(seen: Observed, inside: int) -> list[int]:
    queries = _counts(seen, ("num_attention_heads", "n_head", "num_heads"))
    found = _counts(seen, ("v_head_dim", "head_dim")) + [inside // q for q in queries if inside % q == 0]
    return [w for w in dict.fromkeys(found) if inside % w == 0]


def _same_heads(seen: Observed, inside: int) -> Iterator[Heads]:
    for width in _head_widths(seen, inside):
        yield Heads(inside // width, inside // width, width)


def _row_sets(
    seen: Observed, producer: nn.Module, consumer: nn.Module
) -> Iterator[tuple[tuple[int, int] | None, Heads | None]]:
    """Rows of the producer that may make the consumer's input: all, a half, the last, those of shared values."""
    out, inside = widths(producer)[0], widths(consumer)[1]
    if out == inside:
        yield None, None
    elif out == 2 * inside:
        yield (inside, out), None
        yield (0, inside), None
    elif out > inside:
        yield (out - inside, out), None
    values = [*_counts(seen, ("num_key_value_heads", "num_kv_heads", "n_head_kv")), 1]
    for width in _head_widths(seen, inside):
        query = inside // width
        for count in dict.fromkeys(values):
            if query % count or count == query or out < count * width:
                continue
            first = out - count * width
            yield (None if first == 0 else (first, out)), Heads(query, count, width)


def activations(seen: Observed) -> dict[str, str]:
    """Path of every module without parameters that is one of transformers' activations -> its name."""
    from transformers.activations import ACT2FN

    names = [
        setting(seen.probe.text, entry)
        for entry in ("hidden_activation", "hidden_act", "activation_function", "activation", "mlp_hidden_act")
    ]
    known = {type(ACT2FN[name]): name for name in names if isinstance(name, str) and name in ACT2FN}
    called = dict.fromkeys(call.path for call in seen.calls)
    modules = {path: seen.block.get_submodule(path) for path in called}
    return {path: known[type(m)] for path, m in modules.items() if type(m) in known and not list(m.parameters())}


def produced_by(seen: Observed, tensor: torch.Tensor) -> str | None:
    """The linear whose output, or the beginning of whose output, a tensor is."""
    for call in reversed(seen.calls):
        if call.path in seen.linears and call.left is not None and call.left.data_ptr() == key(tensor)[0]:
            return call.path
    return None


def why_alone(seen: Observed, consumer: str) -> str:
    """Why a linear has no pair, as far as it shows."""
    call = next(call for call in seen.calls if call.path == consumer)
    for path, name in activations(seen).items():
        made = next(c.left for c in seen.calls if c.path == path)
        if made is not None and key(made) == key(call.entered[0]):
            return f"its input passes {name}, which does not commute with a scale"
    return "no norm or linear in front of it was proved to take its scales"
