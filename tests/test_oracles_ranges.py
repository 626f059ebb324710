"""Static ranges of inputs: the streaming histogram, and what each estimator makes of it."""

from __future__ import annotations

import pytest
import torch

from calibration.walk.ranges import EqualBins, Extremes
from ptq.activations import ActivationQuant
from ptq.numerics.activations import fake_quantize_inputs, step_and_zero
from ptq.numerics.ranges import static_range

CPU = torch.device("cpu")


def histogram(*batches: torch.Tensor) -> EqualBins:
    seen = EqualBins(batches[0].shape[1], CPU)
    for batch in batches:
        seen.update(batch)
    return seen


def ends(seen: EqualBins, quant: ActivationQuant, how: str, share: float = 99.99) -> tuple[float, float]:
    return static_range(seen.counts, seen.limit, seen.low, seen.high, quant, how, share)


def static(bits: int = 8, symmetric: bool = True) -> ActivationQuant:
    return ActivationQuant(bits, granularity="tensor", dynamic=False, symmetric=symmetric)


def heavy_tailed(tokens: int = 400, width: int = 32) -> torch.Tensor:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
    x[3, 5], x[17, 2] = 60.0, -41.0
    return x


def error(x: torch.Tensor, quant: ActivationQuant, range_: tuple[float, float]) -> float:
    scale, zero = step_and_zero(torch.tensor(range_[0]), torch.tensor(range_[1]), quant)
    return float((fake_quantize_inputs(x, quant, scale, zero) - x).square().mean())


def test_counts_are_exact_however_the_limit_grew():
    x = heavy_tailed()
    whole, grown = histogram(x), histogram(x[:1] * 1e-3, *x.split(50))
    assert grown.limit == whole.limit == 64 and (grown.low, grown.high) == (whole.low, whole.high) == (-41.0, 60.0)
    assert grown.counts.sum() == x.numel() + 32 and whole.counts.sum() == x.numel()
    again = histogram(*x.split(50))
    assert torch.equal(again.counts, whole.counts), "pairs of bins merge to the bins of the wider grid"
    assert histogram(torch.zeros(3, 4)).finite() and not histogram(torch.full((1, 4), torch.inf)).finite()


def test_extremes_are_those_of_each_channel():
    x = heavy_tailed()
    seen = Extremes(32, CPU)
    for part in x.split(64):
        seen.update(part)
    assert torch.equal(seen.low, x.amin(0)) and torch.equal(seen.high, x.amax(0)) and seen.tokens == 400
    seen.rescale(torch.full((32,), 2.0))
    assert torch.equal(seen.high, x.amax(0) / 2)


def test_min_max_never_clips_and_the_last_percentile_is_min_max():
    x, quant = heavy_tailed(), static(symmetric=False)
    seen = histogram(x)
    assert ends(seen, quant, "minmax") == (-41.0, 60.0) == ends(seen, quant, "percentile", 100)


@pytest.mark.parametrize("share", [90.0, 99.0, 99.9])
def test_percentiles_are_those_of_the_values(share):
    """Within the width of a bin of a histogram that reaches to the outlier."""
    x = heavy_tailed()
    seen = histogram(x)
    width = 2 * seen.limit / len(seen.counts)
    low, high = ends(seen, static(), "percentile", share)
    assert high == pytest.approx(float(x.abs().flatten().quantile(share / 100)), abs=1.5 * width) and low == -high
    low, high = ends(seen, static(symmetric=False), "percentile", share)
    assert high == pytest.approx(float(x.flatten().quantile(share / 100)), abs=1.5 * width)
    assert low == pytest.approx(float(x.flatten().quantile(1 - share / 100)), abs=1.5 * width)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_least_squares_is_as_good_as_the_best_of_a_dense_grid(bits, symmetric):
    x, quant = heavy_tailed(), static(bits, symmetric)
    seen = histogram(x)
    found = error(x, quant, ends(seen, quant, "mse"))
    dense = min(error(x, quant, (-41 * i / 100, 60 * i / 100)) for i in range(1, 101))
    assert found <= 1.02 * dense and found <= error(x, quant, (-41.0, 60.0))


def test_entropy_clips_outliers_and_keeps_what_fits():
    x = heavy_tailed()
    low, high = ends(histogram(x), static(4), "entropy")
    assert 2 < high < 20 and low >= -high
    assert error(x, static(4), (low, high)) < error(x, static(4), (-41.0, 60.0))
    even = torch.linspace(-1, 1, 4096).view(64, 64)
    assert ends(histogram(even), static(8), "entropy")[1] > 0.95, "nothing to clip in a flat histogram"


@pytest.mark.parametrize("how", ["minmax", "percentile", "mse", "entropy"])
def test_estimators_are_equivariant(how):
    """Twice the values, twice the range: limits are powers of two, so the histograms are the same."""
    x = heavy_tailed()
    once, twice = (ends(histogram(v), static(8), how, 99.9) for v in (x, 2 * x))
    assert twice == pytest.approx((2 * once[0], 2 * once[1]))
