"""Masks for evaluation: the dense computation on pruned inputs, and what was pruned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from calibration.architectures import ArchitectureSpec, resolve
from ptq.runtime.load import Loaded
from sparsity.files import Sparsity, load_sparsity
from sparsity.masking import FIRST, Masks, mask_model, skipped_weights


@dataclass(frozen=True)
class Pruning:
    """Masks on a model that was loaded, and what they prune.

    Attributes:
        sizes: module path of every linear of the blocks -> number of its weights.
    """

    sparsity: Sparsity
    masks: Masks
    spec: ArchitectureSpec
    sizes: Mapping[str, int]

    def shares(self) -> dict[str, float]:
        """Kind of site (``down_proj input``) -> share of its values pruned so far."""
        kinds: dict[str, list[int]] = {}
        for site in self.sparsity.sites:
            tally = self.masks.tallies[site.name]
            pair = kinds.setdefault(f"{site.linear.rpartition('.')[2]} {site.mode}", [0, 0])
            pair[0] += tally.pruned
            pair[1] += tally.values
        return {kind: pruned / max(values, 1) for kind, (pruned, values) in kinds.items()}

    def weights_skipped(self) -> float:
        """Share of the weights of the blocks' linears that one decoded token need not read."""
        shares = {name: tally.share for name, tally in self.masks.tallies.items()}
        return sum(skipped_weights(self.spec, self.sizes, shares).values()) / sum(self.sizes.values())


def attach_masks(loaded: Loaded, dense: int = FIRST) -> tuple[Loaded, Pruning | None]:
    """Prune in every forward pass of a model by the thresholds in its folder, where there are some.

    Args:
        dense: positions at the start of each sequence that are never pruned.

    Returns:
        the same model, whose path says so, and what was placed on it.
    """
    sparsity = load_sparsity(loaded.folder)
    if sparsity is None:
        return loaded, None
    spec = resolve(loaded.model.config)
    masks = mask_model(loaded.model, spec, sparsity.sites, dense)
    where = "all positions but the first" if dense == FIRST else f"positions from {dense} on (decode only)"
    said = f"{sparsity.method} {sparsity.target:g}, masks on {where}"
    return replace(loaded, masks=said), Pruning(sparsity, masks, spec, linear_sizes(loaded.model, spec))


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
