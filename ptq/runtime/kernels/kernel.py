"""What a kernel is, and what it is asked before it is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ptq.quantized import QuantizedTensor


@dataclass(frozen=True)
class KernelQuery:
    """One quantized linear and where it would run. Everything a kernel may decide by.

    Attributes:
        bits, symmetric: of the grid.
        group_width: input columns per scale; ``in_features`` where a whole row shares one.
        out_features, in_features: of W ``[out, in]``.
        device_type: ``"cpu"``, ``"cuda"`` and so on.
        dtype: of the activations.
        group_index: groups follow an activation order instead of the column order.
    """

    bits: int
    group_width: int
    symmetric: bool
    out_features: int
    in_features: int
    device_type: str
    dtype: torch.dtype
    group_index: bool = False

    @property
    def channelwise(self) -> bool:
        """One scale per output row."""
        return self.group_width == self.in_features

    @staticmethod
    def of(q: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> KernelQuery:
        """The query for ``q`` with activations of ``dtype`` on ``device``."""
        weights = q.scheme.weights
        out, width = q.shape
        group = weights.grouping.width(width)
        return KernelQuery(
            weights.bits, group, q.zero is None, out, width, device.type, dtype, q.group_index is not None
        )


Packed = Mapping[str, torch.Tensor]
"""A kernel's own tensors by name; ``bias`` ``[out]``, where the layer has one, is among them when it runs."""


@dataclass(frozen=True)
class Kernel:
    """One way to compute ``x Wᵀ + bias`` from integer codes.

    Attributes:
        name: as users ask for it.
        supports: the reason why this kernel cannot run a query, or None where it can.
        pack: the weight in the kernel's own layout, on the given device, for activations of the given dtype. Called
            only where ``supports`` returned None.
        run: ``x [tokens, in]``, contiguous, to ``[tokens, out]`` in the dtype of x.
        any_device: the layout means the same on every device. Otherwise a packed layer stays where it was packed.
        any_dtype: one packing serves activations of every dtype.
    """

    name: str
    supports: Callable[[KernelQuery], str | None]
    pack: Callable[[QuantizedTensor, torch.dtype, torch.device], dict[str, torch.Tensor]]
    run: Callable[[torch.Tensor, Packed, KernelQuery], torch.Tensor]
    any_device: bool = False
    any_dtype: bool = False
