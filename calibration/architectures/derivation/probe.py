"""A model class with random weights in one decoder block of each kind, for finding out what its linears read and make.

Which tensors meet in a block is a property of the class and the config, not of the weights: random weights in general
position show it, cost no reading, and cannot hide a path behind a zero. What is found is proved once more on a
checkpoint's own weights before they are worked on (`calibration.walk.proof`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from calibration.architectures.spec import Experts
from calibration.errors import ToolkitError
from calibration.model.classes import (
    Attention,
    attention_of,
    empty_model,
    expert_names,
    find_blocks,
    is_wrapper,
    setting,
    text_config,
)
from calibration.model.experts import ExpertList

TOKENS = 8
ROWS = 64  # of embedding tables and head
SPREAD = 0.3  # of gains and biases around what transformers starts from


@dataclass(frozen=True)
class Call:
    """How the model calls a block: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Probe:
    """The class of ``config`` with everything on meta but what is asked for.

    Attributes:
        model, attention: see `empty_model`.
        path: of the decoder blocks; ``blocks`` the modules.
        kinds: for every block, the index of the first block of its kind: same modules, same shapes, same role.
        calls: how each block is called on `TOKENS` tokens.
        experts: index of the first block of a kind -> where it keeps convertible experts.

    Raises:
        ToolkitError: the class has no list of blocks that are called once each, in order.
    """

    def __init__(self, config: Any, seed: int = 0) -> None:
        self.config, self.text = config, text_config(config)
        self.generator = torch.Generator().manual_seed(seed)
        self.attention: Attention = attention_of(config)
        self.model = empty_model(config, torch.float32, torch.device("cpu"), self.attention)
        counts = [int(setting(self.text, name) or 0) for name in ("num_hidden_layers", "num_layers")]
        count = counts[0]
        path = next((found for n in counts if n and (found := find_blocks(self.model, n))), None)
        if path is None:
            raise underivable(config, f"no list of {count} decoder blocks in {type(self.model).__name__}")
        self.path = path
        self.blocks = self.model.get_submodule(path)
        self.kinds = _kinds(self.blocks, setting(self.text, "layer_types"))
        self._fill_stem()
        self.hidden = int(self.text.hidden_size)
        self.tuple_output = False
        self.calls = self._record()
        self.experts: dict[int, Experts] = {}

    def _fill_stem(self) -> None:
        """Random weights for what the language model has outside its blocks; tables get few rows."""
        tower = self.path.rpartition(".")[0] if is_wrapper(self.config) else ""
        for path, module in self.model.named_modules():
            inside = path == "lm_head" or f"{path}.".startswith(tower and f"{tower}.")
            if inside and not path.startswith(self.path + "."):
                self._fill(module)
        self.model.tie_weights()

    def _fill(self, module: nn.Module) -> None:
        rows = isinstance(module, nn.Embedding) or module is self.model.get_output_embeddings()
        names = [name for name, p in module._parameters.items() if p is not None and p.is_meta]
        for name in names:
            old = module._parameters[name]
            assert old is not None
            shape = (min(ROWS, old.shape[0]), *old.shape[1:]) if rows and old.shape[0] > 4096 else old.shape
            module._parameters[name] = nn.Parameter(torch.empty(shape), requires_grad=False)
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # may lie behind the last row
        if not isinstance(module, nn.Linear) and names:
            self.model._init_weights(module)
        for name in names:
            parameter = module._parameters[name]
            assert parameter is not None
            tensor = parameter.data
            noise = torch.randn(tensor.shape, generator=self.generator)
            if tensor.ndim < 2:
                tensor.add_(SPREAD * noise) if not isinstance(module, nn.Linear) else tensor.copy_(SPREAD * noise)
            else:
                tensor.copy_(noise.mul_(1.0 if isinstance(module, nn.Embedding) else tensor.shape[-1] ** -0.5))

    @torch.no_grad()
    def _record(self) -> list[Call]:
        calls: list[tuple[int, Call]] = []
        entering: list[tuple[int, ...]] = []

        def recorder(index: int):  # type: ignore[no-untyped-def]
            def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                calls.append((index, Call(args, kwargs)))
                entering.append(tuple(hidden.shape))
                return hidden

            return forward

        for index, block in enumerate(self.blocks):
            block.forward = recorder(index)
        ids = torch.arange(TOKENS).view(1, TOKENS)
        try:
            self.model.base_model(ids, use_cache=False)
        except (IndexError, AttributeError, TypeError, ValueError, RuntimeError):
            # what follows the first block takes its result for a tuple
            calls.clear()
            entering.clear()
            self.tuple_output = True
            self._record_tuples(calls, ids)
        finally:
            for block in self.blocks:
                del block.forward
        if [index for index, _ in calls] != list(range(len(self.blocks))):
            raise underivable(self.config, f"the blocks of {self.path} are not called once each, in order")
        if any(shape[:2] != (1, TOKENS) for shape in entering):  # XLNet: [tokens, batch, hidden]
            reason = f"the blocks of {self.path} take hidden states {list(entering[-1])}, not [batch, tokens, hidden]"
            raise underivable(self.config, reason)
        return [call for _, call in calls]

    def _record_tuples(self, calls: list[tuple[int, Call]], ids: torch.Tensor) -> None:
        for block in self.blocks:
            inner = block.forward
            block.forward = lambda *args, inner=inner, **kwargs: (inner(*args, **kwargs), None)
        self.model.base_model(ids, use_cache=False)

    def load(self, index: int) -> nn.Module:
        """Random weights for one block, with its experts as linears; the block. All experts share one set of weights,
        so that memory is one block with one expert."""
        block = self.blocks[index]
        experts = self._find_experts(index, block)
        if experts is not None:
            self.experts[index] = experts
            _exchange(self, block, experts)
        for module in block.modules():
            self._fill(module)
        return block

    def _find_experts(self, index: int, block: nn.Module) -> Experts | None:
        for path, module in block.named_modules():
            fused, down = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
            plain = getattr(module, "has_gate", False) and getattr(module, "is_concatenated", False)
            plain = plain and not (getattr(module, "has_bias", False) or getattr(module, "is_transposed", False))
            if not (plain and isinstance(fused, nn.Parameter) and isinstance(down, nn.Parameter) and fused.ndim == 3):
                continue
            names = expert_names(self.model, f"{self.path}.{index}.{path}")
            activation = _activation(module, self.text)
            if names is None or activation is None:
                continue
            count, width, hidden = down.shape[0], down.shape[2], down.shape[1]
            return Experts(path, *names, count, hidden, width, activation)
        return None

    def hidden_states(self) -> torch.Tensor:
        """``[1, tokens, hidden]``."""
        return torch.randn(1, TOKENS, self.hidden, generator=self.generator)

    @torch.no_grad()
    def run(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output, ``[1, tokens, hidden]``."""
        call = self.calls[index]
        result = self.blocks[index](hidden.clone(), *call.args, **call.kwargs)
        self.tuple_output = isinstance(result, tuple | list)
        output: torch.Tensor = result[0] if self.tuple_output else result
        return output.clone()


class _SharedExperts(ExpertList):
    """Experts that share their weights, and differ by a factor each: else it would not show whom the router chose."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        factors = 1 + torch.arange(len(self) + 1) / len(self)  # the last index means "no expert"
        return super().forward(hidden_states, top_k_index, top_k_weights * factors[top_k_index])


def _exchange(probe: Probe, block: nn.Module, experts: Experts) -> None:
    """`ExpertList` in place of the class's experts, after a look at whether the two agree."""
    parent, _, name = experts.module.rpartition(".")
    theirs = block.get_submodule(experts.module)
    with torch.device("meta"):
        ours = _SharedExperts(experts)
    probe._fill(ours[0].get_submodule(experts.gate))
    probe._fill(ours[0].get_submodule(experts.up))
    probe._fill(ours[0].get_submodule(experts.down))
    gate, up, down = (ours[0].get_parameter(f"{n}.weight") for n in (experts.gate, experts.up, experts.down))
    for expert in list(ours)[1:]:
        for n, weight in ((experts.gate, gate), (experts.up, up), (experts.down, down)):
            expert.get_submodule(n)._parameters["weight"] = weight
    theirs.gate_up_proj = nn.Parameter(torch.cat([gate, up]).expand(experts.count, -1, -1), requires_grad=False)
    theirs.down_proj = nn.Parameter(down.expand(experts.count, -1, -1), requires_grad=False)
    probe.model.set_experts_implementation("eager")
    x = torch.randn(TOKENS, experts.hidden, generator=probe.generator)
    chosen = torch.arange(TOKENS).remainder(experts.count).view(-1, 1)
    with torch.no_grad():
        share = torch.rand(TOKENS, 1, generator=probe.generator)
        expected, found = theirs(x, chosen, share), ExpertList.forward(ours, x, chosen, share)
    if not torch.allclose(expected, found, rtol=1e-4, atol=1e-4 * float(expected.abs().max())):
        probe.experts = {}
        raise underivable(probe.config, f"the experts of {type(theirs).__name__} are not down(act(gate(x)) * up(x))")
    setattr(block.get_submodule(parent), name, ours)


def _activation(module: nn.Module, config: Any) -> str | None:
    """transformers' name of the activation inside an experts module."""
    from transformers.activations import ACT2FN

    named = [setting(config, k) for k in ("hidden_activation", "hidden_act", "activation_function", "mlp_hidden_act")]
    names = [name for name in (*named, "silu") if isinstance(name, str) and name in ACT2FN]  # SiLU: often unsaid
    act, x = getattr(module, "act_fn", None), torch.linspace(-4.0, 4.0, 33)
    if act is None:
        return names[0]
    try:
        return next((name for name in names if torch.equal(act(x), ACT2FN[name](x))), None)
    except TypeError:  # a function of two tensors
        return None


def _kinds(blocks: nn.Module, roles: list[str] | None) -> list[int]:
    """For every block the index of the first one that is built the same."""
    first: dict[tuple[Any, ...], int] = {}
    found = []
    for index, block in enumerate(blocks.children()):
        shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
        key = (roles[index] if roles and index < len(roles) else None, str(block), shapes)
        found.append(first.setdefault(key, index))
    return found


def underivable(config: Any, reason: str) -> ToolkitError:
    return ToolkitError(
        f"model_type '{config.model_type}' is not in the architecture table and cannot be derived: {reason}",
        "write a function like `llama` in calibration/architectures/llama_like.py that names the linears sharing an "
        "input and the norms before them, and list it in FAMILIES",
    )
