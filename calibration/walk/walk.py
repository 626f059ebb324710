"""The streaming loop: load a block, apply the passes, commit it to a file, propagate through what was written.

Memory is one block, the hidden states and the statistics of one block; nothing grows with depth. The committed files
are the only truth: ``--resume`` replays finished blocks to get the hidden states back, and goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from calibration.distributed import Processes
from calibration.memory import large_apart, return_freed
from calibration.model.skeleton import release
from calibration.model.watching import Watch, watching
from calibration.progress import Progress
from calibration.text.crops import TokenBatches
from calibration.walk.context import Context
from calibration.walk.finished import Committing, FinishedBlocks
from calibration.walk.float_blocks import FloatBlocks, Tensors
from calibration.walk.passes import Phase, references_of, stream_of, units_per_block, watches_float
from calibration.walk.segment import Segment
from calibration.walk.states import HiddenStates, Reference
from calibration.walk.statistics import Statistic
from calibration.walk.token_weights import TokenWeights

Transforms = Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
"""What happens to the inputs of linears, by name."""


def no_transforms(tensors: Tensors, schemes: Mapping[str, str]) -> Transforms:
    """Inputs of linears stay as they are."""
    return {}


@dataclass(frozen=True)
class Walk:
    """Everything that stays the same from block to block.

    Attributes:
        blocks: where float blocks come from, with the passes to apply.
        encode: a finished segment -> the tensors of its file, full checkpoint names.
        restore: the tensors of a file and the texts of its linears' schemes (passes may have changed those) -> float
            weights, in the dtype given; all by full checkpoint names. What it leaves out is as in the checkpoint.
        folder: where finished blocks go.
        allow_unseen: experts without calibration tokens are rounded without data instead of stopping the run.
        inputs: as ``restore``, to what a user's runtime does to the inputs of linears.
        token_weights: what tokens count in statistics.
        processes: that share the calibration batches. All read ``folder``; the first one writes there.
    """

    blocks: FloatBlocks
    encode: Callable[[Segment], dict[str, torch.Tensor]]
    restore: Callable[[Tensors, Mapping[str, str], torch.dtype], dict[str, torch.Tensor]]
    folder: Path
    allow_unseen: bool = False
    inputs: Callable[[Tensors, Mapping[str, str]], Transforms] = no_transforms
    token_weights: TokenWeights = "norm"
    processes: Processes = field(default_factory=Processes)

    @property
    def finished(self) -> FinishedBlocks:
        return FinishedBlocks(self.folder, self.blocks.skeleton.spec)

    def kinds(self) -> tuple[type[Statistic], ...]:
        """Union of the statistics that the passes read, in order of first mention."""
        return tuple(dict.fromkeys(kind for p in self.blocks.passes for kind in p.statistics))

    @torch.no_grad()
    def run(self, tokens: TokenBatches | None, progress: Progress, stop: int | None = None) -> None:
        """Process every block that is not finished.

        Args:
            tokens: calibration samples; None where no pass needs data.
            stop: the block to stop in front of; None: at the end.
        """
        passes, n_blocks = self.blocks.passes, len(self.blocks)
        done = self.processes.agree(self.finished.count() if self.processes.first else None)
        stream = stream_of(passes)
        self.folder.mkdir(parents=True, exist_ok=True)
        states = model_states = None
        if stream != "none" and done < n_blocks:
            assert tokens is not None, "these passes need calibration samples"
            self.blocks.transform_inputs()
            states = self.blocks.enter(tokens, progress, self.processes)
            model_states = states.copy() if "model" in references_of(passes) or watches_float(passes) else None
            streams = 2 if model_states else 1
            progress.stage("replay", done * streams * len(states.batches)) if done else None
            for index in range(done):
                self._replay(index, states, stream == "quantized", progress)
                if model_states is not None:
                    self._replay(index, model_states, False, progress)
        end = n_blocks if stop is None else min(stop, n_blocks)
        linears = sum(len(self.blocks.schemes(i)) for i in range(done, end))
        batches = len(states.batches) if states else 0
        units = (end - done) * units_per_block(passes) - (stream == "quantized" and done < end == n_blocks)
        progress.stage("blocks", batches * units + linears)  # nothing follows the last block: it is not run again
        steady = states is not None and not any(p.references or p.learned_bytes for p in passes)
        with large_apart() if steady else nullcontext(), Committing() as committing:  # training frees all the time
            for index in range(done, end):
                self._block(index, states, model_states, stream, progress, committing)

    def _replay(self, index: int, states: HiddenStates, quantized: bool, progress: Progress) -> None:
        """Propagate through a finished block: the float one or the written one, as the first run did."""

        def advance(_: str) -> None:
            progress.advance(f"block {index}")

        if quantized:
            self._run_written(index, states, advance)
            return
        self.blocks.load_transformed(index)
        block = self.blocks.skeleton.block(index)
        states.run(block, index, keep=True, advance=advance)
        release(block)

    def _run_written(self, index: int, states: HiddenStates, advance: Callable[[str], None]) -> None:
        """Propagate through a committed block as a user's runtime does: with quantized inputs where schemes say so,
        and pruned where its passes want later blocks to see that."""
        transforms = self._fill_written(index)
        block, gates = self.blocks.skeleton.block(index), self.finished.gates(index)
        with ExitStack() as stack:
            stack.enter_context(watching(block, [Watch.transforming(path, f) for path, f in transforms.items()]))
            for step in self.blocks.passes:
                stack.enter_context(step.masked(block, self.blocks.skeleton.spec, index, gates))
            states.run(block, index, keep=True, advance=advance)
        release(block)

    def _fill_written(self, index: int) -> Transforms:
        """Fill the block from its committed file; returns what happens to inputs, by module path below the block."""
        prefix = self.blocks.skeleton.spec.prefix(index)
        stored = self.finished.tensors(index)
        schemes = {name: entry["scheme"] for name, entry in self.finished.linears(index).items()}
        restored = self.restore(stored, schemes, self.blocks.skeleton.dtype)
        tensors = {n[len(prefix) :]: t for n, t in restored.items()}
        tensors.update(self.blocks.stored(index, without=tensors))
        self.blocks.fill(index, {n: self.blocks.cast(t) for n, t in tensors.items()})
        rename = self.blocks.skeleton.spec.module_name
        return {rename(n[len(prefix) :]): f for n, f in self.inputs(stored, schemes).items()}

    def _references(
        self,
        segment: Segment,
        states: HiddenStates | None,
        model_states: HiddenStates | None,
        advance: Callable[[str], None],
    ) -> dict[Reference, list[torch.Tensor]]:
        """Outputs of the float block, before any pass; those of the float model replace ``model_states``."""
        found: dict[Reference, list[torch.Tensor]] = {}
        for kind in references_of(self.blocks.passes):
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
        committing: Committing,
    ) -> None:
        segment = self.blocks.load_transformed(index, with_module=states is not None)
        where = f"block {index + 1}/{len(self.blocks)}"

        def advance(detail: str) -> None:
            progress.advance(f"{where} {detail}")

        last = index == len(self.blocks) - 1
        float_states = model_states.copy() if model_states and watches_float(self.blocks.passes) else None
        context = Context(
            segment,
            states,
            self.kinds() if states is not None else (),
            propagate=stream == "either" and not last,
            allow_unseen=self.allow_unseen,
            advance=advance,
            references=self._references(segment, states, model_states, advance),
            show=lambda detail: progress.advance(f"{where} {detail}", units=0),
            token_weights=self.token_weights,
            float_states=float_states,
            processes=self.processes,
        )
        for step in self.blocks.passes:
            if step.phases != (Phase.TRANSFORM,):
                step.apply(segment, context)
                return_freed()  # what it tried lies between what it left
        referred = "model" in references_of(self.blocks.passes)  # and so propagated already
        if model_states is not None and float_states is not None and not referred and not last:
            model_states.batches = context.float_outputs()
        if self.processes.first:
            committing.begin(self.finished.commit(segment, self.encode(segment), context.forwards))
        module = segment.module
        del context, segment, float_states  # masters and statistics go before the next forward pass
        release(module)
        if states is not None and stream == "quantized" and not last:
            committing.wait()
            self.processes.barrier()
            self._run_written(index, states, advance)
        return_freed()
