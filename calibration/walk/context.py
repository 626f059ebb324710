"""`Context`: the data of one segment, by asking. The number of forward passes is visible in what a pass asks for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch

from calibration.architectures.spec import SharedInput
from calibration.distributed import Processes
from calibration.errors import ToolkitError
from calibration.memory import return_freed
from calibration.model.watching import Watch, Watches, watching
from calibration.nested import moved
from calibration.walk.capture import Call, Inputs, accumulate, record_calls, record_inputs
from calibration.walk.lanes import sum_of_lanes
from calibration.walk.segment import Segment
from calibration.walk.states import HiddenStates, Reference
from calibration.walk.statistics import Gram, Statistic, TwoStreams
from calibration.walk.token_weights import TokenWeights, stream_writers, weights_by_norm

S = TypeVar("S", bound=Statistic)
A = TypeVar("A")
K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class Context:
    """Statistics of one segment on the calibration inputs.

    Linears that share an input share their accumulators. The first request gathers ``kinds`` for every input of the
    block in one forward pass; exact edits keep them valid (`rescale`), any other edit makes them stale, and passes
    that want fresh ones say so with `refresh`.

    Args:
        segment: the block.
        states: hidden states entering it, None where no pass needs data.
        kinds: what all passes of the run will ask for.
        propagate: also replace the states by the block's outputs while gathering: on a float stream one forward does
            both, because nothing edited the block yet.
        allow_unseen: an expert without calibration tokens gets a zero Gram instead of an error.
        references: outputs of the float block, a tensor per batch, of every kind that a pass trains towards.
        advance: called after every batch and every rounded linear with what was done, for the progress display.
        show: called with what is at work and does not count: the searches before rounding.
        token_weights: what tokens count in statistics.
        float_states: hidden states of the float model entering the block, where a kind watches two streams.
        processes: that share the calibration batches; every one of them asks for the same.
    """

    def __init__(
        self,
        segment: Segment,
        states: HiddenStates | None,
        kinds: Sequence[type[Statistic]],
        propagate: bool,
        allow_unseen: bool,
        advance: Callable[[str], None],
        references: Mapping[Reference, Sequence[torch.Tensor]] | None = None,
        show: Callable[[str], None] = lambda _: None,
        token_weights: TokenWeights = "norm",
        float_states: HiddenStates | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.segment = segment
        self.forwards = 0
        self.advance, self.show = advance, show
        self._states = states
        self._kinds = tuple(kinds)
        self._propagate = propagate
        self._allow_unseen = allow_unseen
        self._references = references or {}
        self._weigh = weights_by_norm if token_weights == "norm" else None
        self._float_states = float_states
        self._processes = processes or Processes()
        self._float_outputs: list[torch.Tensor] = []
        self._store: dict[tuple[SharedInput, type[Any]], Statistic] = {}
        self._products: dict[SharedInput, torch.Tensor] = {}
        self._product_dtype = next(segment.module.parameters()).dtype

    def statistic(self, linear: str, kind: type[S]) -> S:
        """The accumulator of the input of ``linear``, gathered before the first edit that was not exact."""
        shared = self.segment.spec.shared_input(linear)
        if (shared, kind) not in self._store:
            assert kind in self._kinds, f"a pass asks for {kind.__name__} without declaring it"
            self._gather(self.segment.spec.inputs, self._kinds)
        found = self._store[shared, kind]
        assert isinstance(found, kind)
        return found

    def gather(self) -> None:
        """Gather now what passes of this run will ask for, where that has not been done: a pass that changes the block
        without asking for anything calls this first."""
        if self._kinds and not self._store:
            self._gather(self.segment.spec.inputs, self._kinds)

    def has(self, kind: type[Statistic]) -> bool:
        """Whether passes of this run gather ``kind``."""
        return kind in self._kinds

    def product_gram(self, linear: str) -> torch.Tensor:
        """The Gram matrix ``[in, in]`` in the dtype in which products are fast: that of the forward pass where it is
        bfloat16, else as gathered. Made once per input, for searches that multiply by it many times."""
        gram = self.statistic(linear, Gram)
        if self._product_dtype != torch.bfloat16:
            return gram.matrix
        shared = self.segment.spec.shared_input(linear)
        if shared not in self._products:
            self._products = {shared: gram.matrix.to(torch.bfloat16)}  # one at a time: a Gram matrix may be large
        return self._products[shared]

    def refresh(self, stage: int | None, *kinds: type[Statistic]) -> None:
        """Gather ``kinds`` again for the inputs of one stage, or of all (None), with the block as it now is (one
        forward pass)."""
        self._gather(tuple(s for s in self.segment.spec.inputs if stage in (None, s.stage)), kinds)

    def calls(self, paths: Iterable[str], batches: int) -> dict[str, list[Call]]:
        """Arguments of the calls of some submodules of the block, as it now is, in the first batches (part of one
        forward pass). Only for passes of the quantized stream: a float stream may have left the block already."""
        assert self._states is not None and not self._propagate, "this stream does not keep the inputs of the block"
        self.segment.sync()
        with record_calls(self.segment.module, paths) as calls:
            self._states.run(self.segment.module, self.segment.index, False, self.advance, batches)
        self.forwards += 1
        return calls

    def watch(self, watches: Iterable[Watch], batches: int) -> None:
        """The block as it now is on the first batches of this process, with functions that look at what flows between
        its submodules and may replace it. Only for passes of the quantized stream. Refused where the first process has
        fewer of the first batches."""
        assert self._states is not None and not self._propagate, "this stream does not keep the inputs of the block"
        if self._processes.size > 1 and batches > len(self._states.lanes[0]):
            raise ToolkitError(
                f"{self.segment.prefix[:-1]}: {batches} batches are searched, {len(self._states.lanes[0])} are here",
                "use more --samples, or run the command without torchrun or accelerate launch",
            )
        self.segment.sync()
        with watching(self.segment.module, watches):
            self._states.run(self.segment.module, self.segment.index, False, self.show, batches)
        self.forwards += 1

    def sums(
        self,
        accumulators: Callable[[], dict[K, A]],
        watches: Callable[[Mapping[K, A]], Watches],
        *kinds: type[Statistic],
    ) -> dict[K, A]:
        """One forward pass of the block as it now is, whose ``watches`` fold what they see into some ``accumulators``
        (of kinds that `calibration.walk.lanes.merge` knows). Statistics of these ``kinds`` are gathered again in the
        same pass, for all inputs. Only for passes of the quantized stream."""
        assert not self._propagate, "this stream does not keep the inputs of the block"
        return self._gather(self.segment.spec.inputs if kinds else (), kinds, accumulators, watches)

    def by_the_first(self, work: Callable[[], T]) -> T:
        """What the first process finds, which has the first batches; the others wait for it."""
        return cast(T, self._processes.agree(work() if self._processes.first else None))

    @property
    def batches(self) -> range:
        """Numbers of the calibration batches, for `output` and `reference`."""
        assert self._states is not None, "this run has no calibration samples"
        return range(len(self._states.batches))

    def reference(self, kind: Reference, batch: int) -> torch.Tensor:
        """The float block's output on one batch, ``[batch, seq_len, hidden]``, as it was before the first edit."""
        return self._references[kind][batch]

    @property
    def windows(self) -> int:
        """Calibration windows in all batches."""
        assert self._states is not None, "this run has no calibration samples"
        return sum(batch.shape[0] for batch in self._states.batches)

    def output(self, batch: int, parameters: Mapping[str, torch.Tensor], row: int | None = None) -> torch.Tensor:
        """The block as it now is on one batch of the quantized stream, or on one window of it, ``[windows, seq_len,
        hidden]``, with these block-relative parameters, as the file stores them, in place of its own; differentiable
        in them. A whole batch counts as progress."""
        assert self._states is not None and not self._propagate, "this stream does not keep the inputs of the block"
        segment = self.segment
        segment.sync()
        rename = segment.architecture.module_name
        cast = {rename(name): tensor.to(self._product_dtype) for name, tensor in parameters.items()}
        result = self._states.output(segment.module, segment.index, batch, cast, row)
        if row is None:
            self.advance("train")
        return result

    @property
    def workers(self) -> int:
        """How many processes `spread` has."""
        return self._processes.size

    def spread(self, costs: Sequence[float], work: Callable[[int], T]) -> Iterator[T]:
        """The results of independent tasks, in order, each carried out by one of the processes; see
        `Processes.spread`. What ``work`` reads of statistics must have been gathered before."""
        results = self._processes.spread(costs, work)
        if self._processes.size == 1:
            return results
        device = next(iter(self.segment.masters.values())).device
        return (moved(result, device) for result in results)

    def rescale(self, linears: Sequence[str], s: torch.Tensor) -> None:
        """Follow an exact balance: the inputs of ``linears`` are now divided by ``s [in]``."""
        shared = {self.segment.spec.shared_input(name) for name in linears}
        for (key, _), statistic in self._store.items():
            if key in shared:
                statistic.rescale(s)
        self._products.clear()

    def forget(self, linears: Sequence[str]) -> None:
        """The inputs of ``linears`` changed in a way that no statistic follows; the next request gathers again."""
        shared = {s for s in self.segment.spec.inputs if not set(linears).isdisjoint(s.linears)}
        self._store = {key: found for key, found in self._store.items() if key[0] not in shared}
        self._products.clear()

    def _gather(
        self,
        inputs: Sequence[SharedInput],
        kinds: Sequence[type[Statistic]],
        beside: Callable[[], dict[K, A]] = dict,
        watches: Callable[[Mapping[K, A]], Watches] = lambda _: (),
    ) -> dict[K, A]:
        """Statistics of some inputs, and accumulators ``beside`` them that ``watches`` fill, which are returned."""
        segment, states = self.segment, self._states
        if self._propagate:
            assert segment.edits == 0 and self.forwards == 0, "a float stream is collected once, before any edit"
        assert states is not None, "this run has no calibration samples"
        segment.sync()
        device = next(iter(segment.masters.values())).device
        widths = {shared: segment.weight(shared.linears[0]).shape[1] for shared in inputs}
        own = [(shared, kind) for shared in inputs for kind in kinds]

        def accumulators() -> dict[Any, Any]:
            return {**{(shared, kind): kind(widths[shared], device) for shared, kind in own}, **beside()}

        def run(lane: range, fresh: Mapping[Any, Any]) -> None:
            hooks = {
                segment.architecture.module_name(shared.linears[0]): [fresh[shared, kind] for kind in kinds]
                for shared in inputs
            }
            if any(issubclass(kind, TwoStreams) for kind in kinds):
                self._run_pairs(states, hooks, lane)
                return
            others = {key: found for key, found in fresh.items() if key not in own}
            with (
                watching(segment.module, watches(others)),
                accumulate(segment.module, hooks, self._weigh, writes=stream_writers(segment)),
            ):
                states.run(segment.module, segment.index, self._propagate, self.advance, lane=lane)

        fresh = sum_of_lanes(states.lanes, self._processes, accumulators, run)
        self.forwards += 2 if any(issubclass(kind, TwoStreams) for kind in kinds) else 1
        gathered = {key: fresh.pop(key) for key in own}
        self._store.update(gathered)
        self._products.clear()
        return_freed()  # activations of the forward passes lie between the sums
        for (shared, _), statistic in gathered.items():
            if self._weigh is not None and isinstance(statistic, Gram):
                statistic.shrink()
            if not statistic.finite():
                raise ToolkitError(
                    f"{segment.full_name(shared.linears[0])}: NaN or Inf among its inputs",
                    "the model overflows on this text: try --dtype float32, or check the checkpoint",
                )
        self._check_seen(inputs, kinds)
        return fresh

    def _run_pairs(self, states: HiddenStates, hooks: Mapping[str, Sequence[Statistic]], lane: range) -> None:
        """Batch after batch through the float block, as the float model has it, and through the block as it now is."""
        assert not self._propagate, "a float stream has no second one"
        original = self._float_parameters()
        for batch in lane:
            other = self._float_inputs(batch, hooks, original)
            with accumulate(self.segment.module, hooks, self._weigh, other, stream_writers(self.segment)):
                states.output(self.segment.module, self.segment.index, batch)
            self.advance("forward")

    def _float_parameters(self) -> dict[str, torch.Tensor]:
        """Parameters of the block that passes have moved, as they were, by their names in the block's class."""
        rename = self.segment.architecture.module_name
        return {rename(name): tensor.to(self._product_dtype) for name, tensor in self.segment.originals.items()}

    def _float_inputs(self, batch: int, paths: Iterable[str], parameters: Mapping[str, torch.Tensor]) -> Inputs:
        """What submodules see in the float model on one batch; the first time the block's output is kept."""
        assert self._float_states is not None, "this run carries no float stream"
        segment = self.segment
        with record_inputs(segment.module, paths) as inputs:
            output = self._float_states.output(segment.module, segment.index, batch, parameters)
        if len(self._float_outputs) == batch:
            self._float_outputs.append(output)
        self.advance("forward")
        return inputs

    def float_outputs(self) -> list[torch.Tensor]:
        """The float block's output on the float model's states, ``[batch, seq_len, hidden]`` for every batch: those of
        the first gathering, or made now where no pass gathered anything."""
        if not self._float_outputs:
            original = self._float_parameters()
            for batch in self.batches:
                self._float_inputs(batch, (), original)
            self.forwards += 1
        return self._float_outputs

    def _check_seen(self, inputs: Sequence[SharedInput], kinds: Sequence[type[Statistic]]) -> None:
        unseen = [s for s in inputs if any(self._store[s, kind].tokens == 0 for kind in kinds)]
        if unseen and not self._allow_unseen:
            names = ", ".join(self.segment.full_name(s.linears[0]) for s in unseen[:4])
            raise ToolkitError(
                f"{names}{' ...' if len(unseen) > 4 else ''}: {len(unseen)} inputs saw no calibration tokens",
                "use more --samples, or --unseen-experts rtn to round these experts without data",
            )
