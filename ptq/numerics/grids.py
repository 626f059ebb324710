"""Integer and float grids behind the same verbs, for everything that rounds without caring which it is.

A *step* is what one level is worth: the stored scale, divided by the tensor's global scale where there is one. A
weight is a level times its step. Integer levels are ``code - zero``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ptq.numerics import floats, integers, superblocks
from ptq.numerics.groups import join, scales_of_rows, split
from ptq.scheme import TensorQuant


@dataclass(frozen=True)
class Grid:
    """Steps and zero points chosen for one weight ``W [out, in]`` before it is rounded.

    Attributes:
        scale: ``[lines, G]`` as it will be stored: exact in the scheme's ``scale_format``, not yet divided by a global
            scale.
        zero: ``[lines, G]`` in ``[0, 2^bits - 1]``, in the dtype of ``scale``: integers, or float16 numbers for
            ``asym_float``; None for symmetric grids and for floats.
    """

    scale: torch.Tensor
    zero: torch.Tensor | None

    def rows(self, quant: TensorQuant, rows: int, part: slice) -> Grid:
        """The grid of some of the ``rows`` rows of W; whole groups of rows for axis "out"."""
        where = scales_of_rows(quant, rows, part)
        return Grid(self.scale[where], None if self.zero is None else self.zero[where])


def stacked(grids: list[Grid], quant: TensorQuant) -> Grid:
    """The grid of weights of one scheme stacked along their rows."""
    across = 1 if quant.grouping.axis == "out" else 0
    zeros = [grid.zero for grid in grids if grid.zero is not None]
    return Grid(torch.cat([g.scale for g in grids], across), torch.cat(zeros, across) if zeros else None)


def two_levels(quant: TensorQuant) -> bool:
    """Whether the stored scales are divided by a scale of the whole tensor."""
    return quant.scale_format == "e4m3"


def global_scale_of(largest_weight: torch.Tensor, quant: TensorQuant) -> torch.Tensor | None:
    """float32 ``[1]`` for a tensor (or tensors that share it) of this largest magnitude; None for one-level formats."""
    if not two_levels(quant):
        return None
    assert quant.float_format is not None
    return floats.tensor_scale(largest_weight, quant.float_format)


def own_global_scale(w: torch.Tensor, quant: TensorQuant, shared: torch.Tensor | None = None) -> torch.Tensor | None:
    """``shared``, or the global scale of W alone where a two-level format was given none."""
    if shared is not None or not two_levels(quant):
        return shared  # without a pass over W
    return global_scale_of(w.abs().amax(), quant)


def grid_parameters(
    units: torch.Tensor,
    quant: TensorQuant,
    clip: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stored scale and zero point ``[...]`` of units ``[..., g]``; see `integers.grid_parameters`, `floats.scales`.

    Of grids with super-blocks, whose stored scales are integers, the step and the (fractional) code of zero.
    """
    if quant.superblocks:
        grid = superblocks.range_grid(units, quant, clip)
        return grid.step, grid.zero(quant)
    if quant.float_format is None:
        return integers.grid_parameters(units, quant, clip)
    return floats.scales(units, quant, clip, global_scale), None


def grid_of(
    w: torch.Tensor,
    quant: TensorQuant,
    clip: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> Grid:
    """The grid that the ranges of ``W [out, in]`` span, within clipping bounds ``[lines, G]`` where there are some.
    ``global_scale`` ``[1]``: for two-level formats; None takes that of W alone."""
    global_scale = own_global_scale(w, quant, global_scale)
    return Grid(*grid_parameters(split(w, quant.grouping), quant, clip, global_scale))


def step_of(scale: torch.Tensor, global_scale: torch.Tensor | None) -> torch.Tensor:
    """The step ``[...]`` of stored scales."""
    return scale if global_scale is None else scale / global_scale.to(scale.dtype)


def levels(w: torch.Tensor, step: torch.Tensor, zero: torch.Tensor | None, quant: TensorQuant) -> torch.Tensor:
    """The level nearest to every weight, in the dtype of w; ``step`` and ``zero`` must broadcast against it."""
    if quant.float_format is not None:
        return floats.nearest(w / step, quant.float_format)
    if quant.superblocks:
        assert zero is not None
        return superblocks.nearest_codes(w, step, zero, quant).sub_(zero)
    shift = 2 ** (quant.bits - 1) if zero is None else zero
    return integers.quantize(w, step, zero, quant).sub_(shift)


def codes_of(level: torch.Tensor, zero: torch.Tensor | None, quant: TensorQuant) -> torch.Tensor:
    """uint8 codes of levels."""
    if quant.float_format is not None:
        return floats.codes(level, quant.float_format)
    code = level + (2 ** (quant.bits - 1) if zero is None else zero)
    return _octets(code.round_() if quant.float_zeros or quant.superblocks else code)


def _octets(code: torch.Tensor) -> torch.Tensor:
    """Codes that are floats as uint8. By way of int32, because torch's own cast is not vectorized: two and a half times
    as slow as both together."""
    return code.to(torch.int32).to(torch.uint8)


def nearest_codes(w: torch.Tensor, step: torch.Tensor, zero: torch.Tensor | None, quant: TensorQuant) -> torch.Tensor:
    """`codes_of` the `levels` of weights, uint8."""
    if quant.float_format is None and not quant.superblocks:
        return _octets(integers.quantize(w, step, zero, quant))
    return codes_of(levels(w, step, zero, quant), zero, quant)


def zero_of(grid: Grid, quant: TensorQuant) -> torch.Tensor | None:
    """The zero points of a grid as `ptq.quantized.QuantizedTensor` has them."""
    return None if grid.zero is None else grid.zero.to(torch.float32 if quant.float_zeros else torch.uint8)


def levels_of(code: torch.Tensor, zero: torch.Tensor | None, quant: TensorQuant) -> torch.Tensor:
    """float32 levels of uint8 codes; ``zero`` must broadcast against them."""
    if quant.float_format is not None:
        return floats.levels_of(code, quant.float_format)
    return code.float().sub_(2 ** (quant.bits - 1) if zero is None else zero)


def round_to_grid(
    w: torch.Tensor, quant: TensorQuant, grid: Grid, global_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``W [out, in]`` to the nearest levels of a grid: the rounded weight, and its uint8 codes ``[out, in]``."""
    step = step_of(grid.scale, global_scale).unsqueeze(-1)
    zero = None if grid.zero is None else grid.zero.unsqueeze(-1)
    level = levels(split(w, quant.grouping), step, zero, quant)
    codes = join(codes_of(level, zero, quant), quant.grouping)
    return join(level.mul_(step), quant.grouping), codes.contiguous()


def fake_quantize(
    w: torch.Tensor,
    quant: TensorQuant,
    clip: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize and dequantize ``W [..., out, in]`` with the grouping of ``quant``.

    Args:
        clip: ``[..., lines, G]`` clipping bounds, or None.
    """
    if quant.superblocks:
        return superblocks.fake_quantize(w, quant, clip)
    if quant.float_format is None:
        return integers.fake_quantize(w, quant, clip)
    return floats.fake_quantize(w, quant, clip, global_scale)
