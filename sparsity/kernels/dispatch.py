"""Which kernel runs a sparse product: the first that can, or the one asked for by name."""

from __future__ import annotations

from calibration.errors import ToolkitError, unknown_value
from sparsity.kernels.gpu import TRITON
from sparsity.kernels.kernel import SparseKernel, SparseQuery
from sparsity.kernels.native import NATIVE
from sparsity.kernels.reference import REFERENCE

KERNELS: tuple[SparseKernel, ...] = (NATIVE, TRITON, REFERENCE)
"""Fastest first. The last one supports everything."""


def select(query: SparseQuery, prefer: str | None = None) -> SparseKernel:
    """The first kernel that supports ``query``, or the kernel called ``prefer``.

    Raises:
        ToolkitError: no kernel is called so, or it cannot run this query (with its reason).
    """
    if prefer is None:
        return next(kernel for kernel in KERNELS if kernel.supports(query) is None)
    chosen = next((kernel for kernel in KERNELS if kernel.name == prefer), None)
    if chosen is None:
        raise unknown_value("sparse kernel", prefer, [kernel.name for kernel in KERNELS])
    reason = chosen.supports(query)
    if reason is not None:
        able = [kernel.name for kernel in KERNELS if kernel.supports(query) is None]
        raise ToolkitError(f"sparse kernel: '{prefer}' cannot run this layer: {reason}", f"use {' or '.join(able)}")
    return chosen


def refusals(query: SparseQuery) -> dict[str, str]:
    """Kernel name to the reason why it cannot run ``query``."""
    reasons = {kernel.name: kernel.supports(query) for kernel in KERNELS}
    return {name: reason for name, reason in reasons.items() if reason is not None}
