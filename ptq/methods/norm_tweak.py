"""Norm tweaking (Li et al. 2024, arXiv 2309.02784): after a block is rounded, its norms follow the float output."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from calibration.errors import Problem
from calibration.walk.context import Context
from calibration.walk.passes import Pass, Phase, PlanView, Stream
from calibration.walk.segment import Segment
from calibration.walk.states import Reference
from ptq.linears import ModelLayout
from ptq.numerics.distribution import channel_distance, learning_rate


@dataclass(frozen=True)
class NormTweak(Pass):
    """A few small Adam steps on gains (and LayerNorm biases) of the block's norms; integer codes stay as they are.

    One step per calibration batch of 2048 tokens, as published; 128 windows of 512 are 32 steps and take a larger rate
    than the published 1e-5. The targets are the outputs of the float block. No gain was shown: on a Llama of 11
    million parameters (GPTQ, 2 bits, groups of 128, first 120 windows of WikiText-2's validation text, one seed) six
    settings of rate and target gave 48.39 to 48.65 where GPTQ alone had 48.43; 1e-3 was worse, although the distance
    fell further.

    Attributes:
        rate: of Adam, for the first block.
        depth_scale: the rate of block l of L is ``rate * (1 + depth_scale * l / L)``.
        epochs: passes over the calibration set. 0 leaves the model as it is.
        target: ``inputs``: the float block on the inputs that the quantized model has there, as published; ``model``:
            on those of the float model, so that the error of earlier blocks is seen too.
    """

    rate: float = 1e-4
    depth_scale: float = 1.0
    epochs: int = 1
    target: Reference = "inputs"

    name: ClassVar[str] = "norm-tweak"
    summary: ClassVar[str] = "adjusts the norms so that outputs follow those of the float model"
    phases: ClassVar[tuple[Phase, ...]] = (Phase.REPAIR,)
    stream: ClassVar[Stream] = "quantized"

    @property
    def references(self) -> tuple[Reference, ...]:
        return (self.target,)

    def check(self, view: PlanView[ModelLayout]) -> Iterable[Problem]:
        if not 0 <= self.rate < 1:
            yield Problem("norm-tweak.rate", f"{self.rate} is outside [0, 1)", "use 1e-4")
        if self.depth_scale < 0:
            yield Problem("norm-tweak.depth_scale", f"{self.depth_scale} is negative", "use 1")
        if self.epochs < 0:
            yield Problem("norm-tweak.epochs", f"{self.epochs} is negative", "use 1")

    def forwards(self) -> int:
        return self.epochs

    def apply(self, segment: Segment, context: Context) -> None:
        if self.epochs == 0 or self.rate == 0:
            return
        gains = {name: segment.masters[name].clone().requires_grad_() for name in segment.norms()}
        rate = learning_rate(self.rate, self.depth_scale, segment.index, segment.architecture.n_blocks)
        optimizer = torch.optim.Adam(gains.values(), lr=rate)
        distances = []
        for _ in range(self.epochs):
            for batch in context.batches:
                with torch.enable_grad():
                    y = context.output(batch, gains)
                    distance = channel_distance(context.reference(self.target, batch), y)
                    distance.backward()
                optimizer.step()
                optimizer.zero_grad()
                distances.append(float(distance.detach()))
        for name, gain in gains.items():
            segment.set_vector(name, gain.detach())
        last = next(reversed(segment.schemes), None)
        if last is not None:
            moved = max(float((gains[n].detach() / segment.originals[n] - 1).abs().median()) for n in gains)
            quarter = -(-len(distances) // 4)
            first, rest = sum(distances[:quarter]) / quarter, sum(distances[-quarter:]) / quarter
            notes = {"first_distance": first, "last_distance": rest, "moved": moved}
            segment.note(last, **{f"norm-tweak.{key}": value for key, value in notes.items()})
