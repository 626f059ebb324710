"""The architecture table's entry of a type that it does not name: derived from the class, and proved."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from calibration.architectures.derivation.inputs import Observed, observe
from calibration.architectures.derivation.pairs import (
    NormFacts,
    activations,
    linear_pair,
    norm_pair,
    produced_by,
    why_alone,
)
from calibration.architectures.derivation.probe import Probe, underivable
from calibration.architectures.derivation.residual import around, residual_writers
from calibration.architectures.spec import (
    ArchitectureSpec,
    Balance,
    BlockSpec,
    Experts,
    FeedForward,
    NormKind,
    Residual,
    SharedInput,
)
from calibration.model.skeleton import release

CLASS_ERRORS = (
    RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError, ImportError, AssertionError,
)  # fmt: skip
SCORES = re.compile(r"(^|[._])(q|k|qk|query|key)(_[ab])?(_proj)?(_with_mqa)?$|qkv|query_key_value|c_attn|Wqkv")


@dataclass(frozen=True)
class _Kind:
    """What one kind of block turned out to be."""

    spec: BlockSpec
    facts: Mapping[str, NormFacts]
    experts: Experts | None
    turns: str | None


@torch.no_grad()
def derive(config: Any) -> ArchitectureSpec:
    """The spec of a transformers config.

    Every pair is accepted only where random scales leave the output of the block unchanged (3e-5 of its largest value,
    float32) and the consumer's scales alone do not; the residual stream only where turning it commutes with the block.
    No checkpoint is read; memory is one block, with one expert.

    Raises:
        ToolkitError: the class has no list of decoder blocks, or cannot be run.
    """
    where = "its class"
    try:
        probe = Probe(config)
        kinds: dict[int, _Kind] = {}
        for index in dict.fromkeys(probe.kinds):
            where = f"block {index}"
            kinds[index] = _derive_kind(observe(probe, index))
            release(probe.blocks[index])
        where = "what lies around the blocks"
        return _spec(probe, kinds)
    except CLASS_ERRORS as error:  # of a class that we know nothing about, called in a way it does not know
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise underivable(config, f"{where} does not run on eight random tokens ({reason})") from None


def _spec(probe: Probe, kinds: Mapping[int, _Kind]) -> ArchitectureSpec:
    stream = [f for kind in kinds.values() for f in kind.facts.values() if not f.inner]
    norm, offsets = _norm_kind(stream), {}
    for kind in kinds.values():
        for path, facts in kind.facts.items():
            if facts.offset != _offset(norm):
                offsets[path] = facts.offset
    reasons = [kind.turns for kind in kinds.values() if kind.turns is not None]
    residual: Residual | str = reasons[0] if reasons else around(probe, _offset(norm), norm == "layer")
    by_index, experts = probe.kinds, {index: kind.experts for index, kind in kinds.items()}
    return ArchitectureSpec(
        family=str(probe.config.model_type),
        blocks=probe.path,
        n_blocks=len(probe.blocks),
        norm=norm,
        block=lambda index: kinds[by_index[index]].spec,
        tuple_output=probe.tuple_output,
        conv1d=any(type(m).__name__ == "Conv1D" for m in probe.blocks.modules()),
        experts=lambda index: experts[by_index[index]],
        residual=residual,
        attention=probe.attention,
        derived=True,
        other_linears=tuple(_other_linears(probe, {i: kind.spec for i, kind in kinds.items()})),
        offsets=offsets,
    )


def _other_linears(probe: Probe, specs: Mapping[int, BlockSpec]) -> Iterator[str]:
    """Linears in no block, the head among them, and those in blocks that are neither quantized nor routers."""
    for path, module in probe.model.named_modules():
        if isinstance(module, nn.Linear) and not path.startswith(probe.path + "."):
            yield path
    for index, first in enumerate(probe.kinds):
        for name in specs[first].kept:
            yield f"{probe.path}.{index}.{name}"


def _norm_kind(facts: Sequence[NormFacts]) -> NormKind:
    if any(f.subtracts_mean for f in facts):
        return "layer"
    return "rms_plus_one" if facts and all(f.offset == 1.0 for f in facts) else "rms"


def _offset(norm: NormKind) -> float:
    return 1.0 if norm == "rms_plus_one" else 0.0


def _derive_kind(seen: Observed) -> _Kind:
    """One block: its inputs, the pairs that were proved, and whether the stream can be turned."""
    balance: list[Balance] = []
    facts: dict[str, NormFacts] = {}
    reasons: list[str] = []
    experts = seen.probe.experts.get(seen.index)
    for group in seen.groups:
        if group.norm is not None:
            found = norm_pair(seen, group)
            if isinstance(found, str):
                reasons.append(found)
            else:
                balance.append(found[0])
                facts[group.norm] = found[1]
        fed = {name for pair in balance for name in pair.consumers}
        for consumer in group.linears if len(group.paths) == 1 else []:
            if consumer not in fed:
                pair = linear_pair(seen, consumer)
                if pair is not None:
                    balance.append(pair)
                elif not any(reason.startswith(f"{consumer}:") for reason in reasons):
                    reasons.append(f"{consumer}: {why_alone(seen, consumer)}")
    if experts is not None:
        balance += [
            Balance(f"{experts.module}.{e}.{experts.up}", (f"{experts.module}.{e}.{experts.down}",), "linear")
            for e in range(experts.count)
        ]
    writes, turns = residual_writers(seen, balance, facts)
    inputs = _inputs(seen, experts)
    linears = [name for shared in inputs for name in shared.linears]
    spec = BlockSpec(
        inputs=inputs,
        balance=tuple(balance),
        writes=tuple(name for name in writes if name in linears),
        routers=tuple(name for group in seen.groups for name in group.routers),
        scores=tuple(name for name in linears if SCORES.search(name)),
        unbalanced=tuple(reasons),
        feed_forward=_feed_forward(seen, balance, experts),
        inner_norms=tuple(path for path, f in facts.items() if f.inner),
        kept=tuple(seen.uncalled),
    )
    return _Kind(spec, facts, experts, turns)


def _inputs(seen: Observed, experts: Experts | None) -> tuple[SharedInput, ...]:
    """Groups of linears, numbered in order of execution; what experts make is read right after what they read."""
    found: list[SharedInput] = []
    stage = 0
    for group in seen.groups:
        if group.linears:
            found.append(SharedInput(tuple(group.linears), stage))
        if group.experts is not None and experts is not None:
            pairs = [
                (f"{experts.module}.{e}.{experts.gate}", f"{experts.module}.{e}.{experts.up}")
                for e in range(experts.count)
            ]
            found += [SharedInput(pair, stage, expert=e) for e, pair in enumerate(pairs)]
            stage += 1
            found += [
                SharedInput((f"{experts.module}.{e}.{experts.down}",), stage, expert=e) for e in range(experts.count)
            ]
        stage += bool(group.linears) and group.experts is None
    return tuple(found)


def _feed_forward(seen: Observed, balance: Sequence[Balance], experts: Experts | None) -> tuple[FeedForward, ...]:
    """Networks around an activation module: the linear that feeds it, the one that reads its result, and where those
    multiply by a third, that one too."""
    found = []
    products = {pair.consumers[0]: pair for pair in balance if pair.kind == "linear"}
    for path, name in activations(seen).items():
        call = next(call for call in seen.calls if call.path == path)
        feeding = produced_by(seen, call.entered[0]) if call.entered else None
        if feeding is None or call.left is None:
            continue
        left = call.left.data_ptr()
        plain = next((c.path for c in seen.calls if c.path in seen.linears and c.entered[0].data_ptr() == left), None)
        if plain is not None:
            found.append(FeedForward(feeding, plain, name, path))
            continue
        siblings = next((g.linears for g in seen.groups if feeding in g.linears), [])
        down = next((d for d, pair in products.items() if pair.producer in siblings), None)
        fused = down is not None and products[down].producer == feeding
        if down is None or (fused and (products[down].rows or (0, 0))[0] == 0):
            continue
        found.append(FeedForward(products[down].producer, down, name, path, gate=feeding))
    if experts is not None:
        module = experts.module
        found += [
            FeedForward(
                f"{module}.{e}.{experts.up}",
                f"{module}.{e}.{experts.down}",
                experts.activation,
                f"{module}.{e}.activation",
                gate=f"{module}.{e}.{experts.gate}",
                expert=e,
            )
            for e in range(experts.count)
        ]
    return tuple(found)
