"""What a calibration token counts in the statistics of the linear that reads it; derived in docs/token_weights.md."""

from __future__ import annotations

from typing import Literal

import torch

from calibration.architectures.spec import Residual
from calibration.walk.segment import Segment

TokenWeights = Literal["norm", "none"]
"""``norm``: a token counts as if its vector had the median norm of its batch, and for the linears of `stream_writers`
as if the stream behind the block had; ``none``: as it is."""

SMALLEST_NORM = 1e-3  # of the median: below it a token is taken to be silent rather than small


def weights_by_norm(x: torch.Tensor) -> torch.Tensor:
    """``median(|x|)² / |x_t|²``, float32 ``[tokens]``, for the inputs ``x [tokens, in]`` of one linear in one batch.

    A handful of tokens (mostly the first of a text) have inputs of down hundreds of times larger than all others, and
    their error is divided by as much in the next norm. The median keeps the scale of the statistics.
    """
    norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    median = norms.median()
    return (median / norms.clamp(min=SMALLEST_NORM * median)).square().nan_to_num(nan=1.0)


def stream_writers(segment: Segment) -> set[str]:
    """Paths below the block of the feed-forward linears whose output is added to what the block returns; none where a
    norm comes first."""
    architecture, spec = segment.architecture, segment.spec
    if not isinstance(architecture.residual, Residual):
        return set()
    return {architecture.module_name(f.down) for f in spec.feed_forward if f.down in spec.writes}
