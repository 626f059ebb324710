"""`HiddenStates`: the residual stream of every calibration batch, and how a block is run on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.func import functional_call

from calibration.distributed import Processes, lanes_of
from calibration.memory import large_together
from calibration.model.skeleton import Skeleton
from calibration.text.crops import TokenBatches
from calibration.walk.capture import Call

Reference = Literal["inputs", "model"]
"""Outputs of the float block that a pass may train towards: on the inputs of this run (what the blocks before it, as
written, produce), or on the inputs that the float model has there."""


class HiddenStates:
    """Hidden states ``[batch, seq_len, hidden]`` in the dtype of the forward pass, one tensor per batch, in place.

    A block is called with the arguments that the model itself passes to it (masks, rotary embeddings), recorded once
    per batch size and block: masks that differ between layers stay right. Batches are unpadded, so the arguments do
    not depend on the tokens.

    Attributes:
        batches: those of this process, in order.
        numbers: which of the whole calibration set these are, counted from 0.
        lanes: of the whole calibration set, see `calibration.distributed`; which batches of this process each has, none
            where another process has them.
    """

    def __init__(self, tuple_output: bool, device: torch.device) -> None:
        self.batches: list[torch.Tensor] = []
        self.numbers: list[int] = []
        self.lanes: list[range] = []
        self._calls: dict[int, list[Call]] = {}
        self._tuple_output = tuple_output
        self._device = device

    @classmethod
    def from_tokens(
        cls, skeleton: Skeleton, tokens: TokenBatches, batch_size: int, processes: Processes | None = None
    ) -> HiddenStates:
        """Run everything before the blocks, on the batches that this one of the ``processes`` has. The skeleton's stem
        must be loaded.

        Every block's forward is replaced by a recorder that returns its input, so that the embedding, its scaling and
        position embeddings come along without being named.
        """
        states = cls(skeleton.spec.tuple_output, skeleton.device)
        blocks = skeleton.model.get_submodule(skeleton.spec.blocks)
        entering: list[torch.Tensor] = []
        calls: list[Call] = []

        def recorder(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not calls:
                entering.append(hidden)
            calls.append((args, kwargs))
            return (hidden, None) if skeleton.spec.tuple_output else hidden

        for block in blocks:
            block.forward = recorder
        try:
            for ids in states._own(list(tokens.batches(batch_size)), processes or Processes()):
                calls.clear()
                skeleton.model.base_model(ids.to(skeleton.device), use_cache=False)
                states._calls.setdefault(ids.shape[0], list(calls))
                states.batches.append(entering.pop())
            calls.clear()
            skeleton.model.base_model(tokens.input_ids[:1].to(skeleton.device), use_cache=False)
            states._calls.setdefault(1, list(calls))
        finally:
            for block in blocks:
                del block.forward
        return states

    def _own(self, batches: list[torch.Tensor], processes: Processes) -> list[torch.Tensor]:
        """The batches of this process; fills `lanes` and `numbers`."""
        for lane, members in enumerate(lanes_of(len(batches))):
            first = len(self.numbers)
            self.numbers += members if processes.owner(lane) == processes.rank else ()
            self.lanes.append(range(first, len(self.numbers)))
        return [batches[number] for number in self.numbers]

    def run(
        self,
        block: nn.Module,
        index: int,
        keep: bool,
        advance: Callable[[str], None],
        limit: int | None = None,
        lane: range | None = None,
    ) -> None:
        """Run every batch, or the first ``limit``, or those of a lane, through ``block``; with ``keep`` its outputs
        replace the states."""
        with large_together():
            for i in range(len(self.batches[:limit])) if lane is None else lane:
                output = self.output(block, index, i)
                if keep:
                    self.batches[i] = output
                advance("forward")

    def output(
        self,
        block: nn.Module,
        index: int,
        batch: int,
        parameters: Mapping[str, torch.Tensor] | None = None,
        row: int | None = None,
    ) -> torch.Tensor:
        """``block`` on one batch, or one window of it, ``[windows, seq_len, hidden]``. ``parameters``, by their names
        in the block's class, stand in for its own; gradients reach them where autograd is on."""
        hidden = self.batches[batch] if row is None else self.batches[batch][row : row + 1]
        args, kwargs = self._calls[hidden.shape[0]][index]
        output = functional_call(block, dict(parameters or {}), (hidden, *args), kwargs)
        result: torch.Tensor = output[0] if self._tuple_output else output
        return result

    def call(self, batch: int, index: int) -> Call:
        """What the model passes to a block beside the hidden states, for batches of this size."""
        return self._calls[batch][index]

    def copy(self) -> HiddenStates:
        """A stream of its own that starts from the same states. Tensors are shared until a block replaces them."""
        other = HiddenStates(self._tuple_output, self._device)
        other.batches, other.numbers, other.lanes, other._calls = (
            list(self.batches),
            self.numbers,
            self.lanes,
            self._calls,
        )
        return other

    def first(self, batches: int) -> HiddenStates:
        """A stream of its own of the first so many batches of this process, in one lane. Tensors are shared until a
        block replaces them."""
        other = self.copy()
        other.batches, other.numbers = self.batches[:batches], self.numbers[:batches]
        other.lanes = [range(len(other.batches))]
        return other

    @property
    def nbytes(self) -> int:
        return sum(b.numel() * b.element_size() for b in self.batches)
