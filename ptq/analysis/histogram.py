"""The distribution of |x| in bins of 1/64 octave, exact in memory whatever the number of values."""

from __future__ import annotations

import torch

_SHIFT = 17  # float32 bits: 8 of the exponent and 6 of the mantissa remain
_BINS = 1 << (31 - _SHIFT)


class LogHistogram:
    """Counts of float32 |x| by the leading bits of its representation: 64 bins per octave, equally wide inside it."""

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(_BINS, dtype=torch.int64, device=device)

    def update(self, x: torch.Tensor) -> None:
        """Fold in all values of x."""
        bits = x.float().abs().contiguous().view(torch.int32).flatten()
        self.counts += torch.bincount(bits >> _SHIFT, minlength=_BINS)

    def quantile(self, share: float) -> float:
        """The value below which ``share`` of |x| lies, interpolated inside its bin; 0 where nothing was seen."""
        total = int(self.counts.sum())
        if not total:
            return 0.0
        below = self.counts.cumsum(0)
        wanted = min(max(share * total, 1.0), total)
        at = int(torch.searchsorted(below, torch.tensor(wanted, dtype=torch.float64, device=below.device)))
        low, high = _edge(at), _edge(at + 1)
        inside = (wanted - float(below[at] - self.counts[at])) / float(self.counts[at])
        return low + (high - low) * inside

    def octaves(self) -> tuple[tuple[int, int], ...]:
        """``(e, count)``: values with ``2^e <= |x| < 2^(e + 1)``, in order, empty octaves inside included; zeros are
        left out."""
        per_octave = self.counts.view(-1, 64).sum(1)
        per_octave[0] = 0
        filled = per_octave.nonzero().flatten()
        if not len(filled):
            return ()
        span = range(int(filled[0]), int(filled[-1]) + 1)
        return tuple((i - 127, int(per_octave[i])) for i in span)


def _edge(index: int) -> float:
    bits = torch.tensor(min(index, _BINS - 1) << _SHIFT, dtype=torch.int32)
    return float(bits.view(torch.float32))
