"""SignRound (Cheng et al. 2023, arXiv 2309.05516): rounding offsets and ranges learned on the output of the block.

It refines what a rounding pass left: ``signround`` alone starts from rounding to nearest, as published (AutoRound),
``awq+signround`` from that on AWQ's grids, ``awq+gptq+signround`` from GPTQ's codes. The gradient step is in
`ptq.numerics.signround`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any, ClassVar, Literal

import torch

from calibration.errors import Problem
from calibration.model.watching import Watch, watching
from calibration.walk.context import Context
from calibration.walk.cost import BlockShape, Work
from calibration.walk.passes import Pass, Phase, PlanView, Stream
from calibration.walk.segment import Segment
from calibration.walk.states import Reference
from calibration.walk.statistics import Gram
from ptq.formats.checks import matching, refuse
from ptq.linears import ModelLayout
from ptq.methods.rounding import relative_errors
from ptq.numerics.activations import fake_quantize_inputs
from ptq.numerics.signround import Learned, relative_loss
from ptq.numerics.signround_super import LearnedSuper
from ptq.quantized import INPUT_GRID, LORA, QuantizedTensor
from ptq.scheme import QuantScheme

State = Learned | LearnedSuper
TRAINING = 8  # units of progress of a batch that is trained on, with its backward pass and all weights rounded anew


@dataclass(frozen=True)
class SignRound(Pass):
    """One step per calibration window and epoch, and rates that fall linearly to zero; the best epoch is
    kept.

    Attributes:
        epochs: passes over the calibration set. (The published 200 steps of 8 windows are 12.5 over 128 windows.)
        rate: of the offsets, over the number of steps: an offset can move by about half of it in all. 1 as published.
        range_rate: of the logarithms of the ranges' ends, over the number of steps.
        target: ``model``: the float model's hidden states behind the block, so that errors of earlier blocks are
            repaired as well, as the published code has it; ``inputs``: the float block on the inputs of this run.
    """

    epochs: int = 4
    rate: float = 1.0
    range_rate: float = 1.0
    target: Reference = "model"

    name: ClassVar[str] = "signround"
    title: ClassVar[str | None] = "SignRound"
    summary: ClassVar[str] = "learns rounding and ranges of a whole block by the signs of gradients"
    phases: ClassVar[tuple[Phase, ...]] = (Phase.REPAIR,)
    expected_errors: ClassVar[Literal["nearest", "feedback"] | None] = "feedback"
    learned_bytes: ClassVar[int] = 24  # offsets and the best of them, weights and their gradients, codes and originals
    by_window: ClassVar[bool] = True
    stream: ClassVar[Stream] = "quantized"

    @property
    def references(self) -> tuple[Reference, ...]:
        return (self.target,)

    def check(self, view: PlanView[ModelLayout]) -> Iterable[Problem]:
        if self.epochs < 0:
            yield Problem("signround.epochs", f"{self.epochs} is negative", "use 4")
        for name in ("rate", "range_rate"):
            value = getattr(self, name)
            if not 0 <= value < 100:
                yield Problem(f"signround.{name}", f"{value} is outside [0, 100)", f"use {getattr(SignRound, name)}")
        for step in view.passes:
            if step.reorders:
                reason = "groups that follow an activation order cannot learn their ranges"
                yield Problem(f"{step.name}+signround", reason, f"use static_groups = true for {step.name}")
        before = takewhile(lambda step: step is not self, view.passes)
        if any(LORA[0] in step.parts for step in before):
            reason = "codes that change afterwards make the low-rank part wrong"
            yield Problem("lorc+signround", reason, "write signround+lorc")
        others = matching(view.layout, lambda linear: not _learnable(linear.scheme))
        fix = "leave it out, or use w4a16-g64, -sym or -asym"
        yield from refuse(others, "signround learns integer grids of groups or channels and K-quants only", fix)

    def forwards(self) -> int:
        return self.epochs + 1 if self.epochs else 0

    def units(self) -> int:
        return self.epochs * TRAINING + 1 if self.epochs else 0

    def cost(self, block: BlockShape) -> list[Work]:
        """Backward passes, and for every window of every epoch all weights rounded anew and moved."""
        weights = float(sum(rows * n for rows, n in block.linears))
        steps = self.epochs * block.windows
        rounded = Work(values=22.0 * weights, fresh=weights) * (steps + block.windows * bool(self.epochs))
        return [rounded, (Work(values=70.0 * weights) + block.forward * (2.0 / block.windows)) * steps]

    def apply(self, segment: Segment, context: Context) -> None:
        rounded = {name: q for name, q in segment.quantized.items() if isinstance(q, QuantizedTensor)}
        if not rounded or not self.epochs:
            return
        learned = {name: _start(segment.original(name), q) for name, q in rounded.items()}
        with watching(segment.module, input_watches(segment)):
            best, losses = self._train(segment, context, learned)
        for name, state in best.items():
            found: dict[str, Any] = {**state.rounded()}
            q = dataclasses.replace(rounded[name], **found)
            w, weight = segment.original(name), state.weight()
            segment.quantized[name] = q
            segment.set_weight(name, weight)
            gram = context.statistic(name, Gram).matrix if context.has(Gram) else None
            segment.errors[name] = relative_errors(w, weight, gram)
            segment.note(name, **{"signround.first_loss": losses[0], "signround.last_loss": min(losses)})

    def _train(
        self, segment: Segment, context: Context, learned: dict[str, State]
    ) -> tuple[dict[str, State], list[float]]:
        """What was learned by the end of the best epoch, and the mean loss of every epoch; the first is the start's."""
        generator = torch.Generator().manual_seed(segment.index)
        losses = [self._epoch(segment, context, learned, None, generator)]
        best, steps, done = {n: s.copy() for n, s in learned.items()}, self.epochs * context.windows, 0
        for _ in range(self.epochs):
            rates = [(1 - i / steps) / steps for i in range(done, done + context.windows)]
            done += context.windows
            losses.append(self._epoch(segment, context, learned, rates, generator))
            if losses[-1] <= min(losses):
                best = {n: s.copy() for n, s in learned.items()}
        return best, losses

    def _epoch(
        self,
        segment: Segment,
        context: Context,
        learned: Mapping[str, State],
        rates: list[float] | None,
        generator: torch.Generator,
    ) -> float:
        """Mean loss over all windows; with ``rates`` a step behind each of them."""
        total = 0.0
        remaining = iter(rates or ())
        for batch in torch.randperm(len(context.batches), generator=generator).tolist():
            for row in torch.randperm(context.reference(self.target, batch).shape[0], generator=generator).tolist():
                weights = {n: state.weight().requires_grad_(rates is not None) for n, state in learned.items()}
                target = context.reference(self.target, batch)[row]
                with torch.set_grad_enabled(rates is not None):
                    y = context.output(batch, {f"{n}.weight": _stored(segment, w) for n, w in weights.items()}, row)[0]
                    loss = relative_loss(y, target)
                total += float(loss.detach())
                if rates is None:
                    continue
                loss.backward()
                rate = next(remaining)
                for n, state in learned.items():
                    gradient = weights[n].grad
                    if gradient is not None:
                        state.descend(gradient, self.rate * rate, self.range_rate * rate)
            for _ in range(1 if rates is None else TRAINING):
                context.advance("train")
        return total / context.windows


def input_watches(segment: Segment) -> list[Watch]:
    """What the runtime does to inputs that are quantized, with gradients that pass straight through the rounding.

    Linears that read one tensor on one grid share the result.
    """
    watches = []
    for shared in segment.spec.inputs:
        found: dict[Any, Callable[[torch.Tensor], torch.Tensor]] = {}
        for linear in shared.linears:
            quant = segment.schemes[linear].inputs if linear in segment.schemes else None
            if quant is not None:
                scale, zero = (segment.parts.get(linear, {}).get(part) for part in INPUT_GRID)
                rounding = partial(fake_quantize_inputs, quant=quant, scale=scale, zero=zero)
                shown = found.setdefault(quant if quant.dynamic else linear, _straight_through(rounding))
                watches.append(Watch.transforming(segment.architecture.module_name(linear), shown))
    return watches


def _straight_through(rounding: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """``rounding`` with the gradient of the identity; for calls in a row on one tensor it is computed once."""
    seen: tuple[torch.Tensor, torch.Tensor] | None = None

    def through(x: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        if seen is None or seen[0] is not x:
            seen = x, x + (rounding(x.detach()) - x.detach())
        return seen[1]

    return through


def _start(w: torch.Tensor, q: QuantizedTensor) -> State:
    """Training of ``w [out, in]`` from its rounding."""
    if q.super_grid is not None:
        return LearnedSuper.start(w, q.codes, q.super_grid, q.scheme.weights)
    return Learned.start(w, q.codes, q.scale, q.zero, q.scheme.weights)


def _learnable(scheme: QuantScheme | None) -> bool:
    if scheme is None:
        return True
    w = scheme.weights
    plain = w.float_format is None and w.salient_percent is None and not w.float_zeros
    return plain and w.grouping.kind != "tensor"


def _stored(segment: Segment, w: torch.Tensor) -> torch.Tensor:
    """``W [out, in]`` as the model class keeps it: GPT-2's Conv1D transposed."""
    return w.T if segment.architecture.conv1d else w
