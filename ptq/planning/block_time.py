"""How long a walk over the blocks takes: what every block consists of, over rates of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from calibration.distributed import LANES, owners_by_cost
from calibration.model.classes import text_config
from calibration.walk.cost import BlockShape, InputShape, Work
from calibration.walk.passes import Pass, forwards_per_block, stream_of
from calibration.walk.statistics import CrossGram, Gram, Statistic
from ptq.linears import PlannedLinear
from ptq.planning.rates import Rates
from ptq.planning.source import Source

OUTPUTS = 2.5  # fresh values per output of a linear in a forward pass: it, norms, nonlinearities, products
OPERATIONS = 60  # tensor operations of a block beside its linears
LOADING = 3  # fresh values per weight of a block: masters, what is encoded and packed
ALONE = 1  # the same where no text runs through the blocks, which are then rounded without masters
RESTORING = 3  # the same where later blocks see what was written


def block_shapes(source: Source, linears: Sequence[PlannedLinear], has_gram: bool) -> list[BlockShape]:
    """The blocks of a model: at work are the linears with a scheme, or all where none has one.

    Args:
        linears: of the plan.
    """
    tokens, chosen = source.options.samples * source.seq_len, {n.name for n in linears if n.scheme is not None}
    batches = -(-source.options.samples // source.batch_size)
    quants = [n.scheme.weights for n in linears if n.scheme is not None]
    usual = [0 if not quant.superblocks else 1 if quant.symmetric else 2 for quant in quants]
    integers = max(set(usual), key=usual.count, default=0)
    groups = [n.scheme.weights.grouping.size or n.shape[1] for n in linears if n.scheme is not None]
    share = _routed(source.config)
    found = []
    for index in range(source.spec.n_blocks):
        prefix, own = source.spec.prefix(index), {n.name: n for n in linears if n.block == index}
        inputs, work, outputs = [], 0.0, 0.0
        for shared in source.spec.block(index).inputs:
            members = [own[prefix + name] for name in shared.linears if prefix + name in own]
            arriving = tokens * (share if shared.expert is not None else 1.0)
            work += sum(2.0 * n.numel * arriving for n in members)
            outputs += sum(n.shape[0] * arriving for n in members)
            rows = tuple(n.shape[0] for n in members if not chosen or n.name in chosen)
            if members:
                inputs.append(InputShape(members[0].shape[1], rows, arriving))
        hidden = int(text_config(source.config).hidden_size)
        forward = Work(
            products=work + 2.0 * tokens * source.seq_len * hidden,  # attention looks back only: half of all pairs
            fresh=OUTPUTS * outputs * source.dtype.itemsize / 4,
            calls=float(batches * (OPERATIONS + len(own))),
        )
        found.append(
            BlockShape(
                tuple(inputs), min(groups, default=1), source.options.samples, batches, forward, has_gram, integers
            )
        )
    return found


def _routed(config: Any) -> float:
    """The share of all tokens that an expert sees, where the router is fair."""
    text = text_config(config)
    counts = [getattr(text, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")]
    count, active = next((n for n in counts if n), None), getattr(text, "num_experts_per_tok", None)
    return min(1.0, active / count) if count and active else 1.0


def gathering(block: BlockShape, kinds: Sequence[type[Statistic]], itemsize: int) -> Work:
    """Statistics of all inputs of a block, beside the forward pass that shows them."""
    grams = sum(issubclass(kind, (Gram, CrossGram)) for kind in kinds)
    others = len(kinds) - grams
    values = sum(shared.tokens * shared.width for shared in block.inputs)
    squares = sum(shared.width**2 for shared in block.inputs)
    return Work(
        products=grams * 2.0 * sum(shared.tokens * shared.width**2 for shared in block.inputs),
        fresh=(2 * grams + others) * values * itemsize / 4 + grams * block.batches * squares,
        calls=10.0 * len(kinds) * len(block.inputs) * block.batches,
    )


def walking(
    source: Source, passes: Sequence[Pass], blocks: Sequence[BlockShape], rates: Rates, processes: int, stored: float
) -> list[float]:
    """Seconds of every block of a walk: forward passes and statistics, tasks of the passes, reading and writing.

    Args:
        stored: bytes of the file of a finished block.
    """
    kinds = tuple(dict.fromkeys(kind for p in passes for kind in p.statistics))
    share = lane_share(blocks[0].batches, processes)
    forwards, onwards = forwards_per_block(passes), stream_of(passes) == "quantized"
    found = []
    for index, block in enumerate(blocks):
        weights = sum(rows * width for rows, width in block.linears)
        count = forwards - (onwards and index == len(blocks) - 1)
        seconds = share * rates.seconds(block.forward * float(count) + gathering(block, kinds, source.dtype.itemsize))
        for step in passes:
            tasks = [rates.seconds(task) for task in step.cost(block)]
            seconds += longest(tasks, processes) if step.spreads else sum(tasks)
        copies = (LOADING if forwards else ALONE) + RESTORING * onwards
        disk = Work(read=weights * 2.0, written=stored, hashed=2 * stored, fresh=float(copies * weights))
        found.append(seconds + rates.seconds(disk))
    return found


def lane_share(batches: int, processes: int) -> float:
    """The share of all batches that the busiest of some processes has."""
    lanes = min(LANES, batches)
    return -(-lanes // min(processes, lanes)) / lanes


def longest(tasks: Sequence[float], processes: int) -> float:
    """What the busiest of some processes has to do."""
    owners = owners_by_cost(tasks, processes)
    return max(sum(t for t, owner in zip(tasks, owners, strict=True) if owner == p) for p in range(processes))
