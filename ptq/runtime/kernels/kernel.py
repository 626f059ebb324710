"""What a kernel is, and what it is asked before it is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ptq.activations import ActivationQuant
from ptq.float_formats import FloatFormat
from ptq.quantized import QuantizedTensor
from ptq.scheme import Axis, QuantScheme


@dataclass(frozen=True)
class KernelQuery:
    """One quantized linear and where it would run. Everything a kernel may decide by.

    Attributes:
        bits, symmetric: of the grid.
        group_width: weights per scale, along ``axis``; ``in_features`` where a whole row shares one.
        out_features, in_features: of W ``[out, in]``.
        device_type: ``"cpu"``, ``"cuda"`` and so on.
        dtype: of the activations.
        group_index: groups follow an activation order instead of the column order.
        axis: along which groups run: "in" for input columns of a row, "out" for output rows of a column.
        float_format: what codes stand for where they are no integers, else None.
        inputs: the grid of the activations, None where they are not quantized.
        binary: one bit per weight, four in salient columns.
        float_zeros: zero points are no integers.
        superblocks: integer scales and minima under float16 ones (K-quants).
    """

    bits: int
    group_width: int
    symmetric: bool
    out_features: int
    in_features: int
    device_type: str
    dtype: torch.dtype
    group_index: bool = False
    axis: Axis = "in"
    float_format: FloatFormat | None = None
    inputs: ActivationQuant | None = None
    binary: bool = False
    float_zeros: bool = False
    superblocks: bool = False

    @property
    def channelwise(self) -> bool:
        """One scale per output row."""
        return self.axis == "in" and self.group_width == self.in_features

    @staticmethod
    def of(scheme: QuantScheme, shape: tuple[int, int], dtype: torch.dtype, device: str, index: bool) -> KernelQuery:
        """The query for a ``W [out, in]`` of this scheme and shape.

        Args:
            dtype: of the activations.
            device: type of the device.
            index: whether the weight has a ``group_index``.
        """
        weights, (out, columns) = scheme.weights, shape
        width = weights.grouping.width(weights.grouping.length(shape))
        return KernelQuery(
            bits=weights.bits,
            group_width=width,
            symmetric=weights.symmetric,
            out_features=out,
            in_features=columns,
            device_type=device,
            dtype=dtype,
            group_index=index,
            axis=weights.grouping.axis,
            float_format=weights.float_format,
            inputs=scheme.inputs,
            binary=weights.salient_percent is not None,
            float_zeros=weights.float_zeros,
            superblocks=weights.superblocks,
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
        integer: it quantizes the activations itself and multiplies codes with codes. The others are handed activations
            that are quantized and dequantized already.
        float_zeros: zero points may be floats.
        decoding: it is made for one token at a time, so that it runs only where it is asked for.
        on_request: types of devices on which it is not the fastest, so that it runs only where it is asked for.
    """

    name: str
    supports: Callable[[KernelQuery], str | None]
    pack: Callable[[QuantizedTensor, torch.dtype, torch.device], dict[str, torch.Tensor]]
    run: Callable[[torch.Tensor, Packed, KernelQuery], torch.Tensor]
    any_device: bool = False
    any_dtype: bool = False
    integer: bool = False
    on_request: tuple[str, ...] = ()
    float_zeros: bool = False
    decoding: bool = False

    def refusal(self, query: KernelQuery) -> str | None:
        """The reason why this kernel cannot run a query, or None where it can."""
        if query.float_zeros and not self.float_zeros:
            return "zero points are floats"
        return self.supports(query)
