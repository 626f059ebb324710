"""Tiny models made sparse through the Python API, with everything a test wants to look at."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_models import save_tiny

from calibration.architectures import ArchitectureSpec
from calibration.model.opening import open_model
from calibration.progress import Silent
from calibration.text.crops import TokenBatches
from calibration.walk.passes import Pass
from ptq.runtime.dequantized import float_weights
from ptq.runtime.load import load_model
from sparsity.budget import Profile
from sparsity.files import sites_from
from sparsity.job import Base, calibrate
from sparsity.masking import Masks, mask_model
from sparsity.sites import Site

VOCABULARY = 96
TOKENS = TokenBatches(torch.randint(0, VOCABULARY, (48, 32), generator=torch.Generator().manual_seed(5)), {})


def kth_magnitude(values: torch.Tensor, share: float) -> float:
    """The kth smallest |value|, k = int(numel * share): pruning what is at most it prunes exactly k values (no ties).

    0 where k is 0. This is the exact form of `Histogram.threshold` for pools that fit in memory.
    """
    k = int(values.numel() * share)
    return float(values.abs().flatten().kthvalue(k).values) if k else 0.0


@dataclass(frozen=True)
class Sparse:
    """A checkpoint, its sites, and how to run it."""

    folder: Path
    spec: ArchitectureSpec
    sites: tuple[Site, ...]

    def site(self, part: str) -> Site:
        """The one site whose name holds ``part``."""
        (found,) = (site for site in self.sites if part in site.name)
        return found

    def model(self, sites: tuple[Site, ...] | None = None, dense: int = 1) -> tuple[Any, Masks]:
        model = load_model(self.folder, dtype=torch.float32).model
        return model, mask_model(model, self.spec, self.sites if sites is None else sites, dense)

    @torch.no_grad()
    def logits(self, sites: tuple[Site, ...] | None = None, dense: int = 1) -> torch.Tensor:
        return self.model(sites, dense)[0](TOKENS.input_ids, use_cache=False).logits

    @torch.no_grad()
    def reached(self, blocks: int = 1) -> dict[str, float]:
        """What masks prune on the calibration tokens in the first blocks. (Methods that calibrate the dense model know
        what enters the first one; what enters the others is pruned.)"""
        model, masks = self.model()
        model(TOKENS.input_ids, use_cache=False)
        first = tuple(self.spec.prefix(index) for index in range(blocks))
        return {name: tally.share for name, tally in masks.tallies.items() if name.startswith(first)}

    @torch.no_grad()
    def block_input(self) -> torch.Tensor:
        """What enters the first block."""
        model, seen = self.model(())[0], []
        model.get_submodule(self.spec.blocks)[0].register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        model(TOKENS.input_ids, use_cache=False)
        return seen[0]

    @torch.no_grad()
    def block_output(self, sites: tuple[Site, ...]) -> torch.Tensor:
        """What the first block gives on the calibration tokens."""
        model, seen = self.model(sites)[0], []
        model.get_submodule(self.spec.blocks)[0].register_forward_hook(lambda m, a, y: seen.append(y))
        model(TOKENS.input_ids, use_cache=False)
        return seen[0]


def make_sparse(
    step: Pass, family: str = "llama", folder: Path | None = None, tokens: TokenBatches = TOKENS, **changes: Any
) -> Sparse:
    """Calibrate one pass on a tiny model, made here unless ``folder`` has one."""
    folder = folder or save_tiny(family, Path(tempfile.mkdtemp(prefix="tiny-")), **changes)
    gates, spec = gates_of(step, folder, tokens)
    return Sparse(folder, spec, sites_from(gates))


def make_profile(step: Pass) -> tuple[dict[str, torch.Tensor], Sparse]:
    """What `Profile` measures of a method on a tiny Llama, and the model without sites."""
    folder = save_tiny("llama", Path(tempfile.mkdtemp(prefix="tiny-")))
    profile, spec = gates_of(Profile(step), folder, TOKENS)
    return profile, Sparse(folder, spec, ())


def gates_of(step: Pass, folder: Path, tokens: TokenBatches) -> tuple[dict[str, torch.Tensor], ArchitectureSpec]:
    """What a walk with one pass leaves."""
    reader, config, spec = open_model(folder)
    with tempfile.TemporaryDirectory() as blocks:
        gates = calibrate(
            Base(float_weights(reader, spec), config, spec),
            step,
            tokens,
            Path(blocks),
            dtype=torch.float32,
            device=torch.device("cpu"),
            batch_size=16,
            progress=Silent(),
        )
    return gates, spec
