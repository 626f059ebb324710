"""Runtime Smooth (Yi et al. 2024, arXiv 2409.20361): divide by channel maxima of the live input before quantizing.

With ``s_j = max_t |X[t, j]|`` channels are sorted by s, descending, and cut into groups of G (the last one may be
short); all channels of a group are divided by its largest maximum S_g. The product multiplies S_g back per group of
columns, so weights do not change. Sorting keeps a group's maxima close together.
"""

from __future__ import annotations

import torch

from ptq.activations import RuntimeSmooth

SMALLEST_MAXIMUM = 1e-5  # of a channel that is zero everywhere, as published


def channel_maxima(x: torch.Tensor, block: int | None) -> torch.Tensor:
    """``max_t |x|`` of ``x [..., tokens, in]`` for every block of tokens, ``[..., blocks, in]``: one over the whole
    sequence where ``block`` is None; the last block may be short."""
    magnitude = x.abs()
    if block is None:
        return magnitude.amax(dim=-2, keepdim=True).clamp(min=SMALLEST_MAXIMUM)
    maxima = [part.amax(dim=-2, keepdim=True) for part in magnitude.split(block, dim=-2)]
    return torch.cat(maxima, dim=-2).clamp(min=SMALLEST_MAXIMUM)


def channel_groups(maxima: torch.Tensor, smooth: RuntimeSmooth) -> tuple[torch.Tensor, torch.Tensor]:
    """Order of the channels and the scale of every group.

    Args:
        maxima: ``[..., in]``.

    Returns:
        order int64 ``[..., in]`` (channels by group), group scales ``[..., ceil(in / group)]``.
    """
    width = maxima.shape[-1]
    if smooth.reorder:
        ordered, order = maxima.sort(dim=-1, descending=True, stable=True)
        return order, ordered[..., :: smooth.group].contiguous()  # the first of a group is its largest
    padded = torch.nn.functional.pad(maxima, (0, -width % smooth.group))
    order = torch.arange(width, device=maxima.device).expand_as(maxima)
    return order, padded.unflatten(-1, (-1, smooth.group)).amax(dim=-1)


def smoothing_scales(x: torch.Tensor, smooth: RuntimeSmooth) -> torch.Tensor:
    """The divisor of every channel in its own place, broadcastable against ``x [..., tokens, in]``."""
    scales = channel_maxima(x, smooth.block)
    if smooth.group > 1:
        order, groups = channel_groups(scales, smooth)
        by_order = groups.repeat_interleave(smooth.group, dim=-1)[..., : x.shape[-1]]
        scales = torch.empty_like(scales).scatter_(-1, order, by_order)
    return scales if smooth.block is None else scales.repeat_interleave(smooth.block, dim=-2)[..., : x.shape[-2], :]
