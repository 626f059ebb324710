"""`GatePass`: what every pass of activation sparsity says of itself."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, cast

import torch
from torch import nn

from calibration.architectures import ArchitectureSpec, BlockSpec
from calibration.walk.context import Context
from calibration.walk.passes import Pass, Phase, Stream
from calibration.walk.segment import Segment
from sparsity.files import sites_from
from sparsity.masking import block_masked


class GatePass(Pass):
    """It comes last and looks at the block as it will be run, on what arrives behind the pruned blocks before it: what
    is asked for is then what is pruned. (Published thresholds are those of the dense model.)"""

    phases: ClassVar[tuple[Phase, ...]] = (Phase.GATE,)
    stream: ClassVar[Stream] = "quantized"

    def masked(
        self, block: nn.Module, spec: ArchitectureSpec, index: int, gates: Mapping[str, torch.Tensor]
    ) -> AbstractContextManager[Any]:
        return block_masked(block, spec, index, sites_from(gates))

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
