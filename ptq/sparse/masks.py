"""Masks for evaluation: the dense computation on pruned inputs, and what was pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from calibration.architectures import ArchitectureSpec
from calibration.walk.passes import Pass
from sparsity.files import Sparsity, load_sparsity
from sparsity.job import write
from sparsity.masking import Masks, mask_model, skipped_weights

if TYPE_CHECKING:
    from calibration.record import Evaluation


@dataclass
class MaskedRuntime:
    """`ptq.gating.SparseRuntime`, by dense computation on pruned inputs. Keeps what it placed, for the printed result.

    Attributes:
        placed: thresholds, masks and weights per linear of the models that were attached, in order.
    """

    placed: list[tuple[Sparsity, Masks, ArchitectureSpec, dict[str, int]]] = field(default_factory=list)

    def write(
        self, folder: Path, steps: Sequence[Pass], gates: Mapping[str, torch.Tensor], calibration: Mapping[str, Any]
    ) -> None:
        write(folder, steps, gates, calibration)

    def attach(self, model: Any, spec: ArchitectureSpec, folder: Path, dense: int) -> str:
        sparsity = load_sparsity(folder)
        if sparsity is None:
            return ""
        masks = mask_model(model, spec, sparsity.sites, dense)
        self.placed.append((sparsity, masks, spec, linear_sizes(model, spec)))
        where = "all positions but the first" if dense == 1 else f"positions from {dense} on (decode only)"
        return f"{sparsity.method} {sparsity.target:g}, masks on {where}"


def linear_sizes(model: Any, spec: ArchitectureSpec) -> dict[str, int]:
    """Module path of every linear of the blocks -> number of its weights."""
    sizes = {}
    for index in range(spec.n_blocks):
        for name in spec.block(index).linears:
            path = spec.prefix(index) + spec.module_name(name)
            module = model.get_submodule(path)
            sizes[path] = (
                module.in_features * module.out_features if hasattr(module, "in_features") else module.weight.numel()
            )
    return sizes


def reached_lines(runtime: MaskedRuntime, result: Evaluation) -> list[str]:
    """What masks pruned on the text that was scored, by kind of site, and the share of weights it saves."""
    lines = []
    for sparsity, masks, spec, sizes in runtime.placed[:1]:
        kinds: dict[str, list[int]] = {}
        for site in sparsity.sites:
            tally = masks.tallies[site.name]
            pair = kinds.setdefault(f"{site.linear.rpartition('.')[2]} {site.mode}", [0, 0])
            pair[0] += tally.pruned
            pair[1] += tally.values
        shares = ", ".join(f"{kind} {pruned / max(values, 1):.2%}" for kind, (pruned, values) in kinds.items())
        skipped = skipped_weights(spec, sizes, {name: t.share for name, t in masks.tallies.items()})
        lines.append(f"pruned on {result.protocol.dataset}: {shares or 'nothing'}")
        lines.append(
            f"weights of the blocks skipped per decoded token: {sum(skipped.values()) / sum(sizes.values()):.2%}"
        )
    return lines
