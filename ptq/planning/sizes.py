"""What a run costs in bytes and forward passes, from headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from calibration.architectures import ArchitectureSpec, Residual
from calibration.model.checkpoint import CheckpointReader
from calibration.model.classes import text_config
from calibration.walk.outer_tensors import OuterTensors
from calibration.walk.passes import Phase, keeps_originals, references_of, watches_float
from calibration.walk.statistics import CrossGram, Gram
from ptq.linears import ModelLayout
from ptq.numerics.objective import ROW_BYTES
from ptq.planning.recipe import Recipe

FACTOR, CROSS_FACTOR = 3, 3  # matrices [in, in] beside the statistics while GPTQ and GPTAQ round a linear
STACKED = 14  # bytes per weight of the linears that are rounded together: them, two copies, codes in both orders


@dataclass(frozen=True)
class Sizes:
    """Bytes, except for the two that say otherwise.

    ``float_bytes`` and ``output_bytes`` are all tensors of the checkpoint before and after; ``quantized_bytes`` those
    of the quantized linears. ``peak_bytes`` is memory above interpreter and libraries, ``disk_bytes`` what the
    run needs at its fullest. ``forwards`` counts forward passes over the calibration set per block.
    """

    float_bytes: int
    output_bytes: int
    quantized_bytes: int
    quantized_weights: int
    bits_per_weight: float
    peak_bytes: int
    disk_bytes: int
    forwards: int


def _untied_bytes(reader: CheckpointReader, spec: ArchitectureSpec, recipe: Recipe) -> int:
    """Size of tensors outside the blocks that passes add: a head that was tied to the embedding."""
    if not isinstance(spec.residual, Residual):
        return 0
    added = [n for n in OuterTensors(reader, spec, recipe.passes).names if n not in reader.infos]
    return len(added) * reader.infos[f"{spec.residual.embeddings[0]}.weight"].nbytes if added else 0


def estimate(
    reader: CheckpointReader,
    config: Any,
    spec: ArchitectureSpec,
    layout: ModelLayout,
    recipe: Recipe,
    forwards: int,
    calibration: tuple[int, int],
    itemsize: int,
) -> Sizes:
    """What a run costs, from headers alone.

    Args:
        forwards: passes over the calibration set per block.
        calibration: tokens of the whole set and of one batch.
        itemsize: bytes per value of the forward dtype.
    """
    tokens, batch_tokens = calibration
    weights = sum(linear.numel for linear in layout.quantized)
    replaced = sum(reader.infos[f"{linear.name}.weight"].nbytes for linear in layout.quantized)
    quantized_bytes = round(layout.quantized_bits / 8)
    output = reader.total_bytes - replaced + quantized_bytes + _untied_bytes(reader, spec, recipe)
    block = sum(info.numel for n, info in reader.infos.items() if n.startswith(spec.prefix(0)))
    hidden = int(text_config(config).hidden_size)
    statistics = 0
    grams = {kind for p in recipe.passes for kind in p.statistics} & {Gram, CrossGram}
    if grams:
        shapes = {linear.name: linear.shape for linear in layout.linears if linear.block == 0}
        inputs = [shapes.get(spec.prefix(0) + s.linears[0], (0, 0))[1] for s in spec.block(0).inputs]
        widest = 4 * max(inputs, default=0) ** 2
        working = len(grams) * widest  # what a batch adds
        if any(Phase.ROUND in p.phases and Gram in p.statistics for p in recipe.passes):
            factors = FACTOR + (CROSS_FACTOR if CrossGram in grams else 0)
            rows = max(sum(shapes.get(spec.prefix(0) + n, (0, 0))[0] for n in s.linears) for s in spec.block(0).inputs)
            working = max(working, factors * widest + STACKED * rows * max(inputs))
        sums = len(grams) * sum(4 * n * n for n in inputs)
        gathering = sums + len(grams) * widest  # the sums of a lane beside the total
        statistics = sums + max(working, gathering)
    references, pairs = len(references_of(recipe.passes)), watches_float(recipe.passes)
    streams = 1 + references + 2 * pairs  # the float model's states before and after the block
    states = streams * tokens * hidden * itemsize if forwards else 0
    copies = 4 + (itemsize if itemsize != 4 else 0) + 2  # masters, forward copy, codes and scales being written
    copies += 4 if keeps_originals(recipe.passes) else 0  # weights before rounding
    widths = sum(sum(linear.shape) for linear in layout.linears if linear.block == 0)
    graph = 2 * batch_tokens * widths * itemsize if references else 0  # one batch, what its backward pass needs
    graph += batch_tokens * widths * itemsize if pairs else 0  # one batch, what the float block's linears see
    peak = block * copies + statistics + states + graph + 6 * ROW_BYTES
    stem = sum(i.nbytes for n, i in reader.infos.items() if not n.startswith(spec.blocks + "."))
    return Sizes(
        float_bytes=reader.total_bytes,
        output_bytes=output,
        quantized_bytes=quantized_bytes,
        quantized_weights=weights,
        bits_per_weight=layout.quantized_bits / weights if weights else 0.0,
        peak_bytes=max(peak, stem + states),
        disk_bytes=2 * output,
        forwards=forwards,
    )
