"""What a run costs in bytes and forward passes, from headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from calibration.architectures import ArchitectureSpec, Residual
from calibration.model.checkpoint import CheckpointReader
from calibration.model.classes import text_config
from calibration.walk.outer_tensors import OuterTensors
from ptq.linears import ModelLayout
from ptq.planning.peak import Calibration, peak_by_stage
from ptq.planning.recipe import Recipe


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
    tokens: tuple[int, int, int],
    itemsize: int,
    native: bool,
) -> Sizes:
    """What a run costs, from headers alone.

    Args:
        forwards: passes over the calibration set per block.
        tokens: of the whole set, of one batch and of one window.
        itemsize: bytes per value of the forward dtype.
        native: the format is that of finished blocks.
    """
    weights = sum(linear.numel for linear in layout.quantized)
    replaced = sum(reader.infos[f"{linear.name}.weight"].nbytes for linear in layout.quantized)
    quantized_bytes = round(layout.quantized_bits / 8)
    output = reader.total_bytes - replaced + quantized_bytes + _untied_bytes(reader, spec, recipe)
    hidden, vocabulary = int(text_config(config).hidden_size), int(text_config(config).vocab_size)
    calibration = Calibration(*tokens, itemsize, forwards, vocabulary)
    peak = max(peak_by_stage(reader, spec, layout, recipe, calibration, hidden, output, native).values())
    return Sizes(
        float_bytes=reader.total_bytes,
        output_bytes=output,
        quantized_bytes=quantized_bytes,
        quantized_weights=weights,
        bits_per_weight=layout.quantized_bits / weights if weights else 0.0,
        peak_bytes=peak,
        disk_bytes=2 * output,
        forwards=forwards,
    )
