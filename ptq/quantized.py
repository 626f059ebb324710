"""`QuantizedTensor`: what a rounding method makes, an exporter lays out and a kernel reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from calibration.threads import one_thread
from ptq.numerics.binary import mixed_values, unpack_mask
from ptq.numerics.grids import levels_of, step_of
from ptq.numerics.groups import join, rows_per_group, scales_of_rows, split
from ptq.numerics.lowrank import factor_product
from ptq.numerics.objective import CACHED_BYTES, row_chunks
from ptq.numerics.superblocks import SuperGrid
from ptq.numerics.superblocks import dequantize as dequantize_super
from ptq.scheme import QuantScheme

PARTS: dict[str, str] = {
    "lora_a": "int8 codes or float16 values [rank, in] of the low-rank part W += (b * scale) a",
    "lora_b": "int8 codes or float16 values [out, rank]",
    "lora_scale": "float32 [rank], one factor per component",
    "hadamard": "int32 [1], the input goes through Hadamard transforms of blocks of this size first",
    "key_hadamard": "int32 [1], queries and keys go through such transforms after the rotary embedding",
    "input_scale": "float32 [1] or [in], the step of static inputs",
    "input_zero": "float32 [1] or [in], their zero point, an integer; absent for symmetric grids",
    "key_scale": "float32 [1], the step of a static cache's keys, on the linear that makes them",
    "value_scale": "float32 [1], the step of its values",
    "salient": "uint8 [ceil(in / 8)], bitmap of the columns that have 4 bits among one-bit weights, lowest bit first",
    "binary_scale": "float16 [out], half the distance of the two values of a row",
    "binary_mean": "float16 [out], their mean",
    "column_scale": "float16 [in], by which one-bit columns are multiplied",
}
"""Tensors that may stand beside the codes of a linear, by name, with shape and meaning. Native files store each as
``<linear>.<name>``; a pass that makes one lists it in ``Pass.parts``."""

INPUT_GRID = ("input_scale", "input_zero")
"""The parts of a static grid of inputs."""

CACHE_STEPS = ("key_scale", "value_scale")
"""The parts of a static KV cache."""

BINARY = ("salient", "binary_scale", "binary_mean", "column_scale")
"""The parts of one-bit weights with salient columns, see `ptq.numerics.binary.mixed_values`."""

LORA = ("lora_b", "lora_a", "lora_scale")
"""The parts of a low-rank correction, in the order of `ptq.numerics.lowrank.factor_product`."""


@dataclass(frozen=True)
class QuantizedTensor:
    """Integer codes of one weight ``W [out, in]`` with G groups per line: per row, or per column for axis "out".

    Attributes:
        codes: uint8 ``[out, in]``, unsigned codes in ``[0, 2^bits - 1]``, one byte each whatever the bits.
        scale: float32 ``[lines, G]``, exact in the scheme's ``scale_format``. Lines are the ``out`` rows, or the
            ``in`` columns where the grouping's axis is "out".
        zero: uint8 ``[lines, G]``, or None for symmetric grids (then 2^(bits-1)); float32, exact in float16, where the
            scheme has float zero points.
        scheme: bits, grid and grouping.
        group_index: int32 ``[in]``, the group of each column; None where it is ``column // group size``
            (it is present only where groups follow an activation order).
        parts: tensors beside the codes, by a name of `PARTS`.
        global_scale: float32 ``[1]`` by which the scales of a two-level format (NVFP4) are divided, else None.
        super_scale: float32 ``[out, in/256]`` exact in float16, of grids with super-blocks: ``scale`` then holds their
            groups' integers, and ``zero`` the integers of the minima where groups have one.
        super_min: float32 ``[out, in/256]``, by which those are multiplied; None for symmetric grids.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    scheme: QuantScheme
    group_index: torch.Tensor | None = None
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    global_scale: torch.Tensor | None = None
    super_scale: torch.Tensor | None = None
    super_min: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.codes.shape[0]), int(self.codes.shape[1])

    @property
    def zero_point(self) -> torch.Tensor | int:
        """The zero as a tensor, or the fixed 2^(bits-1)."""
        return 2 ** (self.scheme.weights.bits - 1) if self.zero is None else self.zero

    @property
    def step(self) -> torch.Tensor:
        """What one level is worth, float32 ``[lines, G]``."""
        grid = self.super_grid
        if grid is not None:
            return grid.step
        return step_of(self.scale, self.global_scale)

    @property
    def super_grid(self) -> SuperGrid | None:
        """Integers and float16 scales of grids with super-blocks, else None."""
        if self.super_scale is None:
            return None
        return SuperGrid(self.scale, None if self.zero is None else self.zero.float(), self.super_scale, self.super_min)

    @property
    def hadamard(self) -> int | None:
        """Block size of the Hadamard transform that the input goes through first, where it does."""
        return int(self.parts["hadamard"]) if "hadamard" in self.parts else None

    @property
    def low_rank(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """b ``[out, rank]``, a ``[rank, in]`` and scale ``[rank]`` of the low-rank part, where there is one."""
        return (self.parts["lora_b"], self.parts["lora_a"], self.parts["lora_scale"]) if LORA[0] in self.parts else None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that runs, ``[out, in]``: codes and, where there is one, the low-rank part. Products in float32,
        then one cast to ``dtype``."""
        factors = self.low_rank
        w = self.dequantize_codes(dtype if factors is None else torch.float32)
        return w if factors is None else w.add_(factor_product(*factors)).to(dtype)

    def dequantize_codes(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Level times step as ``[out, in]``: products in float32, then one cast to ``dtype``. The level of a code is
        ``code - zero``, or the float that the code stands for."""
        quant, zero, step = self.scheme.weights, self.zero, self.step
        if self.super_grid is not None:
            return dequantize_super(self.codes, self.super_grid, quant).to(dtype)
        if quant.salient_percent is not None:
            assert zero is not None
            bitmap, scale, mean, column = (self.parts[name] for name in BINARY)
            mask = unpack_mask(bitmap, self.shape[1])
            return mixed_values(self.codes, step, zero, mask, scale, mean, column).to(dtype)
        if self.group_index is not None:
            index = self.group_index.long()
            zero = None if zero is None else zero[:, index]
            return (levels_of(self.codes, zero, quant) * step[:, index]).to(dtype)
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        with one_thread():
            for rows in row_chunks(*self.shape, multiple=rows_per_group(quant, self.shape[0]), size=CACHED_BYTES):
                out[rows] = self._rows(step, rows)
        return out

    def by_rows(self, dtype: torch.dtype = torch.float32) -> Callable[[slice], torch.Tensor]:
        """`dequantize` some rows at a time: slice -> ``[rows, in]``. Made as a whole at once where rows do not stand
        alone: groups of rows, super-blocks, columns in an order of their own, parts."""
        plain = self.super_scale is None and self.group_index is None and not self.parts
        if not plain or rows_per_group(self.scheme.weights, self.shape[0]) > 1:
            return self.dequantize(dtype).__getitem__
        step = self.step
        return lambda rows: self._rows(step, rows).to(dtype)

    def _rows(self, step: torch.Tensor, rows: slice) -> torch.Tensor:
        """Level times step of some rows ``[rows, in]``, float32; whole groups of rows for axis "out"."""
        quant, zero = self.scheme.weights, self.zero
        where = scales_of_rows(quant, self.shape[0], rows)
        level = levels_of(
            split(self.codes[rows], quant.grouping), None if zero is None else zero[where].unsqueeze(-1), quant
        )
        return join(level.mul_(step[where].unsqueeze(-1)), quant.grouping)

    def bits_per_weight(self) -> float:
        """Stored bits of codes, scales, zeros, index and parts over the number of weights."""
        parts = 8 * sum(part.nbytes for part in self.parts.values()) / self.codes.numel()
        return self.scheme.bits_per_weight(*self.shape, reordered=self.group_index is not None) + parts
