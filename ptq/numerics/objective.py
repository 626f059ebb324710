"""The layer objective: how far a changed weight moves the output on the calibration inputs, from the Gram matrix."""

from __future__ import annotations

import torch

ROW_BYTES = 16_000_000  # rows are handled in chunks of about this many bytes, which keeps candidates out of main memory


def row_chunks(rows: int, columns: int) -> list[slice]:
    """Slices over rows that hold about `ROW_BYTES` of float32 each."""
    step = max(16, ROW_BYTES // (4 * columns))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def output_energy(d: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """``sum((d G) * d)`` = ||d X^T||^2, a float32 (float64) scalar.

    Args:
        d: ``[rows, in]`` float32, a weight or a difference of weights.
        gram: ``[in, in]``, X^T X. In bfloat16 the product runs in bfloat16 (several times faster on hardware that
            multiplies it natively) and the sum in float32; relative accuracy is then about 1e-3.
    """
    return ((d.to(gram.dtype) @ gram).to(d.dtype) * d).sum()


def output_error(w: torch.Tensor, changed: torch.Tensor, gram: torch.Tensor) -> float:
    """||(changed - w) X^T||^2 / ||w X^T||^2; 0 where the layer's output is zero. Shapes as in `output_energy`."""
    difference = torch.zeros((), dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for rows in row_chunks(*w.shape):
        difference += output_energy(changed[rows] - w[rows], gram).double().cpu()
        total += output_energy(w[rows], gram).double().cpu()
    return float(difference / total) if total > 0 else 0.0
