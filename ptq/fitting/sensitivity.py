"""What every scheme of every linear costs the model: forward through the float blocks, and once in reverse.

Let D = sum over the tokens of a window of g_t x_t^T be the gradient of a linear's weight, where the loss is that of
labels drawn from the model's own predictions. To second order the Kullback-Leibler divergence that a change dW of the
weight brings to the window is 1/2 E[<dW, D>^2] (the Fisher matrix). Errors of different outputs are taken to be
uncorrelated, and the rows of D to have one second moment but for a factor:

    KL ~ 1/2 sum_r s_r dW_r M dW_r^T        M = sum of D^T D [in, in], s_r = the share of row r in sum of D^2

per position, sums over windows. Tokens stay together: what attention averages over many tokens does not average out.
(A diagonal over outputs beside a matrix over inputs: Shampoo's form of the Fisher matrix, Gupta et al. 2018, arXiv
1802.09568; measured beside others in docs/results.md.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from calibration.memory import return_freed
from calibration.model.skeleton import release
from calibration.progress import Progress
from calibration.text.crops import TokenBatches
from calibration.walk.backward import WeightGradients, block_backward, head_gradient
from calibration.walk.capture import Watcher, accumulate
from calibration.walk.float_blocks import FloatBlocks
from calibration.walk.head import head, pieces
from calibration.walk.kept_states import KeptStates
from calibration.walk.segment import Segment
from calibration.walk.states import HiddenStates
from calibration.walk.statistics import Gram
from calibration.walk.token_weights import stream_writers, weights_by_norm
from ptq.fitting.probes import Divergence, Probes
from ptq.fitting.together import Point, Together
from ptq.fitting.work import AtHead, InBlock, Work
from ptq.numerics.feedback import column_costs, feedback_errors
from ptq.numerics.grids import fake_quantize
from ptq.numerics.objective import output_energies, output_energy
from ptq.scheme import QuantScheme

CHECKED = 6
"""Linears that are also rounded alone and run through the head."""


@dataclass(frozen=True)
class Check:
    """One linear rounded to nearest alone: the divergence that was expected, and the one measured, nats per token."""

    linear: str
    scheme: QuantScheme
    expected: float
    measured: float


@dataclass
class Sensitivities:
    """By full linear name.

    Attributes:
        losses: linear -> {scheme: expected divergence in nats per token with this linear alone rounded, as the rounding
            pass is expected to leave it}.
        nearest: linear -> {scheme: the same of rounding to nearest}, of those that probes have at least.
        objectives: linear -> {scheme: ||(Q(W) - W) X^T||^2 per token of rounding to nearest}, of the same;
            X with tokens weighed as in calibration.
        whole: by name of a probe, everything in it rounded.
        together: how losses add up.
        checks: expected beside measured.
    """

    losses: dict[str, dict[QuantScheme, float]] = field(default_factory=dict)
    nearest: dict[str, dict[QuantScheme, float]] = field(default_factory=dict)
    objectives: dict[str, dict[QuantScheme, float]] = field(default_factory=dict)
    whole: dict[str, Point] = field(default_factory=dict)
    together: Together = field(default_factory=lambda: Together(()))
    checks: tuple[Check, ...] = ()

    def parts(self, schemes: Mapping[str, QuantScheme]) -> float:
        """The sum of the losses of linears with these schemes."""
        return sum(self.losses[n][scheme] for n, scheme in schemes.items())


@dataclass(frozen=True)
class Sweep:
    """What is measured.

    Attributes:
        options: the schemes on offer for every linear, by full name.
        probes: by name, the linears that are rounded to nearest together, with one of their options each.
        feedback: expect GPTQ's error of every scheme instead of that of rounding to nearest.
        windows: calibration windows that gradients see.
        probed: of these, windows that probes see.
        seed: of the labels.
    """

    options: Mapping[str, Sequence[QuantScheme]]
    probes: Mapping[str, Mapping[str, QuantScheme]]
    feedback: bool
    windows: int
    probed: int = 4
    seed: int = 0

    def alone(self) -> dict[str, Mapping[str, QuantScheme]]:
        """The linears that are checked, spread over the model, its roles and the probes: name of the linear -> its
        scheme."""
        found: dict[str, Mapping[str, QuantScheme]] = {}
        probes, names = list(self.probes.values()), list(self.options)
        count = min(CHECKED, len(names))
        for i in range(count):
            # further on in every next share of the list: blocks have the same linears in the same order
            linear = names[i * len(names) // count + i * (len(names) // count) // count]
            scheme = probes[i % len(probes)].get(linear)
            if scheme is not None:
                found[linear] = {linear: scheme}
        return found

    @torch.no_grad()
    def run(self, blocks: FloatBlocks, tokens: TokenBatches, progress: Progress) -> Sensitivities:
        """Forward and back once."""
        ids, alone = tokens.input_ids[: self.windows], self.alone()
        probes = Probes({**self.probes, **alone})
        states = blocks.enter(TokenBatches(ids, {}), progress).first(len(ids))
        work = Work.of(blocks, self.options, (*self.probes.values(), *alone.values()), ids.shape, self.probed)
        progress.stage("sensitivities", work.total)
        found = Sensitivities()
        with KeptStates() as kept:
            for index in range(len(blocks)):
                segment, tell = blocks.load(index), work.in_block(index, progress)
                kept.append(states)
                probes.run_block(segment, states.first(self.probed), tell.probe)
                states.run(segment.module, index, True, lambda _, tell=tell: tell.forward())  # type: ignore[misc]
                self._drop(segment)
            gradients = self._head(blocks, ids, states, probes, work.at_head(progress))
            for index in reversed(range(len(blocks))):
                segment = blocks.load(index)
                kept.load(index, states)
                positions = len(ids) * (ids.shape[1] - 1)
                self._backward(segment, states, gradients, positions, found, work.in_block(index, progress))
                self._drop(segment)
        self._compare(found, probes.divergences)
        return found

    @staticmethod
    def _drop(segment: Segment) -> None:
        release(segment.module)
        segment.masters.clear()
        return_freed()

    def _head(
        self, blocks: FloatBlocks, ids: torch.Tensor, ends: HiddenStates, probes: Probes, tell: AtHead
    ) -> list[torch.Tensor]:
        """The divergences of the probes, and the gradients behind the last block."""
        generator = torch.Generator().manual_seed(self.seed)
        gradients = []
        with head(blocks.skeleton, blocks.outside_parameters()) as log_probabilities:
            for window in range(len(ids)):
                own, states = ids[window : window + 1], ends.batches[window]
                for piece in pieces(blocks.skeleton, ids.shape[1]) if window < self.probed else ():
                    probes.run_head(log_probabilities, own, window, piece, states, tell.probe)
                gradients.append(head_gradient(blocks.skeleton, log_probabilities, own, states, generator))
                tell.gradient()
        release(blocks.skeleton.model)
        return gradients

    def _backward(
        self,
        segment: Segment,
        states: HiddenStates,
        gradients: list[torch.Tensor],
        positions: int,
        found: Sensitivities,
        tell: InBlock,
    ) -> None:
        """Gradients through one block, and the losses of its linears."""
        inputs = {
            shared: [name for name in shared.linears if segment.full_name(name) in self.options]
            for shared in segment.spec.inputs
        }
        device = next(iter(segment.masters.values())).device
        moments = {name: WeightGradients() for names in inputs.values() for name in names}
        grams = {names[0]: Gram(segment.weight(names[0]).shape[1], device) for names in inputs.values() if names}

        paths = {segment.architecture.module_name(name): [gram] for name, gram in grams.items()}
        watchers: dict[str, Watcher] = {name: moment.update for name, moment in moments.items()}
        with accumulate(segment.module, paths, weights_by_norm, writes=stream_writers(segment)):
            block_backward(segment, states, gradients, watchers, tell.backward)
        for names in filter(None, inputs.values()):
            gram = grams.pop(names[0])
            for name in names:
                self._objectives(segment, name, gram, found)
            gram.shrink()
            for name in names:
                self._losses(segment, name, moments.pop(name), gram, positions, found)
                tell.rounded(segment.full_name(name))

    def _losses(
        self,
        segment: Segment,
        name: str,
        moments: WeightGradients,
        gram: Gram,
        positions: int,
        found: Sensitivities,
    ) -> None:
        """Of one linear under every scheme."""
        full, w = segment.full_name(name), segment.weight(name)
        probed = self._probed(full)
        losses = found.losses[full] = dict.fromkeys(self.options[full], 0.0)
        nearest = found.nearest[full] = dict.fromkeys(probed, 0.0)
        if not gram.tokens:
            return  # an expert that no token went through
        shares = moments.rows / (2 * positions * moments.rows.sum().clamp(min=torch.finfo(moments.rows.dtype).tiny))
        costs = column_costs(gram.matrix, moments.columns) if self.feedback else None
        for scheme in losses:
            rounded = fake_quantize(w, scheme.weights)
            if costs is None or scheme in probed:
                losses[scheme] = float(shares @ output_energies(rounded - w, moments.columns))
            if scheme in probed:
                nearest[scheme] = losses[scheme]
            if costs is not None:
                losses[scheme] = float(shares @ feedback_errors(w, rounded, costs))

    def _objectives(self, segment: Segment, name: str, gram: Gram, found: Sensitivities) -> None:
        """Of one linear under the schemes of probes, on the tokens as they are."""
        full, w = segment.full_name(name), segment.weight(name)
        objectives = found.objectives[full] = dict.fromkeys(self._probed(full), 0.0)
        for scheme in objectives if gram.tokens else ():
            objectives[scheme] = float(output_energy(fake_quantize(w, scheme.weights) - w, gram.matrix)) / gram.tokens

    def _probed(self, full: str) -> set[QuantScheme]:
        return {schemes[full] for schemes in self.probes.values() if full in schemes}

    def _compare(self, found: Sensitivities, divergences: Mapping[str, Divergence]) -> None:
        """Fill in what was measured."""
        for probe, schemes in self.probes.items():
            parts = sum(found.nearest[n][scheme] for n, scheme in schemes.items())
            found.whole[probe] = Point(parts, *divergences[probe].means())
        found.together = Together.through(found.whole.values())
        found.checks = tuple(
            Check(n, scheme, found.nearest[n][scheme], divergences[n].means()[0])
            for alone in self.alone().values()
            for n, scheme in alone.items()
        )
