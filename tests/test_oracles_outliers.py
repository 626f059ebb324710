"""Oracles of the outlier metrics: kurtosis, outlier channels, ratios, six-sigma counts, massive activations, SQNR."""

from __future__ import annotations

import math

import pytest
import torch

from calibration.histogram import Histogram
from ptq.analysis.activations import SiteStatistics, massive, outlier_channels
from ptq.analysis.moments import PAPER_EPSILON, Moments, kurtosis
from ptq.analysis.record import SiteRecord
from ptq.analysis.rounding import rounded, sqnr
from ptq.analysis.sites import Site, site_record
from ptq.analysis.weights import weight_record

CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics(x: torch.Tensor, ids: torch.Tensor | None = None, residual: bool = True) -> SiteStatistics:
    """Of ``x [sequences, tokens, channels]``, one sequence at a time."""
    found = SiteStatistics(x.shape[-1], len(x), residual, False, CPU)
    for i in range(len(x)):
        found.update(x[i : i + 1], torch.arange(x.shape[1]), None if ids is None else ids[i : i + 1])
    return found


def record(x: torch.Tensor, ids: torch.Tensor | None = None) -> SiteRecord:
    return site_record(0, Site("block output", ("",), (), True, None), statistics(x, ids), None, lambda t: f"<{t}>")


def laplace(n: int) -> torch.Tensor:
    u = torch.rand(n, generator=torch.Generator().manual_seed(2), dtype=torch.float64) - 0.5
    return -u.sign() * (1 - 2 * u.abs()).log()


@pytest.mark.parametrize(
    ("x", "expected", "within"),
    [
        (draw(1_000_000), 3.0, 0.02),
        (torch.rand(1_000_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 1.8, 0.01),
        (laplace(1_000_000), 6.0, 0.15),
    ],
)
def test_kurtosis_of_known_distributions(x, expected, within):
    assert abs(kurtosis(x) - expected) < within
    assert abs(float(Moments.of(x[:, None]).kurtosis()) - expected) < within


def test_kurtosis_of_one_spike_is_near_the_number_of_values():
    x = torch.zeros(4096)
    x[7] = 1e3
    assert round(kurtosis(x, PAPER_EPSILON)) == 4092


def test_streaming_moments_equal_two_passes():
    x = draw(999, 5) ** 3 + torch.tensor([0.0, 1.0, -50.0, 1e3, 1e4])
    streamed = Moments.empty(5, CPU)
    for part in x.split([1, 400, 0, 98, 500]):
        streamed.update(part)
    whole = Moments.of(x)
    for name in ("mean", "m2", "m3", "m4"):
        torch.testing.assert_close(getattr(streamed, name), getattr(whole, name), rtol=1e-9, atol=1e-9)
    pooled, flat = streamed.pooled(), Moments.of(x.reshape(-1, 1))
    assert pooled.count == flat.count
    for name in ("mean", "m2", "m3", "m4"):
        torch.testing.assert_close(getattr(pooled, name), getattr(flat, name), rtol=1e-9, atol=1e-9)
    assert math.isclose(float(pooled.kurtosis()), kurtosis(x), rel_tol=1e-9)


def test_exactly_the_planted_channel_is_an_outlier():
    x = draw(4, 100, 64)
    assert not record(x).outlier_channels
    assert not record(50 * x).outlier_channels
    x[..., 17] *= 50
    (found,) = record(x).outlier_channels
    assert found.channel == 17 and found.persistence == 1.0
    assert found.max_abs == pytest.approx(float(x[:, 1:, 17].abs().max()), rel=1e-5)
    assert outlier_channels(x.abs().mean((0, 1))).tolist() == [17]


def test_persistence_is_the_share_of_texts():
    x = draw(4, 100, 64)
    x[:3, :, 5] *= 50
    (found,) = record(x).outlier_channels
    assert found.channel == 5 and found.persistence == 0.75


def test_a_first_token_makes_no_outlier_channel_but_is_seen():
    x = draw(4, 100, 64)
    x[:, 0, 9] = 5000.0
    found = record(x)
    assert not found.outlier_channels
    assert found.max_abs == 5000.0 and (found.largest.channel, found.largest.position) == (9, 0)
    assert found.inf_norm == 5000.0 and found.inf_norm_later < 10
    assert found.kurtosis_sequence > 1000 and found.kurtosis_sequence_later < 4
    assert found.token_disparity > 1000 and found.channel_disparity < 3


def test_ratios_do_not_depend_on_scale():
    x = draw(2, 80, 32)
    x[..., 3] *= 9
    one, other = record(x), record(1000 * x)
    for name in ("channel_disparity", "token_disparity", "kurtosis_tensor", "kurtosis_token"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-5), name
    assert one.percentile_ratio == pytest.approx(other.percentile_ratio, rel=2 / 64)  # a bin is 1/64 wide
    assert one.kurtosis_channel == pytest.approx(other.kurtosis_channel, rel=1e-5)
    assert one.sqnr == pytest.approx(other.sqnr, abs=0.01)


def test_percentiles_of_the_histogram():
    x = draw(200_000)
    histogram = Histogram()
    for part in x.split(70_000):
        histogram.update(part)
    for share in (0.5, 0.99, 0.9999):
        exact = float(torch.quantile(x.abs(), share))
        assert histogram.threshold(share) == pytest.approx(exact, rel=5e-3)
    assert sum(n for _, n in histogram.octaves()) == len(x)
    assert dict(histogram.octaves())[0] == int(((x.abs().float() >= 1) & (x.abs().float() < 2)).sum())


def test_six_sigma_counts_name_channels_positions_and_tokens():
    x, ids = draw(3, 50, 40).clamp(-4, 4), torch.arange(150).view(3, 50)
    x[0, 0, 7], x[1, 20, 7], x[2, 20, 8] = 100.0, -100.0, 100.0
    six = record(x, ids).six_sigma
    assert six.count == 3 and six.channels_hit == 2
    assert six.channels == ((7, 2), (8, 1)) and six.positions == ((20, 2), (0, 1))
    assert dict(six.tokens) == {"<0>": 1, "<70>": 1, "<120>": 1}
    later = record(x, ids).six_sigma_later
    assert later.count == 2 and later.positions == ((20, 2),)


def test_massive_activations_need_both_size_and_ratio():
    x = draw(50, 40)
    x[3, 5] = 2000.0
    assert massive(x).nonzero().tolist() == [[3, 5]]
    assert not massive(x / 30).any(), "below 100"
    x = 20 * draw(50, 40)
    x[3, 5] = 2000.0
    assert not massive(x).any(), "below 1000 medians"


def test_massive_activations_of_a_record():
    x, ids = draw(2, 50, 40), torch.arange(100).view(2, 50)
    x[0, 0, 5], x[1, 4, 5], x[1, 4, 6] = 3000.0, -4000.0, 3500.0
    found = record(x, ids).massive
    assert found.count == 3 and found.channels == ((5, 2), (6, 1)) and found.positions == ((4, 2), (0, 1))
    assert [(p.value, p.channel, p.position, p.token) for p in found.largest] == [
        (-4000.0, 5, 4, "<54>"),
        (3500.0, 6, 4, "<54>"),
    ]


def test_emergent_channels():
    x = draw(4, 100, 32).clamp(-3, 3)
    x[..., 11] += 7
    x[:, :5, 12] = 8.0  # four of the 99 later positions: below 6 %
    assert record(x).emergent == (11,)


def test_sqnr_of_uniform_values_is_six_decibels_per_bit():
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(3)) * 2 - 1
    for bits in (4, 8):
        expected = 10 * math.log10((1 / 3) / ((1 / (2 ** (bits - 1) - 1)) ** 2 / 12))
        assert sqnr(x, rounded(x, torch.tensor(1.0), bits)) == pytest.approx(expected, abs=0.1)


def test_granularity_decides_with_the_kind_of_outlier():
    """A scale per token cannot fix a channel, and one range for all tokens cannot fix a first token."""
    plain = record(draw(4, 100, 64)).sqnr
    channel = draw(4, 100, 64)
    channel[..., 17] *= 1000
    first = draw(4, 100, 64)
    first[:, 0, 17] = 1000.0
    # the outlier channel itself is most of the signal: compare where it is left out of the noise's reference
    assert record(first).sqnr["tensor-8"] < 15 < plain["tensor-8"]
    assert abs(record(first).sqnr["token-8"] - plain["token-8"]) < 0.5
    assert abs(record(first).sqnr["tensor-later-8"] - plain["tensor-later-8"]) < 0.5
    x = statistics(channel)
    others = torch.cat(x.sample)
    q = rounded(others, others.abs().amax(1, keepdim=True), 8)
    keep = torch.arange(64) != 17
    assert sqnr(others[:, keep], q[:, keep]) < 5, "per-token scales are set by the outlier"
    q = rounded(others, x.abs_max(), 8)
    assert sqnr(others[:, keep], q[:, keep]) > 30, "per-channel scales are not"


def test_weight_outliers():
    w = draw(48, 32).float()
    w[:, 4] *= 40
    w[9, 0] = 5000.0
    found = weight_record("w", 0, w)
    assert [c.channel for c in found.columns] == [0, 4]
    assert found.max_abs == 5000.0 and found.row_disparity > 3 and found.column_disparity > 100
    assert found.six_sigma == 1 and found.kurtosis > 100
