"""`GatePass`: what every pass of activation sparsity says of itself."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Any, ClassVar, cast

from calibration.architectures import BlockSpec
from calibration.walk.passes import Pass, Phase, Stream


class GatePass(Pass):
    """It comes last and looks at the block as it will be run. Later blocks are calibrated on the dense model, as
    published for all methods but SCAP."""

    phases: ClassVar[tuple[Phase, ...]] = (Phase.GATE,)
    stream: ClassVar[Stream] = "quantized"

    @abstractmethod
    def skipped(self, block: BlockSpec) -> tuple[str, ...]:
        """Linears of a block of whose weights the target's share is skipped."""


def with_target(step: GatePass, target: float) -> GatePass:
    """The pass with another target."""
    return cast(GatePass, dataclasses.replace(cast(Any, step), target=target))
