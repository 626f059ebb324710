"""The memory that a run takes at its fullest, by stage, from headers alone.

Every stage is counted by what it holds at once; the constants were measured on the first two blocks of SmolLM2-135M
and on two blocks of a Llama of hidden width 2048 (the process's own VmHWM, stage by stage), 4 bits in groups of 64,
native files. On 16 x 512 tokens SmolLM2's take 67 MB by ``rtn`` (73 planned), 189 by ``gptq`` and 187 by ``awq``
(205). Those of width 2048 take 138 by ``rtn`` (138), in compressed-tensors 183 (171), and on 2 x 512 tokens 601 by
``awq`` (626), 928 by ``gptq`` (939), 1087 by ``rotate+gptq`` (939: too little), 1578 by ``gptaq`` (1738). Also too
little: ``awq+gptq`` on 4 x 256 tokens and blocks of width 1024, 409 (264). An earlier version took 1643 by
``signround`` (1747), and ``--eval`` of two windows of 256 took 1869 (1861), both at width 2048.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from calibration.architectures import ArchitectureSpec
from calibration.model.checkpoint import CheckpointReader
from calibration.model.contents import PIECE_BYTES as CHECKED_BYTES
from calibration.model.headers import TensorInfo
from calibration.model.shards import PIECE_BYTES
from calibration.walk.passes import Pass, Phase, keeps_originals, references_of, watches_float
from calibration.walk.statistics import CrossGram, Gram
from ptq.linears import ModelLayout, PlannedLinear
from ptq.numerics.rotation import CHUNK
from ptq.planning.recipe import Recipe

FACTOR, CROSS_FACTOR = 3, 3  # matrices [in, in] beside the statistics while GPTQ and GPTAQ round a linear
STACKED = 14  # bytes per weight of the linears that are rounded together: them, two copies, codes in both orders
ALONE = 2.5  # bytes per weight of a block that is rounded without text: codes, one linear as stored, what is written
BLOCK = 8.0  # bytes per weight of a block while it is rounded: masters, codes, what is packed and written
LOADED = 4.0  # bytes per weight of a block while it is run: masters; what they are made of goes one by one
DECODED = 2.5  # bytes per weight of a block while it is exported: codes as stored, unpacked, laid out anew
STORED = 0.6  # the same where they are laid out already: in native files
COMPARED = 2.9  # bytes per weight of a block while it is read back: codes as stored and unpacked, of both sides
TURNING = 40  # bytes per value of the rows that are turned at a time: float64, before, behind and on the way
MASKED = 9  # float32 tensors as large as the widest activation of a batch, while values are counted and pruned
LIBRARIES = 10_000_000  # code that a run loads
WITH_TEXT = 25_000_000  # what the allocator keeps of batches, besides


@dataclass(frozen=True)
class Calibration:
    """Tokens of the calibration set, of one batch and of one window, bytes per value of the forward dtype, and passes
    over the set per block."""

    tokens: int
    batch_tokens: int
    window: int
    itemsize: int
    forwards: int


def peak_by_stage(
    reader: CheckpointReader,
    spec: ArchitectureSpec,
    layout: ModelLayout,
    recipe: Recipe,
    calibration: Calibration,
    hidden: int,
    output_bytes: int,
    native: bool,
) -> dict[str, int]:
    """Bytes above interpreter and libraries, by stage of a run.

    Args:
        hidden: width of the hidden states.
        output_bytes: of all tensors that are written.
        native: in the layout of finished blocks.
    """
    laying = STORED if native else DECODED
    ordered = sorted(reader.infos.items(), key=lambda item: (item[1].shard, item[0]))
    pieces = [reader.piece_bytes(name, CHECKED_BYTES) for name, _ in ordered]
    block = sum(info.numel for n, info in ordered if n.startswith(spec.prefix(0)))
    rest = LIBRARIES + (WITH_TEXT if calibration.forwards else 0)
    outside = [n for n, _ in ordered if spec.block_of(n) is None]
    rewritten = {name for p in recipe.passes for name in p.outside(spec, outside)}
    turned = [reader.infos[n] for n in rewritten if n in reader.infos]
    rewriting = max((_rewriting(info) for info in turned), default=0)
    largest = max((info.nbytes for info in turned), default=0)
    waiting = sum(info.nbytes for info in turned) + largest * len(rewritten - set(reader.infos)) - largest
    kept = [reader.infos[n].nbytes for n in sorted(outside)]
    passing = max((a + b for a, b in pairwise([0, *kept])), default=0)  # one is written, the next one read
    stages = {
        "check weights": max((a + b for a, b in pairwise([0, *pieces])), default=0),  # one is hashed, the next one read
        "blocks": round(_blocks(spec, layout.linears, recipe.passes, calibration, hidden, block)),
        "export": max(min(output_bytes, 2 * PIECE_BYTES) + round(laying * block), waiting + rewriting, passing),
        "verify": round(COMPARED * block),
    }
    if calibration.forwards:
        front = [reader.infos[n] for n in outside if not n.startswith(("lm_head.", f"{spec.blocks}."))]
        stages["embed"] = max(_embed(front, calibration, hidden), rewriting)
    return {name: size + rest for name, size in stages.items()}


def walk_bytes(
    infos: Mapping[str, TensorInfo],
    spec: ArchitectureSpec,
    linears: Sequence[PlannedLinear],
    passes: Sequence[Pass],
    calibration: Calibration,
    hidden: int,
) -> int:
    """Bytes above interpreter and libraries of a walk over the blocks that rounds nothing."""
    block = sum(info.numel for name, info in infos.items() if name.startswith(spec.prefix(0)))
    outside = [info for name, info in infos.items() if spec.block_of(name) is None and not name.startswith("lm_head.")]
    walk = _blocks(spec, linears, passes, calibration, hidden, block)
    return LIBRARIES + WITH_TEXT + round(max(walk, _embed(outside, calibration, hidden)))


def _rewriting(info: TensorInfo) -> int:
    """A matrix outside the blocks that a pass rewrites: what it was, what it becomes, and float64 rows."""
    return 2 * info.nbytes + TURNING * min(info.numel, CHUNK)


def _embed(infos: list[TensorInfo], calibration: Calibration, hidden: int) -> int:
    """What lies in front of the blocks, in the dtype of the forward pass, and one tensor as it is stored, or the hidden
    states that come of it."""
    copied = max((i.nbytes for i in infos if i.dtype.itemsize != calibration.itemsize), default=0)
    states = calibration.tokens * hidden * calibration.itemsize
    return sum(i.numel * calibration.itemsize for i in infos) + max(copied, states)


def _states(passes: Sequence[Pass], calibration: Calibration, hidden: int) -> int:
    """Hidden states: of the stream, of the float model beside it before and after the block, of references."""
    streams = 1 + len(references_of(passes)) + 2 * watches_float(passes)
    return streams * calibration.tokens * hidden * calibration.itemsize


def _blocks(
    spec: ArchitectureSpec,
    linears: Sequence[PlannedLinear],
    passes: Sequence[Pass],
    calibration: Calibration,
    hidden: int,
    block: int,
) -> float:
    """One block at work: its weights, hidden states, statistics, and the larger of a forward pass and of rounding."""
    c = calibration
    if not c.forwards:
        return ALONE * block
    shapes = {n.name[len(spec.prefix(0)) :]: n.shape for n in linears if n.block == 0}
    weights = LOADED * block + (c.itemsize * block if c.itemsize != 4 else 0)
    weights += 4 * block if keeps_originals(passes) else 0  # weights before rounding
    kept, rounding = _statistics(spec, passes, shapes)
    widths = sum(sum(shape) for shape in shapes.values())
    widest = max((max(shape) for shape in shapes.values()), default=0)
    per_token = c.itemsize * (3 * widest + 4 * hidden)  # gate, up and their product; what attention holds
    trained = [p for p in passes if p.references]
    graph = max((2 * (c.window if p.by_window else c.batch_tokens) * widths * c.itemsize for p in trained), default=0)
    graph += max((p.learned_bytes for p in trained), default=0) * block
    inputs = [shapes[s.linears[0]][1] for s in spec.block(0).inputs if s.linears[0] in shapes]
    watched = (
        c.batch_tokens * sum(inputs) * c.itemsize if watches_float(passes) else 0
    )  # what the float block sees there
    if any(Phase.GATE in p.phases for p in passes):
        watched += MASKED * 4 * widest * c.batch_tokens
    alone = bool(trained) and all(p.by_window for p in trained)
    training = graph + (c.window if alone else c.batch_tokens) * per_token
    beside = kept if c.tokens > c.batch_tokens else min(kept, 4 * max(inputs, default=0) ** 2)
    gathering = c.batch_tokens * per_token + beside  # the sums of a lane, or one product, beside those of all
    working = max(gathering, training if trained else 0, rounding, (BLOCK - LOADED) * block)
    return weights + _states(passes, c, hidden) + kept + watched + working


def _statistics(
    spec: ArchitectureSpec, passes: Sequence[Pass], shapes: Mapping[str, tuple[int, int]]
) -> tuple[int, int]:
    """Bytes of a block's Gram matrices, and of what rounding needs beside them for the largest linears of one input."""
    grams = {kind for p in passes for kind in p.statistics} & {Gram, CrossGram}
    groups = [(shapes[s.linears[0]][1], sum(shapes[n][0] for n in s.linears if n in shapes))
              for s in spec.block(0).inputs if s.linears[0] in shapes]  # fmt: skip
    kept = len(grams) * sum(4 * columns**2 for columns, _ in groups)
    if not any(Phase.ROUND in p.phases and Gram in p.statistics for p in passes):
        return kept, 0
    factors = FACTOR + (CROSS_FACTOR if CrossGram in grams else 0)
    return kept, max((factors * 4 * n**2 + STACKED * rows * n for n, rows in groups), default=0)
