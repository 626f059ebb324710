"""Whether the residual stream's basis can change: the linears that write to it, and what lies around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import torch
from torch import nn

from calibration.architectures.derivation.inputs import Observed, close, key, widths
from calibration.architectures.derivation.pairs import NormFacts
from calibration.architectures.derivation.probe import ROWS, TOKENS, Probe
from calibration.architectures.spec import Balance, Residual
from calibration.model.watching import Seen, Watch, trace, watching

POST_NORMS = "a norm with gains stands between each sublayer and the residual stream, and gains do not commute with it"
Turn = Callable[[torch.Tensor], torch.Tensor]


def turn(
    width: int, generator: torch.Generator, keep_mean: bool, device: torch.device | None = None
) -> tuple[Turn, Turn]:
    """A random rotation of the last axis and its inverse: two reflections, dense but cheap to apply."""
    normals = torch.randn(2, width, generator=generator).to(device or torch.device("cpu"))
    if keep_mean:
        normals -= normals.mean(dim=1, keepdim=True)
    normals /= normals.norm(dim=1, keepdim=True)

    def reflect(x: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
        return x - 2 * (x @ normal)[..., None] * normal

    def there(x: torch.Tensor) -> torch.Tensor:
        return reflect(reflect(x, normals[0]), normals[1])

    def back(x: torch.Tensor) -> torch.Tensor:
        return reflect(reflect(x, normals[1]), normals[0])

    return there, back


@contextmanager
def rotated_norms(norms: Sequence[tuple[nn.Module, float]], back: Turn) -> Iterator[list[Turn]]:
    """While open, norms ``(module, what it adds to its stored gain)`` multiply by one and add nothing; the functions
    make of what they give on the turned stream what they gave on the stream itself, gain and bias included."""
    kept = [(module, dict(module._parameters)) for module, _ in norms]
    functions = [_behind(module, offset, back) for module, offset in norms]
    for module, offset in norms:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                plain = torch.full_like(parameter, 1.0 - offset if name == "weight" else 0.0)
                module._parameters[name] = nn.Parameter(plain, requires_grad=False)
    try:
        yield functions
    finally:
        for module, parameters in kept:
            module._parameters.update(parameters)


def after(path: str, function: Turn) -> Watch:
    """A function of what leaves a submodule, in its place."""
    return Watch(path, lambda x, positions: function(x), output=True)


def _behind(norm: nn.Module, offset: float, back: Turn) -> Turn:
    assert isinstance(norm.weight, torch.Tensor)
    gain, bias = norm.weight + offset, norm._parameters.get("bias")
    return lambda y: back(y) * gain + (0.0 if bias is None else bias)


def residual_writers(
    seen: Observed, balance: Sequence[Balance], facts: Mapping[str, NormFacts]
) -> tuple[tuple[str, ...], str | None]:
    """The linears whose output is added to the stream, and why its basis cannot change (None where it can, proved)."""
    stream = [g.producer for g in balance if g.kind == "norm" and not facts[g.producer].inner]
    fed = {linear for g in balance if g.kind == "norm" and g.producer in stream for linear in g.consumers}
    makers = {g.producer for g in balance if g.kind != "norm"}
    experts = seen.probe.experts.get(seen.index)
    candidates = [
        path
        for path, module in seen.linears.items()
        if widths(module)[0] == seen.probe.hidden and path not in fed | makers and not _read_next(seen, path)
    ]
    candidates += [experts.module] if experts else []
    last = [
        p
        for g in seen.groups
        if len(g.paths) == 1
        for p in g.linears
        if widths(seen.linears[p])[0] == seen.probe.hidden
    ]
    if not stream:
        return tuple(_downs(seen, last)), "no norm that a scale can go into reads the stream"
    there, back = turn(seen.probe.hidden, seen.probe.generator, any(facts[n].subtracts_mean for n in stream))
    expected, entering = there(seen.output), there(seen.hidden)
    with rotated_norms([(seen.block.get_submodule(n), facts[n].offset) for n in stream], back) as functions:
        leaving = dict(zip(stream, functions, strict=True))
        for dropped in range(min(len(candidates), 3)):
            for kept in combinations(candidates, len(candidates) - dropped):
                if close(expected, seen.changed(entering, {}, {**leaving, **dict.fromkeys(kept, there)})):
                    return tuple(_downs(seen, kept)), None
    if any(_read_next(seen, path) for path in last):
        return tuple(_downs(seen, last)), POST_NORMS
    return tuple(_downs(seen, candidates)), "its linears and norms were not proved to be all that reads and writes it"


def _downs(seen: Observed, paths: Sequence[str]) -> list[str]:
    """Experts by their down projections."""
    experts = seen.probe.experts.get(seen.index)
    found: list[str] = []
    for path in paths:
        if experts is not None and path == experts.module:
            found += [f"{path}.{e}.{experts.down}" for e in range(experts.count)]
        else:
            found.append(path)
    return found


def _read_next(seen: Observed, path: str) -> bool:
    """Whether another module reads what this one makes: it is no last linear of its sublayer."""
    made = [key(call.left) for call in seen.calls if call.path == path and call.left is not None]
    own = f"{path}."
    return any(
        call.entered and key(call.entered[0]) in made and call.path != path and not own.startswith(f"{call.path}.")
        for call in seen.calls
        if list(seen.block.get_submodule(call.path).parameters())
    )


def around(probe: Probe, offset: float, keep_mean: bool) -> Residual | str:
    """Embeddings, final norm and head, where turning all of them leaves the logits as they are; else the reason."""
    there, back = turn(probe.hidden, probe.generator, keep_mean)
    tower = probe.path.rpartition(".")[0]
    tables = [
        path
        for path, module in probe.model.named_modules()
        if isinstance(module, nn.Embedding)
        and path.startswith(tower)
        and not path.startswith(probe.path + ".")
        and module.embedding_dim == probe.hidden
    ]
    head = probe.model.get_output_embeddings()
    head_path = next((path for path, module in probe.model.named_modules() if module is head), None)
    if head_path is None or not tables:
        return "no embedding of the stream's width, or no head"
    plain = _entering(probe, {})
    if not close(there(plain), _entering(probe, dict.fromkeys(tables, there))):
        return "something that does not commute with a rotation stands between the embedding and the stream"
    stream = probe.hidden_states()
    logits, calls = _logits(probe, stream, {})
    norm = next((c.path for c in calls if c.left is not None and _is_final_norm(probe, c, calls, head_path)), None)
    if norm is None:
        return "no norm with a gain stands right before the head"
    with rotated_norms([(probe.model.get_submodule(norm), offset)], back) as functions:
        found = _logits(probe, there(stream), {norm: functions[0]})[0]
    if not close(logits, found):
        return "something that does not commute with a rotation stands between the stream and the head"
    return Residual(tuple(tables), norm, head_path)


def _is_final_norm(probe: Probe, call: Seen, calls: Sequence[Seen], head: str) -> bool:
    weight = probe.model.get_submodule(call.path)._parameters.get("weight")
    if weight is None or weight.ndim != 1 or call.left is None:
        return False
    return any(c.path == head and c.entered and key(c.entered[0]) == key(call.left) for c in calls)


@torch.no_grad()
def _entering(probe: Probe, leaving: Mapping[str, Turn]) -> torch.Tensor:
    """What enters the first block when functions change what the embeddings give."""
    found: list[torch.Tensor] = []
    hidden = torch.zeros(1, TOKENS, probe.hidden)

    def block(x: torch.Tensor) -> torch.Tensor:
        found.append(x.clone())
        return hidden

    _run(probe, block, leaving)
    return found[0]


def _logits(probe: Probe, stream: torch.Tensor, leaving: Mapping[str, Turn]) -> tuple[torch.Tensor, list[Seen]]:
    """Logits of a stream that leaves the last block, and the calls behind it."""
    with trace(probe.model) as calls:
        result = _run(probe, lambda x: stream, leaving)
    return result.logits, calls


@torch.no_grad()
def _run(probe: Probe, block: Callable[[torch.Tensor], torch.Tensor], leaving: Mapping[str, Turn]) -> Any:
    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = block(hidden)
        return (result, None) if probe.tuple_output else result

    for module in probe.blocks:
        module.forward = forward
    watches = [after(path, function) for path, function in leaving.items()]
    ids = torch.arange(TOKENS).remainder(ROWS).view(1, TOKENS)
    try:
        with watching(probe.model, watches):
            return probe.model(ids, use_cache=False)
    finally:
        for module in probe.blocks:
            del module.forward
