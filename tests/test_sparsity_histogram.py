"""Pooled histograms against sorted values."""

from __future__ import annotations

import math

import pytest
import torch
from sparse_runs import kth_magnitude

from calibration.histogram import Histogram
from sparsity.thresholds import kernel_mode


def pool(*parts: torch.Tensor) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.update(part)
    return histogram


@pytest.mark.parametrize("center", [0.0, 0.4, -1.3])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_thresholds_reach_the_share_asked_for(center, share):
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * 3
    found = pool(*x.split(7777)).threshold(share, center)
    assert ((x - center).abs() <= found).float().mean().item() == pytest.approx(share, abs=2e-4)
    assert found == pytest.approx(kth_magnitude(x - center, share), rel=4e-3)


def test_a_pool_is_not_a_mean_of_quantiles():
    narrow, wide = torch.randn(1000) * 0.01, torch.randn(9000)
    both = torch.cat([narrow, wide])
    assert pool(narrow, wide).threshold(0.5) == pytest.approx(kth_magnitude(both, 0.5), rel=0.01)


def test_scale_does_not_matter():
    x = torch.randn(100_000)
    reference = pool(x).threshold(0.5)
    for scale in (1e-20, 1e-3, 1e4, 1e20):
        assert pool(x * scale).threshold(0.5) == pytest.approx(reference * scale, rel=1e-2)


def test_zeros_are_ties():
    x = torch.cat([torch.zeros(600), -torch.zeros(100), torch.rand(300) + 1])
    histogram = pool(x)
    assert histogram.zeros == 700 and histogram.count == 1000
    assert histogram.threshold(0.5) == 0.0 and histogram.threshold(0.7) == 0.0
    assert 1.0 <= histogram.threshold(0.85) <= 2.0
    assert histogram.share(0.0, 0.0) == pytest.approx(0.7)


def test_no_share_is_no_threshold():
    assert pool(torch.randn(100)).threshold(0.0) == 0.0 and Histogram().threshold(0.5) == 0.0


def test_quantiles_and_their_order():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    histogram = pool(x)
    for q in (0.01, 0.3, 0.5, 0.7, 0.99):
        assert histogram.quantile(q) == pytest.approx(torch.quantile(x, q).item(), abs=5e-3)


def test_infinities_and_nan_are_seen():
    assert pool(torch.randn(5)).finite()
    assert not pool(torch.tensor([1.0, float("inf")])).finite()
    assert not pool(torch.tensor([float("nan")])).finite()
    assert not pool(torch.tensor([float("-inf")])).finite()


def test_pools_add():
    a, b = torch.randn(500), torch.randn(700) * 2
    both = pool(a)
    both.add(pool(b))
    assert both.threshold(0.4) == pool(a, b).threshold(0.4) and both.count == 1200


def test_sixteen_bit_values_are_counted_as_they_are():
    x = torch.randn(50_000)
    assert pool(x.bfloat16()).threshold(0.5) == pytest.approx(kth_magnitude(x.bfloat16(), 0.5), rel=1e-2)


def test_the_mode_is_the_peak():
    generator = torch.Generator().manual_seed(0)
    gelu = torch.nn.functional.gelu(torch.randn(200_000, generator=generator) * 0.5 - 0.75)
    assert kernel_mode(pool(gelu)) == pytest.approx(-0.17, abs=0.01)  # the minimum of GELU
    shifted = -0.17 + 0.1 * torch.randn(200_000, generator=generator)
    assert kernel_mode(pool(shifted)) == pytest.approx(-0.17, abs=0.01)
    assert math.isclose(kernel_mode(pool(torch.full((100,), 0.25))), 0.25, rel_tol=5e-3)
