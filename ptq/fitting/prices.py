"""One block in reverse: sums over the windows, and from them what its linears cost under the schemes on offer.

What is summed up, and why, is said in `ptq.fitting.sensitivity`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

import torch

from calibration.architectures.spec import SharedInput
from calibration.distributed import Processes
from calibration.walk.backward import WeightGradients, block_backward
from calibration.walk.capture import Watcher, accumulate
from calibration.walk.lanes import sum_of_lanes
from calibration.walk.segment import Segment
from calibration.walk.states import HiddenStates
from calibration.walk.statistics import Gram
from calibration.walk.token_weights import stream_writers, weights_by_norm
from ptq.numerics.feedback import column_costs, feedback_errors
from ptq.numerics.grids import fake_quantize
from ptq.numerics.objective import output_energies, output_energy
from ptq.scheme import QuantScheme

ROUNDED = 80
"""Operations per weight that take as long as rounding it to nearest under a scheme, with the error."""


@dataclass(frozen=True)
class BlockSums:
    """Of all windows.

    Attributes:
        grams: of the inputs.
        moments: of the linears, by block-relative name.
    """

    grams: Mapping[SharedInput, Gram]
    moments: dict[str, WeightGradients]

    def pop(self, linear: str) -> tuple[Gram, WeightGradients]:
        """Those of one linear, whose moments are let go."""
        gram = next(gram for shared, gram in self.grams.items() if linear in shared.linears)
        return gram, self.moments.pop(linear)


def sums_of_block(
    segment: Segment,
    linears: Sequence[str],
    states: HiddenStates,
    gradients: list[torch.Tensor],
    processes: Processes,
    advance: Callable[[], None],
) -> BlockSums:
    """Carry gradients from behind a block to in front of it, and sum up over the windows of all processes.

    Args:
        linears: that are at work, by block-relative name, input by input.
        states, gradients: of the windows of this process, as for `block_backward`.
        advance: called for each of these windows.

    Raises:
        ToolkitError: another process has ended.
    """
    device = next(iter(segment.masters.values())).device
    shapes = {name: segment.weight(name).shape for name in linears}
    readers = {segment.spec.shared_input(name): name for name in reversed(linears)}  # the first linear of every input

    def nothing_seen() -> dict[SharedInput | str, Gram | WeightGradients]:
        fresh: dict[SharedInput | str, Gram | WeightGradients] = {}
        fresh |= {shared: Gram(shapes[name][1], device) for shared, name in readers.items()}
        return fresh | {name: WeightGradients(out, width, device) for name, (out, width) in shapes.items()}

    def run(windows: range, fresh: Mapping[SharedInput | str, Gram | WeightGradients]) -> None:
        own = _apart(fresh)
        paths = {segment.architecture.module_name(readers[shared]): [gram] for shared, gram in own.grams.items()}
        watchers: dict[str, Watcher] = {name: moments.update for name, moments in own.moments.items()}
        with accumulate(segment.module, paths, weights_by_norm, writes=stream_writers(segment)):
            block_backward(segment, states, gradients, windows, watchers, advance)

    return _apart(sum_of_lanes(states.lanes, processes, nothing_seen, run))


def _apart(sums: Mapping[SharedInput | str, Gram | WeightGradients]) -> BlockSums:
    grams = {key: s for key, s in sums.items() if isinstance(key, SharedInput) and isinstance(s, Gram)}
    return BlockSums(
        grams, {key: s for key, s in sums.items() if isinstance(key, str) and isinstance(s, WeightGradients)}
    )


@dataclass(frozen=True)
class Prices:
    """Of one linear by scheme; what they are is said in `ptq.fitting.sensitivity.Sensitivities`.

    Attributes:
        losses: of every scheme on offer.
        nearest, objectives: of the schemes of probes.
    """

    losses: dict[QuantScheme, float]
    nearest: dict[QuantScheme, float]
    objectives: dict[QuantScheme, float]


def pricing_cost(shape: Sequence[int], options: int, probed: int, feedback: bool) -> float:
    """Operations of `prices`, roughly, for sharing work: products of changes with the moments and the Gram matrix, a
    factorization, and the roundings. ``shape`` is ``[out, in]``."""
    rows, width = shape
    products = 2.0 * rows * width**2 * (probed + (probed if feedback else options))
    return products + (6.0 * width**3 if feedback else 0.0) + ROUNDED * rows * width * options


def prices(
    w: torch.Tensor,
    options: Sequence[QuantScheme],
    probed: Container[QuantScheme],
    gram: Gram,
    moments: WeightGradients,
    positions: int,
    feedback: bool,
) -> Prices:
    """Zeros for an expert that no token went through.

    Args:
        w: ``[out, in]``.
        options: on offer.
        probed: those of them that probes have.
        gram: of the input, left as it is; the objectives go by it, and the errors of GPTQ by what `Gram.shrink` makes
            of it, as the rounding pass does.
        positions: of all windows, that predict a token.
        feedback: expect GPTQ's error instead of that of rounding to nearest.
    """
    losses = dict.fromkeys(options, 0.0)
    nearest = {scheme: 0.0 for scheme in options if scheme in probed}
    objectives = dict(nearest)
    if gram.tokens:
        shares = moments.rows / (2 * positions * moments.rows.sum().clamp(min=torch.finfo(moments.rows.dtype).tiny))
        costs = column_costs(_shrunk(gram), moments.columns) if feedback else None
        for scheme in options:
            rounded = fake_quantize(w, scheme.weights)
            if costs is not None:
                losses[scheme] = float(shares @ feedback_errors(w, rounded, costs))
            if costs is None or scheme in nearest:
                change = rounded - w
                energy = float(shares @ output_energies(change, moments.columns))
                if costs is None:
                    losses[scheme] = energy
                if scheme in nearest:
                    nearest[scheme] = energy
                    objectives[scheme] = float(output_energy(change, gram.matrix)) / gram.tokens
    return Prices(losses, nearest, objectives)


def _shrunk(gram: Gram) -> torch.Tensor:
    """``[in, in]``, the Gram matrix that the rounding pass works with."""
    own = copy.copy(gram)
    own.matrix = gram.matrix.clone()
    own.shrink()
    return own.matrix
