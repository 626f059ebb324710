"""Models that differ from the float one in some rounded linears, run beside it block by block: what the divergence is.

Expectations are held against them: everything rounded says how the parts add up, a few linears alone say whether each
part is right. One more stream of hidden states per model, never a second block in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from calibration.distributed import Processes
from calibration.walk.head import LogProbabilities
from calibration.walk.segment import Segment
from calibration.walk.states import HiddenStates
from ptq.numerics.grids import fake_quantize
from ptq.scheme import QuantScheme


@dataclass
class Divergence:
    """Sums over positions: KL(float || probe) in nats, and the increase of the loss on the text."""

    kl: float = 0.0
    nll: float = 0.0
    positions: int = 0

    def add(self, other: Divergence) -> None:
        self.kl += other.kl
        self.nll += other.nll
        self.positions += other.positions

    def means(self) -> tuple[float, float]:
        return max(self.kl, 0.0) / self.positions, self.nll / self.positions


class Probes:
    """Streams of hidden states, one per probe, from the first block on in which it differs.

    Args:
        rounded: by name of the probe, full name of a linear -> scheme that it is rounded to nearest with.
    """

    def __init__(self, rounded: Mapping[str, Mapping[str, QuantScheme]]) -> None:
        self._rounded = rounded
        self._streams: dict[str, HiddenStates] = {}
        self._found: dict[tuple[str, int], Divergence] = {}

    def run_block(self, segment: Segment, entering: HiddenStates, advance: Callable[[], None]) -> None:
        """Through one block.

        Args:
            entering: of the float model, the windows of this process, one to a batch.
        """
        for probe, schemes in self._rounded.items():
            own = {n: schemes[full] for n in segment.spec.linears if (full := segment.full_name(n)) in schemes}
            if own and probe not in self._streams:
                self._streams[probe] = entering.copy()
            if probe in self._streams:
                weights = {n: fake_quantize(segment.weight(n), scheme.weights) for n, scheme in own.items()}
                with _replaced(segment, weights):
                    self._streams[probe].run(segment.module, segment.index, True, lambda _: advance())

    def run_head(self, log_probabilities: LogProbabilities, ids: torch.Tensor, window: int, piece: slice,
                 states: torch.Tensor, advance: Callable[[], None]) -> None:  # fmt: skip
        """Add one piece of a window to the divergences.

        Args:
            ids: ``[1, L]``, states ``[1, L, hidden]`` of the float model behind the last block.
            window: by its place among those of this process.
            piece: positions that predict a token of the window.
        """
        targets = ids[0, piece.start + 1 : piece.stop + 1, None]
        log_p = log_probabilities(ids[:, piece], states[:, piece])
        p = log_p.exp()
        for probe, stream in self._streams.items():
            difference = log_p - log_probabilities(ids[:, piece], stream.batches[window][:, piece])
            kl, nll = (p * difference).sum(), difference.gather(1, targets.to(difference.device)).sum()
            found = self._found.setdefault((probe, stream.numbers[window]), Divergence())
            found.add(Divergence(float(kl), float(nll), len(targets)))
            advance()

    def divergences(self, processes: Processes) -> dict[str, Divergence]:
        """Of every probe on the windows of all ``processes``, added up in the order of the windows."""
        of_windows = {key: found for own in processes.all_values(self._found) for key, found in own.items()}
        total = {probe: Divergence() for probe in self._rounded}
        for probe, number in sorted(of_windows, key=lambda key: key[1]):
            total[probe].add(of_windows[probe, number])
        return total


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
