"""Weights that share a step, as the last axis of a tensor: the one place that knows along which axis groups run."""

from __future__ import annotations

import torch

from ptq.scheme import Grouping, TensorQuant


def split(w: torch.Tensor, grouping: Grouping) -> torch.Tensor:
    """``W [..., out, in]`` as units ``[..., lines, G, width]``; a view. Lines are rows, or columns for axis "out"."""
    lines = w if grouping.axis == "in" else w.transpose(-1, -2)
    return lines.unflatten(-1, (-1, grouping.width(lines.shape[-1])))


def join(units: torch.Tensor, grouping: Grouping) -> torch.Tensor:
    """The inverse of `split`: ``[..., lines, G, width]`` to ``[..., out, in]`` (a transposed view for axis "out")."""
    lines = units.flatten(-2)
    return lines if grouping.axis == "in" else lines.transpose(-1, -2)


def shared_maxima(largest: torch.Tensor, grouping: Grouping) -> torch.Tensor:
    """Largest magnitudes ``[..., lines, G]`` of units, those that share a step beyond their line all alike: of the
    whole tensor, or of a run of rows from the first one on."""
    if grouping.kind == "tensor":  # G is 1
        return largest.amax((-2, -1), True).expand_as(largest)
    if grouping.kind != "block":
        return largest
    height, lines = grouping.size or 1, largest.shape[-2]
    padded = torch.nn.functional.pad(largest, (0, 0, 0, -lines % height))
    found = padded.unflatten(-2, (-1, height)).amax(dim=-2)
    return found.repeat_interleave(height, dim=-2)[..., :lines, :]


def once_per_block(scale: torch.Tensor, grouping: Grouping) -> torch.Tensor:
    """Scales ``[lines, G]`` as files hold them: of blocks the first line of each, ``[ceil(lines / size), G]``."""
    return scale[:: grouping.size].contiguous() if grouping.kind == "block" else scale


def for_every_row(stored: torch.Tensor, grouping: Grouping, rows: int) -> torch.Tensor:
    """The inverse of `once_per_block`."""
    return stored.repeat_interleave(grouping.size or 1, dim=0)[:rows] if grouping.kind == "block" else stored


def rows_per_group(quant: TensorQuant, rows: int) -> int:
    """Rows that must stay together when W is handled in chunks of rows: a group of them for axis "out", a block, all of
    them where the whole tensor shares a step, else 1."""
    if quant.grouping.kind == "tensor":
        return rows
    if quant.grouping.kind == "block":
        return quant.grouping.size or 1
    return quant.grouping.width(rows) if quant.grouping.axis == "out" else 1


def scales_of_rows(quant: TensorQuant, rows: int, part: slice) -> tuple[slice, slice]:
    """Where the scales of some of the ``rows`` rows of W lie in the scales ``[lines, G]`` of all; whole groups of rows
    for axis "out"."""
    if quant.grouping.axis == "in":
        return part, slice(None)
    width = quant.grouping.width(rows)
    return slice(None), slice(part.start // width, -(-part.stop // width))


def diagonal_blocks(gram: torch.Tensor, width: int) -> torch.Tensor:
    """The blocks ``[G, width, width]`` on the diagonal of ``gram [in, in]``."""
    n_groups = gram.shape[0] // width
    blocks = gram.view(n_groups, width, n_groups, width).diagonal(dim1=0, dim2=2)
    return blocks.permute(2, 0, 1).contiguous()
