"""`GatePass`: what every pass of activation sparsity says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import nn

from calibration.architectures import ArchitectureSpec
from calibration.walk.passes import Phase, Stream
from calibration.walk.statistics import Statistic


class GatePass:
    """It comes last, looks at the block as it will be run, and asks the walk for no statistic and no part."""

    phases: ClassVar[tuple[Phase, ...]] = (Phase.GATE,)
    stream: ClassVar[Stream] = "quantized"
    statistics: ClassVar[tuple[type[Statistic], ...]] = ()
    parts: ClassVar[tuple[str, ...]] = ()

    def masked(
        self, block: nn.Module, spec: ArchitectureSpec, index: int, gates: Mapping[str, torch.Tensor]
    ) -> AbstractContextManager[Any]:
        """Later blocks are calibrated on the dense model, as published for all methods but SCAP."""
        return nullcontext()
