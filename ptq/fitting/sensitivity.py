"""How much every linear suffers from every scheme, and what that does to the model: one walk over the float blocks.

The layer's part is ||(Q(W) - W) X^T||^2 on its Gram matrix. What the model makes of it is measured by a probe: a
linear is rounded alone, a few windows go on through the float blocks behind it, and the Kullback-Leibler divergence of
the logits is divided by the layer's error. Divergence is quadratic in small errors, so that ratio holds for the other
schemes; one more probe with everything rounded tells how far the parts add up.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from calibration.architectures import ArchitectureSpec
from calibration.memory import return_freed
from calibration.model.skeleton import Skeleton, load_parameters, release
from calibration.progress import Progress
from calibration.text.crops import TokenBatches
from calibration.walk.context import Context
from calibration.walk.float_blocks import FloatBlocks
from calibration.walk.segment import Segment
from calibration.walk.states import HiddenStates
from calibration.walk.statistics import Gram
from ptq.numerics.feedback import column_costs, feedback_error
from ptq.numerics.grids import fake_quantize
from ptq.numerics.objective import output_energy
from ptq.scheme import QuantScheme

EVERYTHING = ""
"""The name of the probe in which every linear is rounded."""


@dataclass
class Sensitivities:
    """By full linear name.

    Attributes:
        errors: linear -> {scheme: ||(Q(W) - W) X^T||^2 per token, as the rounding pass is expected to leave it}.
        probed: linear -> the same of the probe, which rounds to nearest.
        weights: linear -> nats of divergence per unit of error, from the probe.
        additivity: divergence with everything rounded, over the sum of the divergences of single linears.
        nll_per_kl: increase of the loss on the probed text over the divergence, with everything rounded.
    """

    errors: dict[str, dict[QuantScheme, float]] = field(default_factory=dict)
    probed: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    additivity: float = 1.0
    nll_per_kl: float = 1.0

    def total(self, schemes: Mapping[str, QuantScheme]) -> float:
        """Expected divergence in nats of linears with these schemes."""
        return self.additivity * sum(self.weights[n] * self.errors[n][scheme] for n, scheme in schemes.items())


@dataclass(frozen=True)
class Sweep:
    """What is measured.

    Attributes:
        options: the schemes on offer for every linear, by full name.
        probe: the scheme that the probe rounds a linear with, one of its options.
        feedback: expect GPTQ's error of every scheme instead of that of rounding to nearest.
        windows: calibration windows that the probe runs.
    """

    options: Mapping[str, Sequence[QuantScheme]]
    probe: Mapping[str, QuantScheme]
    feedback: bool
    windows: int = 4

    def run(self, blocks: FloatBlocks, tokens: TokenBatches, progress: Progress) -> Sensitivities:
        """Walk over the float blocks once."""
        found = Sensitivities()
        states = blocks.enter(tokens, progress)
        few = TokenBatches(tokens.input_ids[: self.windows], {})
        streams = Streams(blocks.enter(few, progress))
        n_blocks = blocks.skeleton.spec.n_blocks
        progress.stage("sensitivities", n_blocks * len(states.batches) + self._probing(streams, blocks.skeleton.spec))
        for index in range(n_blocks):
            segment = blocks.load(index)
            where = f"block {index + 1}/{n_blocks}"

            def advance(detail: str, where: str = where) -> None:
                progress.advance(f"{where} {detail}")

            last = index == n_blocks - 1
            context = Context(segment, states, (Gram,), propagate=not last, allow_unseen=True, advance=advance)
            probes = self._block(segment, context, found)
            streams.run_block(segment, probes, advance)
            del context
            release(segment.module)
            return_freed()
        self._weigh(found, streams.divergences(blocks.skeleton, blocks.outside_parameters(), few, progress.advance))
        return found

    def _probing(self, streams: Streams, spec: ArchitectureSpec) -> int:
        """Units of work beside the one walk: linears to round, then for every probe and batch of windows each block
        from its own on, and the head. The first grow with the square of the depth, the last with the vocabulary."""
        probes = [sum(name.startswith(spec.prefix(index)) for name in self.options) for index in range(spec.n_blocks)]
        through = sum(count + 2 for count in itertools.accumulate(probes))  # and those of nothing and of all rounded
        return len(self.options) + streams.batches * (through + len(self.options) + 2)

    def _block(self, segment: Segment, context: Context, found: Sensitivities) -> dict[str, torch.Tensor]:
        """Fill in the errors of the block's linears; returns the weights that the probe runs instead."""
        probes: dict[str, torch.Tensor] = {}
        for shared in segment.spec.inputs:
            names = [name for name in shared.linears if segment.full_name(name) in self.options]
            if not names:
                continue
            gram = context.statistic(names[0], Gram)
            costs = column_costs(gram.matrix) if self.feedback and gram.tokens else None
            for name in names:
                full, w = segment.full_name(name), segment.weight(name)
                product, tokens = context.product_gram(name), max(1, gram.tokens)
                errors = found.errors[full] = {}
                for scheme in self.options[full]:
                    rounded = fake_quantize(w, scheme.weights)
                    if costs is None or scheme == self.probe[full]:
                        plain = errors[scheme] = float(output_energy(rounded - w, product)) / tokens
                    if scheme == self.probe[full]:
                        probes[name], found.probed[full] = rounded, plain
                    if costs is not None:
                        errors[scheme] = float(feedback_error(w, rounded, costs)) / tokens
                context.advance(name)
        return probes

    def _weigh(self, found: Sensitivities, divergences: Mapping[str, tuple[float, float]]) -> None:
        total, nll = divergences[EVERYTHING]
        for linear, error in found.probed.items():
            found.weights[linear] = divergences[linear][0] / error if error > 0 else 0.0
        parts = sum(kl for linear, (kl, _) in divergences.items() if linear != EVERYTHING)
        found.additivity = total / parts if parts > 0 else 1.0
        found.nll_per_kl = nll / total if total > 0 else 1.0


class Streams:
    """The hidden states of the float model and of one model per probe: each differs from it in one linear."""

    def __init__(self, states: HiddenStates) -> None:
        self._float = states
        self._probed: dict[str, HiddenStates] = {EVERYTHING: states.copy()}

    @property
    def batches(self) -> int:
        """Of windows, in every stream."""
        return len(self._float.batches)

    def run_block(
        self, segment: Segment, probes: Mapping[str, torch.Tensor], advance: Callable[[str], None] = lambda _: None
    ) -> None:
        """Through one block, with a new stream for every linear among ``probes``; each batch of each stream is told."""

        def run(states: HiddenStates) -> None:
            states.run(segment.module, segment.index, keep=True, advance=lambda _: advance("probes"))

        started = {name: self._float.copy() for name in probes}
        for name, states in self._probed.items():
            if name != EVERYTHING:
                run(states)
        with _replaced(segment, probes):
            run(self._probed[EVERYTHING])
        for name, states in started.items():
            with _replaced(segment, {name: probes[name]}):
                run(states)
            self._probed[segment.full_name(name)] = states
        run(self._float)

    def divergences(
        self,
        skeleton: Skeleton,
        outside: Mapping[str, torch.Tensor],
        tokens: TokenBatches,
        advance: Callable[[str], None] = lambda _: None,
    ) -> dict[str, tuple[float, float]]:
        """Mean KL(float || probe) in nats, and the increase of the mean loss on the text, by probe; every probe and
        batch is told."""
        found = {name: [0.0, 0.0] for name in self._probed}
        size = self._float.batches[0].shape[0]
        count = 0
        with _head(skeleton, outside) as logits:
            for i, ids in enumerate(tokens.batches(size)):
                targets = ids[:, 1:].reshape(-1, 1)
                log_p = logits(ids, self._float.batches[i])
                advance("head, float")
                p, count = log_p.exp(), count + len(targets)
                for name, states in self._probed.items():
                    difference = log_p - logits(ids, states.batches[i])
                    advance(f"head, {name or 'all linears rounded'}")
                    found[name][0] += float((p * difference).sum())
                    found[name][1] += float(difference.gather(1, targets.to(difference.device)).sum())
        return {name: (max(kl / count, 0.0), nll / count) for name, (kl, nll) in found.items()}


@contextmanager
def _replaced(segment: Segment, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Other weights ``[out, in]`` in the module for a while."""
    kept = []
    for name, w in weights.items():
        parameter = segment.module.get_parameter(segment.architecture.module_name(f"{name}.weight"))
        kept.append((parameter, parameter.data))
        parameter.data = (w.T if segment.architecture.conv1d else w).to(parameter.dtype)
    try:
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


@contextmanager
def _head(
    skeleton: Skeleton, outside: Mapping[str, torch.Tensor]
) -> Iterator[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """The model behind its blocks: ids ``[B, L]`` and hidden states to float32 log-probabilities ``[B (L-1), V]``.

    The model itself runs, with blocks that return the hidden states, so that its final norm, projections and soft caps
    come along without being named. ``outside`` are the parameters that no block holds.
    """
    load_parameters(skeleton.model, outside)
    skeleton.model.tie_weights()
    blocks = skeleton.model.get_submodule(skeleton.spec.blocks)
    entering: list[torch.Tensor] = []

    def inject(*args: object, **kwargs: object) -> object:
        return (entering[0],) if skeleton.spec.tuple_output else entering[0]

    def run(ids: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        entering[:] = [states]
        logits: torch.Tensor = skeleton.model(ids.to(skeleton.device), use_cache=False).logits
        return logits[:, :-1].flatten(0, 1).float().log_softmax(-1)

    for block in blocks:
        block.forward = inject
    try:
        yield run
    finally:
        for block in blocks:
            del block.forward
