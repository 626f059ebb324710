"""What every scheme of every linear costs the model: forward through the float blocks, and once in reverse.

Let D = sum over the tokens of a window of g_t x_t^T be the gradient of a linear's weight, where the loss is that of
labels drawn from the model's own predictions. To second order the Kullback-Leibler divergence that a change dW of the
weight brings to the window is 1/2 E[<dW, D>^2] (the Fisher matrix). Errors of different outputs are taken to be
uncorrelated, and the rows of D to have one second moment but for a factor:

    KL ~ 1/2 sum_r s_r dW_r M dW_r^T        M = sum of D^T D [in, in], s_r = the share of row r in sum of D^2

per position, sums over windows. Tokens stay together: what attention averages over many tokens does not average out.
(A diagonal over outputs beside a matrix over inputs: Shampoo's form of the Fisher matrix, Gupta et al. 2018, arXiv
1802.09568; measured beside others in docs/results.md.)

Several processes share the windows, one to a batch, in lanes (`calibration.distributed`): each carries the states, the
gradients and the probes of its own. The sums over windows come to all, and every linear is priced by one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from calibration.distributed import Processes
from calibration.memory import return_freed
from calibration.model.skeleton import release
from calibration.progress import Progress
from calibration.text.crops import TokenBatches
from calibration.walk.backward import head_gradient
from calibration.walk.float_blocks import FloatBlocks
from calibration.walk.head import head, pieces
from calibration.walk.kept_states import KeptStates
from calibration.walk.segment import Segment
from calibration.walk.states import HiddenStates
from ptq.fitting.prices import BlockSums, Prices, prices, pricing_cost, sums_of_block
from ptq.fitting.probes import Divergence, Probes
from ptq.fitting.together import Point, Together
from ptq.fitting.work import AtHead, Work
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
    def run(
        self, blocks: FloatBlocks, tokens: TokenBatches, progress: Progress, processes: Processes | None = None
    ) -> Sensitivities:
        """Forward and back once.

        Args:
            blocks: with batches of one window.
            processes: that share the windows; all get what was found.

        Raises:
            ToolkitError: the disk is full, or another process has ended.
        """
        processes = processes or Processes()
        ids, alone = tokens.input_ids[: self.windows], self.alone()
        probes = Probes({**self.probes, **alone})
        states = blocks.enter(TokenBatches(ids, {}), progress, processes)
        probed = states.first(sum(number < self.probed for number in states.numbers)).numbers
        shape = len(states.batches), ids.shape[1]
        work = Work.of(blocks, self.options, (*self.probes.values(), *alone.values()), shape, len(probed))
        progress.stage("sensitivities", work.total)
        found = Sensitivities()
        with KeptStates() as kept:
            for index in range(len(blocks)):
                segment, tell = blocks.load(index), work.in_block(index, progress)
                kept.append(states)
                if probed:
                    probes.run_block(segment, states.first(len(probed)), tell.probe)
                states.run(segment.module, index, True, lambda _, tell=tell: tell.forward())  # type: ignore[misc]
                self._drop(segment)
            gradients = self._head(blocks, ids, states, probes, work.at_head(progress))
            for index in reversed(range(len(blocks))):
                segment, tell = blocks.load(index), work.in_block(index, progress)
                kept.load(index, states)
                sums = sums_of_block(segment, self._at_work(segment), states, gradients, processes, tell.backward)
                self._price(segment, sums, len(ids) * (ids.shape[1] - 1), found, processes, tell.rounded)
                self._drop(segment)
        self._compare(found, probes.divergences(processes))
        return found

    @staticmethod
    def _drop(segment: Segment) -> None:
        release(segment.module)
        segment.masters.clear()
        return_freed()

    def _head(
        self, blocks: FloatBlocks, ids: torch.Tensor, ends: HiddenStates, probes: Probes, tell: AtHead
    ) -> list[torch.Tensor]:
        """The divergences of the probes, and the gradients behind the last block. Every window has labels of its own
        seed, whichever process has it."""
        seeds = torch.randint(2**62, (len(ids),), generator=torch.Generator().manual_seed(self.seed)).tolist()
        gradients = []
        with head(blocks.skeleton, blocks.outside_parameters()) as log_probabilities:
            for window, number in enumerate(ends.numbers):
                own, states = ids[number : number + 1], ends.batches[window]
                for piece in pieces(blocks.skeleton, ids.shape[1]) if number < self.probed else ():
                    probes.run_head(log_probabilities, own, window, piece, states, tell.probe)
                generator = torch.Generator().manual_seed(seeds[number])
                gradients.append(head_gradient(blocks.skeleton, log_probabilities, own, states, generator))
                tell.gradient()
        release(blocks.skeleton.model)
        return gradients

    def _price(
        self,
        segment: Segment,
        sums: BlockSums,
        positions: int,
        found: Sensitivities,
        processes: Processes,
        tell: Callable[[str], None],
    ) -> None:
        """The linears of one block under every scheme, each by one of the processes."""
        linears = {segment.full_name(name): name for name in sums.moments}
        names = list(linears)

        def of_linear(i: int) -> Prices:
            full, w = names[i], segment.weight(linears[names[i]])
            gram, moments = sums.pop(linears[full])
            return prices(w, self.options[full], self._probed(full), gram, moments, positions, self.feedback)

        costs = [
            pricing_cost(segment.weight(name).shape, len(self.options[full]), len(self._probed(full)), self.feedback)
            for full, name in linears.items()
        ]
        for full, priced in zip(names, processes.spread(costs, of_linear), strict=True):
            found.losses[full], found.nearest[full] = priced.losses, priced.nearest
            found.objectives[full] = priced.objectives
            tell(full)

    def _at_work(self, segment: Segment) -> list[str]:
        """The linears of a block that have options, by block-relative name, input by input."""
        linears = (name for shared in segment.spec.inputs for name in shared.linears)
        return [name for name in linears if segment.full_name(name) in self.options]

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
