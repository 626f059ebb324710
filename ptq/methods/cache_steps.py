"""Steps of a static KV cache (``-kvstatic``): one for the keys of a layer, one for its values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from calibration.errors import ToolkitError
from calibration.model.attention import looking_at_keys
from calibration.walk.ranges import EqualBins
from calibration.walk.segment import Segment
from ptq.activations import CacheQuant
from ptq.formats.static_cache import MAKERS, STORED
from ptq.numerics.activations import step_and_zero
from ptq.numerics.hadamard import hadamard_transform
from ptq.numerics.integers import round_scale
from ptq.numerics.ranges import Estimator, static_range
from ptq.scheme import QuantScheme

STEPS = tuple(STORED)


def static_cache(scheme: QuantScheme | None) -> CacheQuant | None:
    """The cache of a linear's scheme, where its steps are calibrated."""
    return scheme.cache if scheme is not None and scheme.cache is not None and scheme.cache.static else None


def makers_of(segment: Segment) -> list[str]:
    """The linears that make keys and values, where the block's cache is static."""
    return [name for name in segment.spec.inputs[0].linears if static_cache(segment.schemes.get(name)) is not None]


def cache_bins() -> dict[str, EqualBins]:
    """Histograms of keys and of values, for `watching_cache` to fill."""
    return {suffix: EqualBins(1, torch.device("cpu")) for suffix in STEPS}


def put_steps(segment: Segment, found: Mapping[str, EqualBins], estimator: Estimator, percentile: float) -> None:
    """Leave ``key_scale`` and ``value_scale`` on the linears that make keys and values, from what was seen of all keys
    of the block after the rotary embedding, and of all values.

    Raises:
        ToolkitError: keys or values are NaN or Inf.
    """
    makers = makers_of(segment)
    cache = static_cache(segment.schemes[makers[0]])
    assert cache is not None
    for suffix, seen in found.items():
        linear = next((name for name in makers if name.rpartition(".")[2] in MAKERS[suffix]), makers[0])
        if not seen.finite():
            raise ToolkitError(
                f"{segment.full_name(linear)}: NaN or Inf among the keys or values of its layer",
                "the model overflows on this text: try --dtype float32, or check the checkpoint",
            )
        low, high = static_range(seen.counts, seen.limit, seen.low, seen.high, cache.grid, estimator, percentile)
        step, _ = step_and_zero(torch.tensor(low), torch.tensor(high), cache.grid)
        segment.parts.setdefault(linear, {})[STORED[suffix]] = round_scale(step).view(1)
        name = STORED[suffix].removesuffix("_scale")
        segment.note(linear, **{f"ranges.{name}_low": round(low, 6), f"ranges.{name}_high": round(high, 6)})


@contextmanager
def watching_cache(segment: Segment, bins: Mapping[str, EqualBins]) -> Iterator[None]:
    """While open, keys and values go into their bins; keys as they are cached, see ``key_hadamard``."""
    blocks = (parts["key_hadamard"] for parts in segment.parts.values() if "key_hadamard" in parts)
    turned = next(blocks, None)

    def look(key: torch.Tensor, value: torch.Tensor) -> None:
        if turned is not None:
            key = hadamard_transform(key, int(turned))
        for suffix, x in zip(STEPS, (key, value), strict=True):
            bins[suffix].update(x.detach().flatten(0, -2))

    with looking_at_keys(segment.module, look):
        yield
