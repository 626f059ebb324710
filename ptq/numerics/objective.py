"""The layer objective: how far a changed weight moves the output on the calibration inputs, from the Gram matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch

from calibration.threads import one_thread
from ptq.numerics.grids import Grid, grid_of, own_global_scale, round_to_grid
from ptq.numerics.groups import rows_per_group
from ptq.scheme import TensorQuant

CACHED_BYTES = 1_000_000  # of float32 rows that stay in cache: for `one_thread`
ROW_BYTES = 16_000_000  # rows are handled in chunks of about this many bytes, which keeps candidates out of main memory


def row_chunks(rows: int, columns: int, *, multiple: int = 1, size: int = ROW_BYTES) -> list[slice]:
    """Slices over rows that hold about ``size`` bytes of float32 each, in multiples of so many rows."""
    step = max(16, size // (4 * columns))
    step = -(-step // multiple) * multiple
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


@one_thread()
def relative_energy(
    w: torch.Tensor, changed: Callable[[slice], torch.Tensor], dtype: torch.dtype | None = None
) -> float:
    """||changed - w||^2 / ||w||^2; 0 where w is zero.

    Args:
        w: ``[out, in]``.
        changed: some rows of what it became, ``[rows, in]`` in ``dtype``.
        dtype: in which rows of w are looked at; None is its own.
    """
    energy = error = 0.0
    for rows in row_chunks(*w.shape, size=CACHED_BYTES):
        part = w[rows].to(dtype or w.dtype)
        energy += float(part.square().sum())
        error += float((changed(rows) - part).square_().sum())
    return error / energy if energy > 0 else 0.0


def output_energy(d: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """``sum((d G) * d)`` = ||d X^T||^2, a float32 (float64) scalar.

    Args:
        d: ``[rows, in]`` float32, a weight or a difference of weights.
        gram: ``[in, in]``, X^T X. In bfloat16 the product runs in bfloat16 (several times faster on hardware that
            multiplies it natively) and the sum in float32; relative accuracy is then about 1e-3.
    """
    return ((d.to(gram.dtype) @ gram).to(d.dtype) * d).sum()


def output_energies(d: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """`output_energy` by row, ``[rows]``."""
    return ((d.to(gram.dtype) @ gram).to(d.dtype) * d).sum(dim=1)


def rounding_error(
    w: torch.Tensor,
    gram: torch.Tensor,
    quant: TensorQuant,
    grid: Grid | None = None,
    global_scale: torch.Tensor | None = None,
    importance: torch.Tensor | None = None,
) -> torch.Tensor:
    """||(Q(W) - W) X^T||^2 of rounding to nearest, a scalar.

    Args:
        w: ``[out, in]``, gram ``[in, in]``; see `output_energy`.
        grid: chosen for W; None takes the one that its ranges span.
        global_scale: ``[1]``, for two-level formats; None takes that of W alone.
        importance: ``[out]``, what the squared error of an output counts; None counts all alike.
    """
    total = torch.zeros((), dtype=torch.float32, device=w.device)
    global_scale = own_global_scale(w, quant, global_scale)
    for rows in row_chunks(w.shape[0], w.shape[1], multiple=rows_per_group(quant, w.shape[0])):
        own = grid_of(w[rows], quant, None, global_scale) if grid is None else grid.rows(quant, w.shape[0], rows)
        d = round_to_grid(w[rows], quant, own, global_scale)[0].sub_(w[rows])
        total += output_energy(d if importance is None else d * importance[rows, None].sqrt(), gram)
    return total


def output_error(w: torch.Tensor, changed: torch.Tensor, gram: torch.Tensor) -> float:
    """||(changed - w) X^T||^2 / ||w X^T||^2; 0 where the layer's output is zero. Shapes as in `output_energy`."""
    difference = torch.zeros((), dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for rows in row_chunks(*w.shape):
        difference += output_energy(changed[rows] - w[rows], gram).double().cpu()
        total += output_energy(w[rows], gram).double().cpu()
    return float(difference / total) if total > 0 else 0.0
