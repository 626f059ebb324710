"""From an overall target to one per site: which weights a method can skip, and what share of all bytes they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calibration.architectures import ArchitectureSpec
from calibration.errors import ToolkitError
from sparsity.gate import GatePass, with_target


def linear_bytes(infos: Mapping[str, Any], spec: ArchitectureSpec) -> dict[str, int]:
    """Full checkpoint name of every linear of the blocks -> bytes of its weight, or of its codes and scales."""
    sizes = {spec.prefix(i) + name: 0 for i in range(spec.n_blocks) for name in spec.block(i).linears}
    for name, info in infos.items():
        linear, _, part = name.rpartition(".")
        if linear in sizes and part != "bias":
            sizes[linear] += info.nbytes
    return sizes


def with_bytes_skipped(step: GatePass, share: float, infos: Mapping[str, Any], spec: ArchitectureSpec) -> GatePass:
    """The method with the target at which ``share`` of the bytes of all linears of the blocks is skipped per token.

    Args:
        infos: headers of the checkpoint, quantized or not. Experts count alike, as tokens spread over them.

    Raises:
        ToolkitError: the method cannot skip as much.
    """
    if not 0.0 <= share < 1.0:
        raise ToolkitError(f"--skip-bytes {share:g}: outside [0, 1)", "use 0.3 to skip 30 % of the bytes")
    sizes = linear_bytes(infos, spec)
    covered = sum(sizes[spec.prefix(i) + n] for i in range(spec.n_blocks) for n in step.skipped(spec.block(i)))
    most = covered / sum(sizes.values())
    if share >= most:
        raise ToolkitError(
            f"--skip-bytes {share:g}: '{step.name}' prunes what {most:.1%} of the bytes of the blocks depend on",
            f"use less than {most:.3f}, or --method teal, which reaches all linears",
        )
    return with_target(step, share / most)
