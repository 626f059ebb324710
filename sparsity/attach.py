"""Put sparse decoding into a loaded transformers model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from calibration.architectures import ArchitectureSpec
from calibration.errors import ToolkitError
from calibration.model.skeleton import set_submodule
from sparsity.decode import DecodeLinear, GatedFeedForward, MaskedLinear, Phase, row_slice
from sparsity.kernels.pages import on_huge_pages
from sparsity.sites import Mode, Site


@dataclass(frozen=True)
class SparseDecoder:
    """A model whose decoding skips weights.

    Attributes:
        phase: switches of all its layers.
        linears: path -> layer, for every linear that runs on a sparse kernel.
        kernels: kernel name -> number of linears.
        masked_only: path -> why this linear is pruned without a kernel, so without gain.
    """

    phase: Phase
    linears: dict[str, DecodeLinear]
    kernels: dict[str, int]
    masked_only: dict[str, str]

    @property
    def path(self) -> str:
        """``native x 155``"""
        return ", ".join(f"{name} x {n}" for name, n in sorted(self.kernels.items()))

    def bytes_skipped(self, steps: int) -> float:
        """Bytes that an average decoding step did not read, after ``steps`` of them were counted (`Phase.counting`)."""
        return sum(layer.bytes_skipped for layer in self.linears.values()) / steps


def _module_paths(architecture: ArchitectureSpec) -> list[str]:
    """Every linear of the blocks, by its path in the model class."""
    return [
        architecture.prefix(index) + architecture.module_name(name)
        for index in range(architecture.n_blocks)
        for name in architecture.block(index).linears
    ]


def decode_modes(architecture: ArchitectureSpec, sites: Iterable[Site]) -> dict[str, Mode]:
    """Path of every linear of the blocks -> how its weight must be stored: Wᵀ by rows ("input") where its inputs are
    pruned, also those of ``down`` behind a pruned gate; else W ("output").

    Raises:
        ToolkitError: a site names no linear of this architecture, or the inputs of an ``up`` whose rows are skipped.
    """
    modes: dict[str, Mode] = dict.fromkeys(_module_paths(architecture), "output")
    sites = tuple(sites)
    for site in sites:
        if site.linear not in modes:
            raise ToolkitError(
                f"{site.name}: the model has no linear '{site.linear}'", "run `ptq sparsify` on this model"
            )
        modes[site.linear if site.mode == "input" else _network(architecture, site).down] = "input"
    for site in (s for s in sites if s.mode == "output"):
        up = _network(architecture, site).up
        if modes[up] == "input":
            raise ToolkitError(
                f"{up}: both its inputs and its outputs are pruned, and its weight is stored once",
                "use one method for the feed-forward network",
            )
    return modes


@dataclass(frozen=True)
class _Network:
    """Paths of one gated feed-forward network in the model class."""

    module: str
    gate: str
    up: str
    down: str
    nonlinearity: str


def _network(architecture: ArchitectureSpec, site: Site) -> _Network:
    for index in range(architecture.n_blocks):
        prefix = architecture.prefix(index)
        if not site.linear.startswith(prefix):
            continue
        for found in (n for n in architecture.block(index).feed_forward if n.gate is not None):
            gate, up, down = (prefix + architecture.module_name(str(n)) for n in (found.gate, found.up, found.down))
            if gate == site.linear:
                return _Network(gate.rpartition(".")[0], gate, up, down, prefix + found.nonlinearity)
    raise ToolkitError(
        f"{site.name}: '{site.linear}' is not the gate of a feed-forward network of {architecture.family}",
        "prune inputs instead: `ptq sparsify --method scap` or `teal`",
    )


def float_rows(module: nn.Module, mode: Mode, shared: bool) -> torch.Tensor:
    """The weight of a float linear by rows of Wᵀ or W, on huge pages; in place of ``shared`` weights (a tied head) no
    copy is made where they are stored that way."""
    weight = module.get_parameter("weight").detach()
    by_inputs = type(module).__name__ == "Conv1D"  # GPT-2 stores Wᵀ
    rows = weight if by_inputs == (mode == "input") else weight.T
    return rows if shared and rows.is_contiguous() else on_huge_pages(rows)


def attach(
    model: Any, architecture: ArchitectureSpec, sites: Iterable[Site], phase: Phase, kernel: str | None = None
) -> SparseDecoder:
    """Replace the linears of a model's blocks, and its head, by layers that decode sparsely.

    Float linears are rearranged here, one at a time. Quantized ones stay what they are, unless they were built as
    `DecodeLinear` in the `decode_modes` with the same ``phase``: where one that was not has a site, its inputs are
    pruned and its weight is read whole.

    Args:
        model: in evaluation mode, on its final device and in its final dtype.
        kernel: name of a sparse kernel; None takes the fastest that can run each linear.

    Raises:
        ToolkitError: sites that do not belong to this model.
    """
    sites = tuple(sites)
    modes = decode_modes(architecture, sites)
    embedding = model.get_input_embeddings().weight
    for path, mode in (*modes.items(), ("lm_head", "output")):
        module = model.get_submodule(path)
        if not isinstance(module, DecodeLinear) and isinstance(getattr(module, "weight", None), nn.Parameter):
            rows = float_rows(module, mode, module.weight is embedding)
            layer = DecodeLinear(rows, mode, getattr(module, "bias", None), rows.dtype, phase, kernel)
            set_submodule(model, path, layer)
    masked_only: dict[str, str] = {}
    for site in (s for s in sites if s.mode == "input"):
        _prune_inputs(model, site, phase, masked_only)
    for site in (s for s in sites if s.mode == "output"):
        _prune_gate(model, _network(architecture, site), site, phase, masked_only)
    model.register_forward_pre_hook(PhaseWatch(phase), with_kwargs=True)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, DecodeLinear)}
    kernels = Counter(layer.kernel.name for layer in linears.values())
    return SparseDecoder(phase, linears, dict(kernels), masked_only)


def _check_width(site: Site, width: int) -> None:
    parts = [t for t in (site.threshold, site.center) if t is not None]
    if any(len(t) not in (1, width) for t in parts):
        raise ToolkitError(
            f"{site.name}: {max(map(len, parts))} thresholds for {width} values", "run `ptq sparsify` on this model"
        )


def _prune_inputs(model: Any, site: Site, phase: Phase, masked_only: dict[str, str]) -> None:
    module = model.get_submodule(site.linear)
    if isinstance(module, DecodeLinear):
        _check_width(site, module.shape[1])
        module.set_mask(site.threshold, site.center, site.shift)
        return
    _check_width(site, module.in_features)
    masked_only[site.linear] = f"no sparse kernel for {module}"
    set_submodule(model, site.linear, MaskedLinear(module, site.threshold, site.center, phase))


def _prune_gate(model: Any, network: _Network, site: Site, phase: Phase, masked_only: dict[str, str]) -> None:
    gate, up, down = (model.get_submodule(path) for path in (network.gate, network.up, network.down))
    if network.gate == network.up and isinstance(gate, DecodeLinear):  # fused, gate first
        half = gate.shape[0] // 2
        gate, up = _part(gate, 0, half), _part(gate, half, 2 * half)
    elif network.gate == network.up:
        raise ToolkitError(f"{network.gate}: fused and quantized in a form without sparse kernel", "use scap or teal")
    if isinstance(gate, DecodeLinear):
        _check_width(site, gate.shape[0])
    if isinstance(down, DecodeLinear) and down.mask is None:  # what the gate pruned is zero
        down.set_mask(torch.zeros(1, device=site.threshold.device), None, None)
    for path, layer in ((network.up, up), (network.down, down)):
        if not isinstance(layer, (DecodeLinear, MaskedLinear)):
            masked_only[path] = f"no sparse kernel for {layer}"
    activation = model.get_submodule(network.nonlinearity)
    set_submodule(model, network.module, GatedFeedForward(gate, up, down, activation, site.threshold, phase))


def _part(layer: DecodeLinear, start: int, stop: int) -> DecodeLinear:
    bias = None if layer.bias is None else layer.bias[start:stop]
    rows = row_slice(layer.weight_rows, start, stop)
    return DecodeLinear(rows, "output", bias, layer.dtype, layer.phase, layer.kernel.name)


class PhaseWatch:
    """Tells the layers what each forward pass of the model is."""

    def __init__(self, phase: Phase) -> None:
        self.phase = phase

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs["inputs_embeds"] if found is None else found
        cache = kwargs.get("past_key_values")
        self.phase.decoding = tokens.shape[1] == 1 and cache is not None and int(cache.get_seq_length()) > 0
