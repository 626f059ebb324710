"""`GatePass`: what every pass of activation sparsity says of itself."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, cast

import torch

from calibration.architectures import BlockSpec
from calibration.walk.context import Context
from calibration.walk.passes import Pass, Phase, Stream
from calibration.walk.segment import Segment


class GatePass(Pass):
    """It comes last and looks at the block as it will be run. Later blocks are calibrated on the dense model, but for
    methods that prune what every linear reads (`sparsity.stages`)."""

    phases: ClassVar[tuple[Phase, ...]] = (Phase.GATE,)
    stream: ClassVar[Stream] = "quantized"

    @abstractmethod
    def skipped(self, block: BlockSpec) -> tuple[str, ...]:
        """Linears of a block of whose weights the target's share is skipped."""

    def apply_each(
        self, segment: Segment, context: Context, targets: Sequence[float]
    ) -> Iterator[dict[str, torch.Tensor]]:
        """What `apply` leaves in the segment at each of several targets, in ascending order."""
        for target in targets:
            segment.gates = {}
            with_target(self, target).apply(segment, context)
            yield segment.gates


def with_target(step: GatePass, target: float) -> GatePass:
    """The pass with another target."""
    return cast(GatePass, dataclasses.replace(cast(Any, step), target=target))
