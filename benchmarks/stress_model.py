"""Outliers planted in a checkpoint without changing what it computes: large models' trouble on a small one.

    python benchmarks/stress_model.py MODEL OUT [--channels 16] [--factor 60] [--places norm,down,value]
                                      [--spikes 0] [--spike-factor 300] [--dataset TEXT]

Channel outliers: at every chosen place the producer (gain and bias of a norm, rows of up, rows of v) is multiplied by
the factor on some channels and the columns of every reader divided by it. The channels of all norms are the same, as in
large models, where they come from the residual stream. Token spikes: between up and down, the channels that fire
hardest on the fewest tokens of a text (largest maximum over root mean square) are multiplied by the spike factor, so
that a few tokens get single enormous entries and all others stay as they are.

Written in float32: in bfloat16 the divided columns would be rounded anew. Streamed block by block.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from calibration.architectures import Balance
from calibration.errors import ToolkitError
from calibration.model.opening import load_tokenizer, locate, open_model
from calibration.model.shards import ShardWriter
from calibration.model.skeleton import Skeleton
from calibration.progress import Silent
from calibration.text.corpora import load_corpus
from calibration.text.crops import calibration_tokens
from calibration.walk.context import Context
from calibration.walk.float_blocks import FloatBlocks
from calibration.walk.lanes import merge
from calibration.walk.passes import Pass, Phase, Stream
from calibration.walk.segment import Segment
from calibration.walk.statistics import Statistic
from calibration.walk.walk import Walk
from ptq.committed import encode_segment
from ptq.formats.write import copy_small_files, outside_blocks

PLACES = {"norm": "norm", "down": "linear", "value": "value"}
"""Names of places to the kinds of `Balance`: norm -> its readers, up -> down, v -> o."""


class Crest:
    """Largest |x| over the root mean square of x, per input channel: high where few tokens fire hard."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.maximum = torch.zeros(in_features, device=device)
        self.squares = torch.zeros(in_features, device=device)
        self.tokens = 0

    def update(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        """Every token counts alike: spikes are what is looked for."""
        self.maximum = torch.maximum(self.maximum, x.abs().amax(dim=0).float())
        self.squares += x.float().square().sum(dim=0)
        self.tokens += x.shape[0]

    def rescale(self, s: torch.Tensor) -> None:
        self.maximum.div_(s)
        self.squares.div_(s.square())

    def finite(self) -> bool:
        return bool(torch.isfinite(self.squares).all())

    def factor(self) -> torch.Tensor:
        return self.maximum / (self.squares / max(self.tokens, 1)).sqrt().clamp(min=1e-12)


@merge.register
def _(total: Crest, other: Crest) -> None:
    total.maximum = torch.maximum(total.maximum, other.maximum)
    total.squares += other.squares
    total.tokens += other.tokens


@dataclass(frozen=True)
class PlantOutliers(Pass):
    """A pass that balances backwards.

    Attributes:
        channels, factor: how many channels are multiplied, and by what.
        places: names of `PLACES`.
        spikes, spike_factor: the same for channels that fire on few tokens, between up and down.
        seed: of the choice of channels.
    """

    channels: int = 16
    factor: float = 60.0
    places: tuple[str, ...] = ("norm", "down")
    spikes: int = 0
    spike_factor: float = 300.0
    seed: int = 0

    name: ClassVar[str] = "plant-outliers"
    summary: ClassVar[str] = "plants outlier channels"
    phases: ClassVar[tuple[Phase, ...]] = (Phase.BALANCE,)

    @property
    def stream(self) -> Stream:
        return "either" if self.spikes else "none"

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        return (Crest,) if self.spikes else ()

    def apply(self, segment: Segment, context: Context) -> None:
        segment.stored_dtypes = dict.fromkeys(segment.stored_dtypes, torch.float32)
        kinds = {PLACES[place] for place in self.places}
        for number, group in enumerate(segment.spec.balance):
            if self.spikes and group.kind == "linear":
                crest = context.statistic(group.consumers[0], Crest).factor()
                self._multiply(segment, context, group, crest.topk(self.spikes).indices, self.spike_factor)
            if group.kind in kinds:
                width = _channels_of(segment, group)
                seed = self.seed if group.kind == "norm" else self.seed + 1000 * (segment.index + 1) + number
                order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
                self._multiply(segment, context, group, order[: self.channels], self.factor)

    @staticmethod
    def _multiply(segment: Segment, context: Context, group: Balance, channels: torch.Tensor, factor: float) -> None:
        s = torch.ones(_channels_of(segment, group))
        s[channels] = 1 / factor
        absorbed = segment.absorb(group, s)
        context.rescale([n for n in group.consumers if n not in segment.spec.routers], absorbed)


def _channels_of(segment: Segment, group: Balance) -> int:
    """Channels that the producer of a group hands on."""
    if group.heads is not None:
        return group.heads.key_value * group.heads.width
    return segment.weight(group.consumers[0]).shape[1]


def plant(
    model: str | Path, out: Path, step: PlantOutliers, dataset: str, samples: int = 16, seq_len: int = 256
) -> None:
    """Write the checkpoint ``model`` with planted outliers to ``out``.

    Args:
        dataset, samples, seq_len: text for the choice of spike channels; not read without spikes.

    Raises:
        ToolkitError: the model cannot be read, or has no place of the kinds asked for.
    """
    folder = locate(model)
    reader, config, spec = open_model(folder)
    kinds = {group.kind for i in range(spec.n_blocks) for group in spec.block(i).balance}
    wanted = {PLACES[place] for place in step.places} | ({"linear"} if step.spikes else set())
    if not wanted <= kinds:
        missing = ", ".join(place for place, kind in PLACES.items() if kind in wanted - kinds)
        raise ToolkitError(f"{folder}: {spec.family} has no place for: {missing}", "leave it out of --places")
    tokens = None
    if step.spikes:
        tokens = calibration_tokens(load_corpus(dataset, "calibrate"), load_tokenizer(folder), samples, seq_len, 0)
    out.mkdir(parents=True)
    skeleton = Skeleton(config, spec, torch.float32, torch.device("cpu"))
    writer = ShardWriter(out)
    for name, tensor in outside_blocks(reader, spec):
        writer.add(name, tensor.float() if tensor.is_floating_point() else tensor)
    with tempfile.TemporaryDirectory() as blocks:
        walk = Walk(FloatBlocks(reader, skeleton, (step,)), encode_segment, lambda t, s, d: dict(t), Path(blocks))
        walk.run(tokens, Silent())
        for index in range(spec.n_blocks):
            for name, tensor in walk.finished.tensors(index).items():
                writer.add(name, tensor)
    writer.finish()
    copy_small_files(folder, out)
    (out / "config.json").write_text(json.dumps({**reader.config, "dtype": "float32"}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--factor", type=float, default=60.0)
    parser.add_argument("--places", default="norm,down", help=f"comma-separated, of {', '.join(PLACES)}")
    parser.add_argument("--spikes", type=int, default=0)
    parser.add_argument("--spike-factor", type=float, default=300.0)
    parser.add_argument("--dataset", default="wikitext2")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    places = tuple(place for place in args.places.split(",") if place)
    unknown = [place for place in places if place not in PLACES]
    if unknown:
        raise SystemExit(f"--places {','.join(unknown)}: unknown; use some of {', '.join(PLACES)}")
    step = PlantOutliers(args.channels, args.factor, places, args.spikes, args.spike_factor, args.seed)
    try:
        plant(args.model, args.out, step, args.dataset)
    except ToolkitError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"written to {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
