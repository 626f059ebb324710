"""What the parts of a sensitivity sweep take, for a progress bar that moves as time does.

One unit is a million multiplications of a weight by a token. What is no such product is counted in tokens that take as
long; the constants were measured on SmolLM2-135M with 16 x 512 tokens on one core.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from calibration.model.classes import text_config
from calibration.progress import Progress
from calibration.walk.float_blocks import FloatBlocks
from calibration.walk.head import pieces

UNIT = 10**6
BACKWARD = 5.0  # of a plain forward pass: the block once more, gradients, and their moments
ROUNDING = 500  # tokens: a linear under one scheme, and its expected error
HEAD = 1.5  # of the product alone: the softmax over the vocabulary
HEAD_BACKWARD = 3.6


@dataclass(frozen=True)
class InBlock:
    """Told of work in one block on the way forward."""

    forward: Callable[[], None]
    rounded: Callable[[str], None]
    probe: Callable[[], None]
    backward: Callable[[], None]


@dataclass(frozen=True)
class AtHead:
    """Told of work behind the blocks: a piece of a window of one probe, and the gradient of a window."""

    probe: Callable[[], None]
    gradient: Callable[[], None]


@dataclass(frozen=True)
class Work:
    """Units by kind.

    Attributes:
        forward, backward: of one window, by block.
        rounding: by linear, of those of all processes.
        probing: windows of probes that go through each block.
        head: of one piece of a window of one probe.
        head_calls: how many of those there are.
        gradient: of a window, at the head.
        windows: that gradients see.
    """

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    rounding: Mapping[str, int]
    probing: tuple[int, ...]
    head: int
    head_calls: int
    gradient: int
    windows: int

    @staticmethod
    def of(
        blocks: FloatBlocks,
        options: Mapping[str, Sequence[object]],
        probes: Sequence[Mapping[str, object]],
        shape: Sequence[int],
        probed: int,
    ) -> Work:
        """From headers.

        Args:
            shape: windows of this process that gradients see, and tokens in each.
            probed: of these, windows that probes see.
        """
        infos, spec = blocks.reader.infos, blocks.skeleton.spec
        (windows, length), n = shape, len(blocks)
        weights = [sum(i.numel for name, i in infos.items() if name.startswith(spec.prefix(b))) for b in range(n)]
        firsts = [min(b for b in range(n) if any(x.startswith(spec.prefix(b)) for x in probe)) for probe in probes]
        config = text_config(blocks.skeleton.model.config)
        per_token = int(config.vocab_size) * int(config.hidden_size)
        cut, probed = len(pieces(blocks.skeleton, length)), min(probed, windows)

        def units(products: float) -> int:
            return 1 + round(products / UNIT)

        return Work(
            forward=tuple(units(w * length) for w in weights),
            backward=tuple(units(BACKWARD * w * length) for w in weights),
            rounding={x: units(ROUNDING * infos[f"{x}.weight"].numel * len(found)) for x, found in options.items()},
            probing=tuple(probed * sum(first <= b for first in firsts) for b in range(n)),
            head=units(HEAD * per_token * length / cut),
            head_calls=probed * cut * len(probes),
            gradient=units(HEAD_BACKWARD * per_token * length),
            windows=windows,
        )

    @property
    def total(self) -> int:
        through = zip(self.forward, self.backward, self.probing, strict=True)
        return (
            sum(self.windows * (there + back) + there * probing for there, back, probing in through)
            + sum(self.rounding.values())
            + self.head * self.head_calls
            + self.gradient * self.windows
        )

    def in_block(self, index: int, progress: Progress) -> InBlock:
        where = f"block {index + 1}/{len(self.forward)}"
        return InBlock(
            forward=lambda: progress.advance(f"{where} forward", self.forward[index]),
            probe=lambda: progress.advance(f"{where} probes", self.forward[index]),
            backward=lambda: progress.advance(f"{where} backward", self.backward[index]),
            rounded=lambda linear: progress.advance(f"{where} {linear}", self.rounding[linear]),
        )

    def at_head(self, progress: Progress) -> AtHead:
        return AtHead(
            lambda: progress.advance("head, probes", self.head),
            lambda: progress.advance("head, gradient", self.gradient),
        )
