"""The reference runtime: every linear computed densely on pruned inputs. It is what fast kernels are tested against.

Position 0 of a sequence is never pruned: models store attention sinks there, in massive activations whose neighbours
matter, and a decoder's runtime computes prompts densely anyway. Elsewhere massive activations are the largest values,
which no threshold prunes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from calibration.architectures import ArchitectureSpec, FeedForward
from calibration.model.watching import Watch, place
from sparsity.sites import Site, prune, small

FIRST = 1
"""Positions at the start of a sequence that are always dense."""


@dataclass
class Tally:
    """How many values a site pruned, of how many that it could."""

    pruned: int = 0
    values: int = 0

    @property
    def share(self) -> float:
        return self.pruned / max(self.values, 1)


def total_tallies(parts: Sequence[Mapping[str, Tally]]) -> dict[str, Tally]:
    """Tallies of several processes with the same sites, added up."""
    return {
        name: Tally(sum(part[name].pruned for part in parts), sum(part[name].values for part in parts))
        for name in parts[0]
    }


@dataclass
class Masks:
    """Masks placed on a model or a block.

    Attributes:
        dense: positions at the start of every sequence that stay dense: `FIRST`, or the length of the prompt.
        tallies: site name -> what was pruned since.
        handles: of the hooks that prune.
        start: positions before the running forward pass, in the key-value cache.
    """

    dense: int = FIRST
    tallies: dict[str, Tally] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)
    start: int = 0

    def remove(self) -> None:
        """Make the model dense again."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def watch(self, site: Site, path: str, output: bool) -> Watch:
        """The watch that prunes the input (or output) of the submodule at ``path``."""
        tally = self.tallies.setdefault(site.name, Tally())

        def look(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
            later = (positions + self.start >= self.dense).expand(x.shape[:-1])
            rows = int(later.sum())
            if not rows:
                return None
            tally.values += rows * x.shape[-1]
            tally.pruned += int((small(x, site.threshold, site.center) & later[..., None]).sum())
            return torch.where(later[..., None], prune(x, site.threshold, site.center), x)

        return Watch(path, look, output)


def feed_forwards(architecture: ArchitectureSpec, index: int) -> dict[str, FeedForward]:
    """Module path of each gate, below the block -> its feed-forward network."""
    networks = architecture.block(index).feed_forward
    return {architecture.module_name(n.gate): n for n in networks if n.gate is not None}


def block_watches(masks: Masks, architecture: ArchitectureSpec, index: int, sites: Iterable[Site]) -> list[Watch]:
    """Watches for those of ``sites`` that lie in a block."""
    prefix, networks = architecture.prefix(index), feed_forwards(architecture, index)
    watches = []
    for site in sites:
        if site.linear.startswith(prefix):
            path = site.linear.removeprefix(prefix)
            output = site.mode == "output"
            watches.append(masks.watch(site, networks[path].nonlinearity if output else path, output))
    return watches


def mask_model(model: Any, architecture: ArchitectureSpec, sites: Iterable[Site], dense: int = FIRST) -> Masks:
    """Prune at ``sites`` in every forward pass of a transformers model from here on, with a key-value cache or not."""
    masks, sites = Masks(dense), tuple(sites)

    def begins(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        masks.start = 0 if cache is None else int(cache.get_seq_length())

    masks.handles.append(model.register_forward_pre_hook(begins, with_kwargs=True))
    blocks = model.get_submodule(architecture.blocks)
    for index in range(architecture.n_blocks):
        masks.handles += place(blocks[index], block_watches(masks, architecture, index, sites))
    return masks


@contextmanager
def block_masked(
    block: nn.Module, architecture: ArchitectureSpec, index: int, sites: Iterable[Site]
) -> Iterator[Masks]:
    """Prune at the sites of one block while open."""
    masks = Masks()
    masks.handles += place(block, block_watches(masks, architecture, index, sites))
    try:
        yield masks
    finally:
        masks.remove()


def skipped_weights(
    architecture: ArchitectureSpec, numel: Mapping[str, int], shares: Mapping[str, float]
) -> dict[str, float]:
    """Weights that one decoded token need not read, per linear.

    Args:
        numel: module path of each linear of the blocks -> number of its weights.
        shares: site name -> share pruned.

    Returns:
        the linears with skipped weights, and how many: the share of the input that is pruned; for ``up`` and ``down``
        behind a pruned gate that share, or that of their own input where it is larger.
    """
    skipped: dict[str, float] = {}

    def add(linear: str, share: float) -> None:
        skipped[linear] = max(skipped.get(linear, 0.0), share * numel[linear])

    for index in range(architecture.n_blocks):
        prefix, networks = architecture.prefix(index), feed_forwards(architecture, index)
        for name, share in ((n, s) for n, s in shares.items() if n.startswith(prefix)):
            linear, _, mode = name.rpartition(".")
            if mode == "input":
                add(linear, share)
            else:
                network = networks[linear.removeprefix(prefix)]
                add(prefix + architecture.module_name(network.up), share)
                add(prefix + architecture.module_name(network.down), share)
    return skipped
