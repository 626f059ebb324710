"""The memory that a run takes at its fullest, by stage, from headers alone.

Every stage is counted by what it holds at once; constants were measured on two blocks of random Llamas of width 512 and
1024 (the process's own VmHWM, stage by stage, less its resident set at the start), one thread, native files, 4 x 256
tokens. What was planned and taken: docs/scale.md.
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
from calibration.walk.proof import needs_proof
from calibration.walk.statistics import CrossGram, Gram
from ptq.linears import ModelLayout, PlannedLinear
from ptq.numerics.objective import ROW_BYTES
from ptq.numerics.rotation import CHUNK
from ptq.planning.recipe import Recipe

FACTOR, CROSS_FACTOR = 2, 3  # matrices [in, in] beside the statistics while GPTQ and GPTAQ factorize
LOOPED = 6  # bytes per weight of the linears that go through the column loop: in its order, and codes in both
MEASURED = 3  # pieces of rows of a linear while its error is measured
SEARCHED, UNTIDY = 5, 8  # the same while a candidate is rounded and its error measured, with text and without
GRAPH, FROZEN_GRAPH = 2.0, 1.25  # values that gradients keep per input and output of linears that learn, and others
ALONE = 2.5  # bytes per weight of a block that is rounded without text: codes, one linear as stored, what is written
BLOCK = 8.0  # bytes per weight of a block while it is rounded: masters, codes, what is packed and written
LOADED = 4.0  # bytes per weight of a block while it is run: masters; what they are made of goes one by one
DECODED = 2.5  # bytes per weight of a block while it is exported: codes as stored, unpacked, laid out anew
STORED = 0.6  # the same where they are laid out already: in native files
COMPARED = 2.9  # bytes per weight of a block while it is read back: codes as stored and unpacked, of both sides
TURNING = 40  # bytes per value of the rows that are turned at a time: float64, before, behind and on the way
MASKED = 7  # float32 tensors as large as the widest activation of a batch, while values are counted and pruned
LIBRARIES = 15_000_000  # code that a run loads
WITH_TEXT = 15_000_000  # what products load, and what the allocator keeps of them


@dataclass(frozen=True)
class Calibration:
    """Tokens of the calibration set, of one batch and of one window, bytes per value of the forward dtype, passes over
    the set per block, and rows of the token embedding."""

    tokens: int
    batch_tokens: int
    window: int
    itemsize: int
    forwards: int
    vocabulary: int


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
    waiting += min(output_bytes, PIECE_BYTES) if turned else 0
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
        stages["embed"] = _embed(front, calibration, hidden) + (TURNING * CHUNK if turned else 0)
    if needs_proof(recipe.passes):
        stages["prove"] = round(2 * LOADED * block)
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
    """What lies in front of the blocks (of the token embedding, a row per token at most), in the dtype of the forward
    pass, and one tensor as it is stored, or the hidden states that come of it."""
    c = calibration
    rows = {i: min(i.shape[0], c.tokens) if i.shape[0] == c.vocabulary else i.shape[0] for i in infos if i.shape}
    values = {i: i.numel // max(i.shape[0], 1) * count for i, count in rows.items()}
    copied = max((n * i.dtype.itemsize for i, n in values.items() if i.dtype.itemsize != c.itemsize), default=0)
    return sum(values.values()) * c.itemsize + max(copied, c.tokens * hidden * c.itemsize)


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
    shapes = {n.name[len(spec.prefix(0)) :]: n.shape for n in linears if n.block == 0}
    largest = max((4 * rows * columns for rows, columns in shapes.values()), default=0)
    searching = min(ROW_BYTES, largest) if _changes_weights(passes) else 0
    if not c.forwards:
        return max(ALONE * block, LOADED * block + UNTIDY * searching if searching else 0)
    weights = LOADED * block + (c.itemsize * block if c.itemsize != 4 else 0)
    weights += 4 * block if keeps_originals(passes) else 0  # weights before rounding
    kept, rounding = _statistics(spec, passes, shapes)
    widths = sum(sum(shape) for shape in shapes.values())
    widest = max((max(shape) for shape in shapes.values()), default=0)
    per_token = c.itemsize * (3 * widest + 4 * hidden)  # gate, up and their product; what attention holds
    trained = [p for p in passes if p.references]
    graph = max(
        (_graph(p) * (c.window if p.by_window else c.batch_tokens) * widths * c.itemsize for p in trained), default=0
    )
    graph += max((p.learned_bytes for p in trained), default=0) * block
    inputs = [shapes[s.linears[0]][1] for s in spec.block(0).inputs if s.linears[0] in shapes]
    watched = (
        c.batch_tokens * sum(inputs) * c.itemsize if watches_float(passes) else 0
    )  # what the float block sees there
    if any(Phase.GATE in p.phases for p in passes):
        watched += MASKED * 4 * widest * c.batch_tokens
    alone = bool(trained) and all(p.by_window for p in trained)
    training = graph + (c.window if alone else c.batch_tokens) * per_token
    beside = kept if c.tokens > c.batch_tokens else 0
    gathering = c.batch_tokens * per_token + beside  # the sums of a lane beside those of all
    working = max(
        gathering, training if trained else 0, SEARCHED * searching, rounding + block, (BLOCK - LOADED) * block
    )
    return weights + _states(passes, c, hidden) + kept + watched + working


def _graph(step: Pass) -> float:
    return GRAPH if step.learned_bytes else FROZEN_GRAPH


def _changes_weights(passes: Sequence[Pass]) -> bool:
    """Whether some pass tries something on weights before they are rounded."""
    return any(phase < Phase.ROUND for p in passes for phase in p.phases)


def _statistics(
    spec: ArchitectureSpec, passes: Sequence[Pass], shapes: Mapping[str, tuple[int, int]]
) -> tuple[int, int]:
    """Bytes of a block's Gram matrices, and of what rounding needs beside them and the codes of the block, for the
    largest linears of one input."""
    grams = {kind for p in passes for kind in p.statistics} & {Gram, CrossGram}
    groups = [(shapes[s.linears[0]][1], [shapes[n][0] for n in s.linears if n in shapes])
              for s in spec.block(0).inputs if s.linears[0] in shapes]  # fmt: skip
    kept = len(grams) * sum(4 * columns**2 for columns, _ in groups)
    if not any(Phase.ROUND in p.phases and Gram in p.statistics for p in passes):
        return kept, 0
    factors = FACTOR + (CROSS_FACTOR if CrossGram in grams else 0)
    return kept, max((_rounding(n, rows, factors) for n, rows in groups), default=0)


def _rounding(n: int, rows: Sequence[int], factors: int) -> int:
    """One column loop over linears ``[rows, n]``: their rows in one matrix, the larger of the factorization and of the
    loop; or, behind it, the errors of a linear."""
    square, weights = 4 * n**2, sum(rows) * n
    joined = 4 * weights if len(rows) > 1 else 0
    own = max(4 * count * n for count in rows)
    return max(
        joined + max(factors * square, square + LOOPED * weights), 2 * weights + own + MEASURED * min(ROW_BYTES, own)
    )
