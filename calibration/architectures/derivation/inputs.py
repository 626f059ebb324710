"""Which modules of a block read the same tensor, in which order, and which norm made it: seen in one forward pass."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from calibration.architectures.derivation.probe import Probe
from calibration.model.classes import setting
from calibration.model.skeleton import set_submodule
from calibration.model.watching import Seen, Watch, trace, watching

TOLERANCE = 3e-5  # of the largest output value, in float32
Key = tuple[int, int]


@dataclass
class Readers:
    """Modules that read one tensor.

    Attributes:
        linears, routers, experts: their paths; routers are never quantized, ``experts`` is the list of all experts.
        norm: the norm whose output the tensor is.
        width: of the tensor's last axis.
        inner: the norm does not read the residual stream, but what a linear made.
    """

    linears: list[str] = field(default_factory=list)
    routers: list[str] = field(default_factory=list)
    experts: str | None = None
    norm: str | None = None
    width: int = 0
    inner: bool = False

    @property
    def paths(self) -> list[str]:
        return [*self.linears, *self.routers, *([self.experts] if self.experts else [])]


@dataclass
class Observed:
    """One block, as one forward pass shows it.

    Attributes:
        hidden, output: what entered and left, ``[1, tokens, hidden]``.
        groups: in order of execution.
        calls: of every submodule.
        linears: path -> module, of those that were called.
        uncalled: linears that were not, and matrices of modules that are neither linears nor routers.
    """

    probe: Probe
    index: int
    hidden: torch.Tensor
    output: torch.Tensor
    groups: list[Readers]
    calls: list[Seen]
    linears: dict[str, nn.Module]
    uncalled: list[str]

    @property
    def block(self) -> nn.Module:
        module: nn.Module = self.probe.blocks[self.index]
        return module

    def unchanged(self, entering: Mapping[str, Any], leaving: Mapping[str, Any]) -> bool:
        """Whether the output stays the same when functions change what enters and what leaves some submodules."""
        return close(self.output, self.changed(self.hidden, entering, leaving))

    def changed(self, hidden: torch.Tensor, entering: Mapping[str, Any], leaving: Mapping[str, Any]) -> torch.Tensor:
        watches = [Watch(path, _look(change)) for path, change in entering.items()]
        watches += [Watch(path, _look(change), output=True) for path, change in leaving.items()]
        with watching(self.block, watches):
            return self.probe.run(self.index, hidden)


def _look(change: Any):  # type: ignore[no-untyped-def]
    return lambda x, positions: change(x)


def close(expected: torch.Tensor, found: torch.Tensor) -> bool:
    """Equal to `TOLERANCE` of the largest value."""
    if expected.shape != found.shape or not bool(torch.isfinite(found).all()):
        return False
    return float((expected - found).abs().max()) <= TOLERANCE * float(expected.abs().max())


def is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def widths(module: nn.Module) -> tuple[int, int]:
    """``(out, in)``."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    out, inside = weight.shape if isinstance(module, nn.Linear) else (weight.shape[1], weight.shape[0])
    return int(out), int(inside)


def key(tensor: torch.Tensor) -> Key:
    """Address and size: a view of all but the last token is another tensor."""
    return tensor.data_ptr(), tensor.numel()


def observe(probe: Probe, index: int) -> Observed:
    """Fill one block with random weights and watch it run."""
    block = probe.load(index)
    hidden = probe.hidden_states()
    read = _read_directly(probe, index, hidden)
    with trace(block) as calls:
        output = probe.run(index, hidden)
    experts = probe.experts.get(index)
    inside = f"{experts.module}." if experts else None
    calls = [call for call in calls if inside is None or not call.path.startswith(inside)]
    counts = _expert_counts(probe)
    groups: dict[Key, Readers] = {}
    linears: dict[str, nn.Module] = {}
    for call in calls:
        module = block.get_submodule(call.path)
        if not call.entered:
            continue
        group = groups.get(key(call.entered[0]))
        kind = _kind(module, call, experts.module if experts else None, counts)
        if kind is None or (kind == "linear" and call.path in read):
            continue
        if group is None:
            group = groups[key(call.entered[0])] = Readers(width=call.entered[0].shape[-1])
        if kind == "experts":
            group.experts = call.path
        elif call.path not in group.paths:
            (group.linears if kind == "linear" else group.routers).append(call.path)
        if is_linear(module):
            linears[call.path] = module
    _name_norms(block, calls, groups, linears, probe.hidden)
    named = {path for group in groups.values() for path in group.paths}
    rest = [
        name.removesuffix(".weight")
        for name, parameter in block.named_parameters(remove_duplicate=False)
        if parameter.ndim > 1 and not (inside and name.startswith(inside)) and name.removesuffix(".weight") not in named
    ]
    return Observed(probe, index, hidden, output, list(groups.values()), calls, linears, rest)


class _CallOnly(nn.Module):
    """A linear that can be called, and whose weight cannot be read: what it is once it is quantized."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.linear(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["linear"], name)


def _read_directly(probe: Probe, index: int, hidden: torch.Tensor) -> set[str]:
    """Linears whose weight the block's class reads itself: they cannot be quantized for any reader."""
    block, found = probe.blocks[index], set[str]()
    linears = {path: module for path, module in block.named_modules() if is_linear(module)}

    def works(paths: Collection[str]) -> bool:
        for path in paths:
            set_submodule(block, path, _CallOnly(linears[path]))
        try:
            probe.run(index, hidden)
        except AttributeError:
            return False
        finally:
            for path in paths:
                set_submodule(block, path, linears[path])
        return True

    if not works(linears):
        found = {path for path in linears if not works([path])}
    return found


def _kind(module: nn.Module, call: Seen, experts: str | None, counts: Collection[int]) -> str | None:
    if call.path == experts:
        return "experts"
    if is_linear(module):
        return "router" if widths(module)[0] in counts else "linear"
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 2 or isinstance(module, nn.Embedding):
        return None
    return "router" if weight.shape[1] == call.entered[0].shape[-1] else None


def _expert_counts(probe: Probe) -> set[int]:
    """Output widths of linears that choose experts or weigh a shared one; empty in dense models."""
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_layer")
    counts = {int(v) for v in (setting(probe.text, n) for n in names) if isinstance(v, int) and v > 1}
    return counts | {1} if counts else set()


def _name_norms(
    block: nn.Module,
    calls: list[Seen],
    groups: Mapping[Key, Readers],
    linears: Mapping[str, nn.Module],
    hidden: int,
) -> None:
    """Say of each group which norm made its tensor, and what that norm reads."""
    made = {call.left.untyped_storage().data_ptr() for call in calls if call.path in linears and call.left is not None}
    for call in calls:
        weight = block.get_submodule(call.path)._parameters.get("weight")
        if weight is None or weight.ndim != 1 or call.left is None or not call.entered:
            continue
        group = groups.get(key(call.left))
        if group is not None and weight.numel() == call.left.shape[-1] == group.width:
            group.norm = call.path
            narrow = group.width != hidden
            group.inner = narrow or call.entered[0].untyped_storage().data_ptr() in made
