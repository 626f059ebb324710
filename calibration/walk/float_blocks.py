"""The decoder blocks of a checkpoint, loaded one at a time: their float weights, and the hidden states that enter."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from calibration.distributed import Processes
from calibration.memory import return_freed
from calibration.model.checkpoint import TensorSource
from calibration.model.skeleton import Skeleton, load_parameters, places, release
from calibration.model.token_rows import only_rows, token_table
from calibration.progress import Progress
from calibration.text.crops import TokenBatches
from calibration.walk.ahead import Ahead
from calibration.walk.capture import transform_input
from calibration.walk.context import Context
from calibration.walk.masters import Masters
from calibration.walk.outer_tensors import OuterTensors
from calibration.walk.passes import Pass, Phase, keeps_originals
from calibration.walk.segment import Segment
from calibration.walk.states import HiddenStates

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class FloatBlocks:
    """The blocks as they are in the checkpoint, and as the passes that change their basis leave them.

    Attributes:
        passes: those of the run; none where the model is only looked at.
        schemes: block index -> {linear: scheme} of the linears to quantize, block-relative names.
        master_dtype: float32; float64 in exactness tests.
    """

    reader: TensorSource
    skeleton: Skeleton
    passes: Sequence[Pass] = ()
    schemes: Callable[[int], Mapping[str, Any]] = lambda index: {}
    batch_size: int = 4
    master_dtype: torch.dtype = torch.float32

    @cached_property
    def _ahead(self) -> Ahead:
        return Ahead(self.reader, self.skeleton.device)

    def __len__(self) -> int:
        return self.skeleton.spec.n_blocks

    @property
    def outside(self) -> OuterTensors:
        """What lies outside the blocks, as the passes leave it."""
        return OuterTensors(self.reader, self.skeleton.spec, self.passes)

    def transform_inputs(self) -> None:
        """Give the model the input transforms that its weights will expect once the passes have been applied."""
        for index in range(self.skeleton.spec.n_blocks):
            block, quantized = self.skeleton.block(index), self.schemes(index)
            for step in self.passes:
                spec = self.skeleton.spec.block(index)
                for linear, transform in step.input_transforms(spec, quantized).items():
                    path = self.skeleton.spec.module_name(linear)
                    transform_input(block.get_submodule(path), transform)

    @torch.no_grad()
    def observe(
        self, tokens: TokenBatches, progress: Progress, processes: Processes | None = None
    ) -> Iterator[tuple[Segment, HiddenStates]]:
        """Every block of the model as it is, loaded, with the states (of this process) that enter it; nothing is
        committed. The caller runs the states through the block, looking at what it wants, before it asks for the next
        one."""
        states = self.enter(tokens, progress, processes)
        progress.stage("blocks", self.skeleton.spec.n_blocks * len(states.batches))
        for index in range(self.skeleton.spec.n_blocks):
            segment = self.load(index)
            yield segment, states
            release(segment.module)
            segment.masters.clear()  # the caller may still hold the segment while the next one is loaded
            return_freed()

    def enter(self, tokens: TokenBatches, progress: Progress, processes: Processes | None = None) -> HiddenStates:
        """The hidden states that enter the first block: load what comes before it (of the token embedding the rows of
        these tokens), run every batch (of this process), drop it again."""
        progress.stage("embed", 1)
        outside, table = self.outside, token_table(self.skeleton.model)
        names = {self.skeleton.spec.root_module_name(n): n for n in self.skeleton.stem_names(outside.names)}
        with ExitStack() as stack:
            if table is not None and table[0] in names:
                wanted = tokens.input_ids.unique()
                rows = self.cast(outside.rows(names.pop(table[0]), wanted))
                stack.enter_context(only_rows(table[1], wanted.to(self.skeleton.device), rows))
                del rows
            stem = {path: self.cast(outside.tensor(name)) for path, name in names.items()}
            load_parameters(self.skeleton.model, stem)
            self.reader.close()
            states = HiddenStates.from_tokens(self.skeleton, tokens, self.batch_size, processes)
        for name in stem:
            parent, _, leaf = name.rpartition(".")
            module = self.skeleton.model.get_submodule(parent)
            if leaf in module._buffers:
                continue
            module._parameters[leaf] = torch.nn.Parameter(stem[name].to("meta"), requires_grad=False)
        progress.advance("embed")
        return states

    def outside_parameters(self) -> dict[str, torch.Tensor]:
        """Parameters and stored buffers that are in no block, in the dtype of the forward pass, by module path."""
        known = places(self.skeleton.model)
        names = {self.skeleton.spec.root_module_name(name): name for name in self.outside.names}
        found = {t: self.cast(self.outside.tensor(name)) for t, name in names.items() if t in known}
        self.reader.close()
        return found

    def cast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Into the dtype of the forward pass; indices stay integers."""
        if not tensor.is_floating_point():
            return tensor.to(self.skeleton.device)
        return tensor.to(self.skeleton.device, self.skeleton.dtype)

    def stored(self, index: int, without: Container[str] = ()) -> dict[str, torch.Tensor]:
        """Stored tensors of one block but those in ``without``, block-relative names, in their stored dtypes."""
        prefix = self.skeleton.spec.prefix(index)
        tensors = {n: self.reader.tensor(prefix + n) for n in self._names(index) if n not in without}
        self.reader.close()
        return tensors

    def _names(self, index: int) -> list[str]:
        """Block-relative names of the tensors of one block that the model class has a place for."""
        prefix = self.skeleton.spec.prefix(index)
        names = [n[len(prefix) :] for n in self.reader.infos if n.startswith(prefix)]
        return [n for n in names if self.skeleton.block_has(index, n)]

    def fill(self, index: int, tensors: Tensors) -> None:
        rename = self.skeleton.spec.module_name
        load_parameters(self.skeleton.block(index), {rename(n): t for n, t in tensors.items()})

    def load(self, index: int, with_module: bool = True) -> Segment:
        """One block with float masters; ``with_module`` also fills the module for forward passes."""
        spec, prefix = self.skeleton.spec, self.skeleton.spec.prefix(index)
        names = self._names(index)
        dtypes = {n: self.reader.infos[prefix + n].dtype for n in names}
        read: dict[str, Callable[[], torch.Tensor]] = {n: partial(self._ahead.tensor, prefix + n) for n in names}
        for step in self.passes:
            for linear in step.new_biases(spec, index, read):
                shape = self.reader.infos[f"{prefix}{linear}.weight"].shape
                dtypes[f"{linear}.bias"] = dtypes[f"{linear}.weight"]
                made = torch.zeros(shape[1 if spec.conv1d else 0], dtype=dtypes[f"{linear}.bias"])
                read[f"{linear}.bias"] = made.clone
        masters = Masters(read, self.skeleton.device, self.master_dtype)
        if with_module:
            self.fill(index, {n: masters[n].to(self.skeleton.dtype) for n in masters})
            self.reader.close()
        if index + 1 < len(self):
            following = self.skeleton.spec.prefix(index + 1)
            self._ahead.expect([following + n for n in self._names(index + 1)])
        return Segment(
            index=index,
            prefix=spec.prefix(index),
            spec=spec.block(index),
            architecture=spec,
            module=self.skeleton.block(index),
            masters=masters,
            stored_dtypes=dtypes,
            schemes=dict(self.schemes(index)),
            keep_originals=keeps_originals(self.passes),
        )

    def load_transformed(self, index: int, with_module: bool = True) -> Segment:
        """`load`, and the passes that change the basis: hidden states have the new one, the file's weights do not."""
        segment = self.load(index, with_module)
        for step in self.passes:
            if step.phases == (Phase.TRANSFORM,):
                step.apply(segment, Context(segment, None, (), False, False, lambda _: None))
        if with_module:
            segment.sync()
            return_freed()  # what masters were made of
        return segment
