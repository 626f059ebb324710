"""The streaming loop: load a block, apply the passes, commit it to a file, propagate through what was written.

Memory is one block, the hidden states and the statistics of one block; nothing grows with depth. The committed files
are the only truth: ``--resume`` replays finished blocks to get the hidden states back, and goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calibration.capture import Watch, transform_input, watching
from calibration.checkpoint import CheckpointReader, TensorSource, save_tensors, write_atomically
from calibration.context import Context
from calibration.memory import return_freed
from calibration.outside import Outside
from calibration.passes import (
    AddsBiases,
    Gates,
    Pass,
    Phase,
    TransformsInputs,
    forwards_per_block,
    references_of,
    repairs,
    stream_of,
)
from calibration.progress import Progress
from calibration.segment import Segment
from calibration.skeleton import Skeleton, load_parameters, release
from calibration.states import HiddenStates, Reference
from calibration.statistics import Statistic
from calibration.text import TokenBatches

Tensors = Mapping[str, torch.Tensor]
Transforms = Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
"""What happens to the inputs of linears, by name."""


def no_transforms(tensors: Tensors, schemes: Mapping[str, str]) -> Transforms:
    """Inputs of linears stay as they are."""
    return {}


@dataclass(frozen=True)
class Walk:
    """Everything that stays the same from block to block.

    Attributes:
        schemes: block index -> {linear: scheme} of the linears to quantize, block-relative names.
        encode: a finished segment -> the tensors of its file, full checkpoint names.
        restore: the tensors of a file and the texts of its linears' schemes (passes may have changed those) -> float
            weights, in the dtype given; all by full checkpoint names. What it leaves out is as in the checkpoint.
        folder: where ``block-00007.safetensors`` and ``block-00007.json`` go.
        master_dtype: float32; float64 in exactness tests.
        allow_unseen: experts without calibration tokens are rounded without data instead of stopping the run.
        inputs: as ``restore``, to what a user's runtime does to the inputs of linears.
    """

    reader: TensorSource
    skeleton: Skeleton
    passes: Sequence[Pass]
    schemes: Callable[[int], Mapping[str, Any]]
    encode: Callable[[Segment], dict[str, torch.Tensor]]
    restore: Callable[[Tensors, Mapping[str, str], torch.dtype], dict[str, torch.Tensor]]
    folder: Path
    batch_size: int = 4
    master_dtype: torch.dtype = torch.float32
    allow_unseen: bool = False
    inputs: Callable[[Tensors, Mapping[str, str]], Transforms] = no_transforms

    @staticmethod
    def of_float_blocks(
        reader: TensorSource,
        skeleton: Skeleton,
        batch_size: int,
        schemes: Callable[[int], Mapping[str, Any]] = lambda index: {},
    ) -> Walk:
        """A walk that looks at the blocks as they are (`observe`, `load`) and commits nothing.

        Raises:
            ToolkitError: the checkpoint lacks parameters of the model.
        """
        skeleton.check_complete(reader.infos)
        return Walk(
            reader=reader,
            skeleton=skeleton,
            passes=(),
            schemes=schemes,
            encode=lambda segment: {},
            restore=lambda tensors, schemes, dtype: {},
            folder=Path(),
            batch_size=batch_size,
        )

    def tensors_path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def record_path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.json"

    def gates_path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.gates.safetensors"

    def gates(self, index: int) -> dict[str, torch.Tensor]:
        """Activation thresholds of a finished block, as its passes left them in ``segment.gates``."""
        if not self.gates_path(index).exists():
            return {}
        with CheckpointReader.of_file(self.gates_path(index)) as file:
            return {name: file.tensor(name) for name in file.infos}

    def committed(self, index: int) -> dict[str, Any]:
        """What is recorded of a finished block's linears, by full name: ``{"scheme", "errors", "notes"}``."""
        data = json.loads(self.record_path(index).read_text(encoding="utf-8"))["linears"]
        return {self.skeleton.spec.prefix(index) + name: entry for name, entry in data.items()}

    def finished(self) -> int:
        """Blocks from the first on that are committed. The tensor file is renamed into place last."""
        count = 0
        while self.tensors_path(count).exists() and self.record_path(count).exists():
            count += 1
        return min(count, self.skeleton.spec.n_blocks)

    @property
    def outside(self) -> Outside:
        """What lies outside the blocks, as the passes leave it."""
        return Outside(self.reader, self.skeleton.spec, self.passes)

    def transform_inputs(self) -> None:
        """Give the model the input transforms that its weights will expect once the passes have been applied."""
        for index in range(self.skeleton.spec.n_blocks):
            block, quantized = self.skeleton.block(index), self.schemes(index)
            for step in self.passes:
                if isinstance(step, TransformsInputs):
                    spec = self.skeleton.spec.block(index)
                    for linear, transform in step.input_transforms(spec, quantized).items():
                        path = self.skeleton.spec.module_name(linear)
                        transform_input(block.get_submodule(path), transform)

    def kinds(self) -> tuple[type[Statistic], ...]:
        """Union of the statistics that the passes read, in order of first mention."""
        return tuple(dict.fromkeys(kind for p in self.passes for kind in p.statistics))

    @torch.no_grad()
    def run(self, tokens: TokenBatches | None, progress: Progress) -> None:
        """Process every block that is not finished.

        Args:
            tokens: calibration samples; None where no pass needs data.
        """
        stream, n_blocks, done = stream_of(self.passes), self.skeleton.spec.n_blocks, self.finished()
        self.folder.mkdir(parents=True, exist_ok=True)
        states = model_states = None
        if stream != "none" and done < n_blocks:
            assert tokens is not None, "these passes need calibration samples"
            self.transform_inputs()
            states = self.enter(tokens, progress)
            model_states = states.copy() if "model" in references_of(self.passes) else None
            streams = 2 if model_states else 1
            progress.stage("replay", done * streams * len(states.batches)) if done else None
            for index in range(done):
                self._replay(index, states, stream == "quantized", progress)
                if model_states is not None:
                    self._replay(index, model_states, False, progress)
        linears = sum(len(self.schemes(i)) for i in range(done, n_blocks))
        batches = len(states.batches) if states else 0
        forwards = (n_blocks - done) * forwards_per_block(self.passes) - (stream == "quantized" and done < n_blocks)
        progress.stage("blocks", batches * forwards + linears)  # nothing follows the last block: it is not run again
        for index in range(done, n_blocks):
            self._block(index, states, model_states, stream, progress)

    @torch.no_grad()
    def observe(self, tokens: TokenBatches, progress: Progress) -> Iterator[tuple[Segment, HiddenStates]]:
        """Every block of the model as it is, loaded, with the states entering it; nothing is committed. The caller runs
        the states through the block, looking at what it wants, before it asks for the next one."""
        states = self.enter(tokens, progress)
        progress.stage("blocks", self.skeleton.spec.n_blocks * len(states.batches))
        for index in range(self.skeleton.spec.n_blocks):
            segment = self.load(index)
            yield segment, states
            release(segment.module)
            segment.masters.clear()  # the caller may still hold the segment while the next one is loaded
            return_freed()

    def enter(self, tokens: TokenBatches, progress: Progress) -> HiddenStates:
        """The hidden states that enter the first block: load what comes before it, run every batch, drop it again."""
        progress.stage("embed", 1)
        outside = self.outside
        names = self.skeleton.stem_names(outside.names)
        stem = {self.skeleton.spec.root_module_name(n): self._cast(outside.tensor(n)) for n in names}
        load_parameters(self.skeleton.model, stem)
        self.reader.close()
        states = HiddenStates.from_tokens(self.skeleton, tokens, self.batch_size)
        for name in stem:
            parent, _, leaf = name.rpartition(".")
            module = self.skeleton.model.get_submodule(parent)
            module._parameters[leaf] = torch.nn.Parameter(stem[name].to("meta"), requires_grad=False)
        progress.advance("embed")
        return states

    def outside_parameters(self) -> dict[str, torch.Tensor]:
        """Every parameter that is in no block, in the dtype of the forward pass, by its name in the model."""
        parameters = dict(self.skeleton.model.named_parameters(remove_duplicate=False))
        names = {self.skeleton.spec.root_module_name(name): name for name in self.outside.names}
        found = {t: self._cast(self.outside.tensor(name)) for t, name in names.items() if t in parameters}
        self.reader.close()
        return found

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.skeleton.device, self.skeleton.dtype)

    def _float_block(self, index: int, without: Container[str] = ()) -> dict[str, torch.Tensor]:
        """Stored tensors of one block but those in ``without``, block-relative names, in their stored dtypes."""
        prefix = self.skeleton.spec.prefix(index)
        names = [n[len(prefix) :] for n in self.reader.infos if n.startswith(prefix)]
        names = [n for n in names if n not in without]
        tensors = {n: self.reader.tensor(prefix + n) for n in names if self.skeleton.block_has(index, n)}
        self.reader.close()
        return tensors

    def _fill(self, index: int, tensors: Tensors) -> None:
        rename = self.skeleton.spec.module_name
        load_parameters(self.skeleton.block(index), {rename(n): t for n, t in tensors.items()})

    def _replay(self, index: int, states: HiddenStates, quantized: bool, progress: Progress) -> None:
        """Propagate through a finished block: the float one or the written one, as the first run did."""

        def advance(_: str) -> None:
            progress.advance(f"block {index}")

        if quantized:
            self._run_written(index, states, advance)
            return
        self._load_rebased(index)
        block = self.skeleton.block(index)
        states.run(block, index, keep=True, advance=advance)
        release(block)

    def _run_written(self, index: int, states: HiddenStates, advance: Callable[[str], None]) -> None:
        """Propagate through a committed block as a user's runtime does: with quantized inputs where schemes say so,
        and pruned where its passes want later blocks to see that."""
        transforms = self._fill_written(index)
        block, gates = self.skeleton.block(index), self.gates(index)
        with ExitStack() as stack:
            stack.enter_context(watching(block, [Watch.transforming(path, f) for path, f in transforms.items()]))
            for step in self.passes:
                if isinstance(step, Gates):
                    stack.enter_context(step.masked(block, self.skeleton.spec, index, gates))
            states.run(block, index, keep=True, advance=advance)
        release(block)

    def _fill_written(self, index: int) -> Transforms:
        """Fill the block from its committed file; returns what happens to inputs, by module path below the block."""
        prefix = self.skeleton.spec.prefix(index)
        with CheckpointReader.of_file(self.tensors_path(index)) as file:
            stored = {n: file.tensor(n) for n in file.infos}
        schemes = {name: entry["scheme"] for name, entry in self.committed(index).items()}
        restored = self.restore(stored, schemes, self.skeleton.dtype)
        tensors = {n[len(prefix) :]: t for n, t in restored.items()}
        tensors.update(self._float_block(index, without=tensors))
        self._fill(index, {n: self._cast(t) for n, t in tensors.items()})
        rename = self.skeleton.spec.module_name
        return {rename(n[len(prefix) :]): f for n, f in self.inputs(stored, schemes).items()}

    def load(self, index: int, with_module: bool = True) -> Segment:
        """One block with float masters; ``with_module`` also fills the module for forward passes."""
        spec, stored = self.skeleton.spec, self._float_block(index)
        for step in self.passes:
            if isinstance(step, AddsBiases):
                for linear in step.new_biases(self.skeleton.spec, index, stored):
                    w = stored[f"{linear}.weight"]
                    stored[f"{linear}.bias"] = w.new_zeros(w.shape[1 if self.skeleton.spec.conv1d else 0])
        masters = {n: t.to(self.skeleton.device, self.master_dtype) for n, t in stored.items()}
        if with_module:
            self._fill(index, {n: masters[n].to(self.skeleton.dtype) for n in masters})
        return Segment(
            index=index,
            prefix=spec.prefix(index),
            spec=spec.block(index),
            architecture=spec,
            module=self.skeleton.block(index),
            masters=masters,
            stored_dtypes={n: t.dtype for n, t in stored.items()},
            schemes=dict(self.schemes(index)),
            keep_originals=repairs(self.passes),
        )

    def _load_rebased(self, index: int, with_module: bool = True) -> Segment:
        """`load`, and the passes that change the basis: hidden states have the new one, the file's weights do not."""
        segment = self.load(index, with_module)
        for step in self.passes:
            if step.phases == (Phase.REBASE,):
                step.apply(segment, Context(segment, None, (), False, False, lambda _: None))
        if with_module:
            segment.sync()
        return segment

    def _references(
        self,
        segment: Segment,
        states: HiddenStates | None,
        model_states: HiddenStates | None,
        advance: Callable[[str], None],
    ) -> dict[Reference, list[torch.Tensor]]:
        """Outputs of the float block, before any pass; those of the float model replace ``model_states``."""
        found: dict[Reference, list[torch.Tensor]] = {}
        for kind in references_of(self.passes):
            source = model_states if kind == "model" else states.copy() if states else None
            assert source is not None, "a pass that trains needs calibration samples"
            source.run(segment.module, segment.index, keep=True, advance=advance)
            found[kind] = source.batches
        return found

    def _block(
        self,
        index: int,
        states: HiddenStates | None,
        model_states: HiddenStates | None,
        stream: str,
        progress: Progress,
    ) -> None:
        segment = self._load_rebased(index, with_module=states is not None)
        where = f"block {index + 1}/{self.skeleton.spec.n_blocks}"

        def advance(detail: str) -> None:
            progress.advance(f"{where} {detail}")

        last = index == self.skeleton.spec.n_blocks - 1
        context = Context(
            segment,
            states,
            self.kinds() if states is not None else (),
            propagate=stream == "either" and not last,
            allow_unseen=self.allow_unseen,
            advance=advance,
            references=self._references(segment, states, model_states, advance),
            show=lambda detail: progress.advance(f"{where} {detail}", units=0),
        )
        for step in self.passes:
            if step.phases != (Phase.REBASE,):
                step.apply(segment, context)
        self._commit(segment, context.forwards)
        module = segment.module
        del context, segment  # masters and statistics go before the next forward pass
        release(module)
        if states is not None and stream == "quantized" and not last:
            self._run_written(index, states, advance)
        return_freed()

    def _commit(self, segment: Segment, forwards: int) -> None:
        record = {
            "forwards": forwards,
            "linears": {
                name: {
                    "scheme": str(scheme),
                    "errors": segment.errors[name],
                    "notes": segment.notes.get(name, {}),
                }
                for name, scheme in segment.schemes.items()
            },
        }
        tensors = self.encode(segment)
        if segment.gates:
            save_tensors(self.gates_path(segment.index), segment.gates)
        write_atomically(self.record_path(segment.index), (json.dumps(record, sort_keys=True) + "\n").encode())
        save_tensors(self.tensors_path(segment.index), tensors)
