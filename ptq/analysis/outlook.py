"""What an analysis takes: one walk over the float blocks that looks at what flows between linears, and at attention."""

from __future__ import annotations

from collections.abc import Mapping

from calibration.launcher import launched
from calibration.model.classes import text_config
from calibration.walk.cost import Work
from ptq.linears import float_linears
from ptq.planning.block_time import block_shapes, lane_share
from ptq.planning.outlook import Outlook, hidden_of, outlook, walk_outlook, whole_model_bytes
from ptq.planning.rates import rates_of
from ptq.planning.source import Source
from ptq.runtime.dequantized import float_weights

SITE = 20  # fresh values per value of a tensor that is looked at: ranges, moments, and the error of rounding it
PROBABILITY = 8  # the same per attention probability
WEIGHT = 12  # the same per weight
WHOLE = ("--clipped-softmax", "--try")
"""Parts that hold the whole model."""


def outlook_of(source: Source, parts: Mapping[str, bool]) -> Outlook:
    """The outlook of an analysis.

    Args:
        parts: option -> whether it was given: what it takes depends on what is found, or on many runs, and is named.
    """
    infos = float_weights(source.reader, source.spec).infos
    linears = list(float_linears(source.spec, infos))
    blocks, peak = walk_outlook(source, (), linears, infos)
    tokens = source.options.samples * source.seq_len
    heads = int(getattr(text_config(source.config), "num_attention_heads", 1))
    looking = Work()
    for block in block_shapes(source, linears, False):
        values = sum(shared.tokens * shared.width for shared in block.inputs) + 3.0 * tokens * hidden_of(source)
        pairs = float(tokens * source.seq_len * heads)
        weights = float(sum(rows * width for rows, width in block.linears))
        seen = block.forward + Work(fresh=SITE * values + PROBABILITY * pairs)
        looking += seen * lane_share(block.batches, launched()[1]) + Work(fresh=WEIGHT * weights)
    rates = rates_of(source.device, source.dtype)
    pairs_held = source.batch_size * source.seq_len**2 * heads * 4
    peak += 4 * pairs_held
    given = [option for option, wanted in parts.items() if wanted]
    if any(option in WHOLE for option in given):
        peak = max(peak, whole_model_bytes(source, infos))
    remarks = [f"{option}: its time is not counted, it depends on what is found" for option in given]
    seconds = {"blocks": blocks + rates.seconds(looking)}
    return outlook("analyze", source, seconds, peak, 10_000 * source.spec.n_blocks + 1_000_000, remarks, infos=infos)
