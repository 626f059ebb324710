"""Which kernel runs a quantized linear: the first that can, or the one asked for by name."""

from __future__ import annotations

from calibration.errors import ToolkitError, unknown_value
from ptq.runtime.kernels.fp8 import FP8
from ptq.runtime.kernels.int4 import INT4
from ptq.runtime.kernels.int8 import INT8
from ptq.runtime.kernels.integer import INTEGER
from ptq.runtime.kernels.kernel import Kernel, KernelQuery
from ptq.runtime.kernels.reference import REFERENCE
from ptq.runtime.kernels.rows import ROWS
from ptq.runtime.kernels.triton_smooth import TRITON_SMOOTH

KERNELS: tuple[Kernel, ...] = (TRITON_SMOOTH, INTEGER, FP8, INT4, INT8, ROWS, REFERENCE)
"""Fastest first. The last one supports everything."""


def _names() -> list[str]:
    return [kernel.name for kernel in KERNELS]


def check_kernel(name: str | None) -> None:
    """Refuse a name that is no kernel's, also where no linear would run on it.

    Raises:
        ToolkitError: with the nearest name.
    """
    if name is not None and name not in _names():
        raise unknown_value("kernel", name, _names())


def select(query: KernelQuery, prefer: str | None = None) -> Kernel:
    """The first kernel that supports ``query``, or the kernel called ``prefer``.

    Raises:
        ToolkitError: no kernel is called ``prefer``, or it cannot run this query (the error has its reason).
    """
    if prefer is None:
        unasked = (k for k in KERNELS if not k.decoding and query.device_type not in k.on_request)
        return next(k for k in unasked if k.refusal(query) is None)
    check_kernel(prefer)
    chosen = next(kernel for kernel in KERNELS if kernel.name == prefer)
    reason = chosen.refusal(query)
    if reason is not None:
        able = [kernel.name for kernel in KERNELS if kernel.refusal(query) is None]
        raise ToolkitError(f"kernel: '{prefer}' cannot run this layer: {reason}", f"use one of: {', '.join(able)}")
    return chosen


def refusals(query: KernelQuery, chosen: Kernel) -> dict[str, str]:
    """Kernel name to the reason why it was not taken, for every kernel faster than ``chosen``. Integer products are no
    alternative where inputs are not quantized."""
    faster = [
        k for k in KERNELS[: KERNELS.index(chosen)] if not k.decoding and (query.inputs is not None or not k.integer)
    ]

    def reason(kernel: Kernel) -> str:
        slow = f"it is slow on {query.device_type}" if query.device_type in kernel.on_request else None
        return kernel.refusal(query) or slow or f"'{chosen.name}' was asked for by name"

    return {kernel.name: reason(kernel) for kernel in faster}
