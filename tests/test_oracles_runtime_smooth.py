"""Oracles of Runtime Smooth (Yi et al. 2024, arXiv 2409.20361) on synthetic inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ptq.activations import ActivationQuant, RuntimeSmooth
from ptq.numerics.activations import fake_quantize_inputs
from ptq.numerics.smooth import SMALLEST_MAXIMUM, channel_groups, channel_maxima, smoothing_scales

A4 = ActivationQuant(4)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(group: int, **options) -> ActivationQuant:
    return replace(A4, smooth=RuntimeSmooth(group, **options))


def test_groups_of_one_equal_per_channel_smoothing_bit_for_bit():
    """Oracle 1, first half: the grouped path with G = 1 and the formula."""
    x = random(9, 40)
    s = x.abs().amax(dim=0).clamp(min=SMALLEST_MAXIMUM)
    order, scales = channel_groups(s, RuntimeSmooth(1))
    assert torch.equal(scales, s[order])
    a = (x / s).abs().amax(dim=1, keepdim=True) / 7
    assert torch.equal(fake_quantize_inputs(x, smooth(1)), (x / s / a).round().clamp(-8, 7) * a * s)


def test_one_group_equals_plain_per_token_quantization():
    """Oracle 1, second half: a scalar cancels."""
    x = random(9, 40)
    assert torch.allclose(fake_quantize_inputs(x, smooth(40)), fake_quantize_inputs(x, A4), rtol=1e-5, atol=1e-6)
    assert torch.allclose(fake_quantize_inputs(x, smooth(64)), fake_quantize_inputs(x, A4), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("group", [1, 7, 32])
def test_smoothing_alone_is_an_identity(group):
    """Oracle 2: (X / S) * S to one unit in the last place."""
    x = random(9, 40)
    s = smoothing_scales(x, RuntimeSmooth(group))
    assert torch.allclose(x / s * s, x, rtol=2**-22, atol=0)


def test_one_token_with_groups_of_one_is_exact_for_any_bits():
    """Oracle 3: every smoothed entry is +-1; the information moved into s."""
    x = random(1, 64)
    for bits in (2, 3, 4, 8):
        found = fake_quantize_inputs(x, replace(smooth(1), bits=bits))
        assert torch.allclose(found, x, rtol=1e-6)


@pytest.mark.parametrize("group", [1, 8, 10])
def test_permuting_channels_changes_nothing(group):
    """Oracle 5, with sorting on."""
    x = random(9, 40)
    permutation = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    assert torch.equal(
        fake_quantize_inputs(x[:, permutation], smooth(group)), fake_quantize_inputs(x, smooth(group))[:, permutation]
    )


def test_channel_scales_cancel_with_groups_of_one():
    """Oracle 6: X diag(c), W diag(1/c) and 16-bit weights give the same product (powers of two: the same bits)."""
    x, w = random(9, 40), random(5, 40, seed=1)
    c = 2.0 ** torch.randint(-4, 5, (40,), generator=torch.Generator().manual_seed(3))
    plain, scaled = fake_quantize_inputs(x, smooth(1)) @ w.T, fake_quantize_inputs(x * c, smooth(1)) @ (w / c).T
    assert torch.allclose(plain, scaled, rtol=1e-5, atol=1e-5)


def test_channel_outliers():
    """Oracle 7: 8 channels of 100 times the size whose weights are as much smaller."""
    x, w = random(256, 1024), random(64, 1024, seed=1)
    outliers = torch.randperm(1024, generator=torch.Generator().manual_seed(4))[:8]
    x[:, outliers] *= 100
    w[:, outliers] /= 100
    exact = x @ w.T

    def error(quant: ActivationQuant) -> float:
        return float((fake_quantize_inputs(x, quant) @ w.T - exact).square().mean())

    plain, single, grouped = error(A4), error(smooth(1)), error(smooth(128))
    assert single < 0.1 * plain and single < grouped < plain
    assert error(smooth(128)) < error(smooth(128, reorder=False)), "sorting is what groups need"


def test_sorted_groups_fit_closer():
    """Oracle 9: sum of S with sorting <= without; S_j >= s_j; |X / S| <= 1. Groups may leave a short last one."""
    x = random(9, 42) * torch.rand(42, generator=torch.Generator().manual_seed(5)).exp()
    s = channel_maxima(x, None)[0]
    by_order, adjacent = (smoothing_scales(x, RuntimeSmooth(8, reorder))[0] for reorder in (True, False))
    assert by_order.sum() <= adjacent.sum()
    for scales in (by_order, adjacent):
        assert (scales >= s).all() and (x / scales).abs().max() <= 1
        assert len(scales.unique()) <= 6


def test_maxima_of_blocks_of_tokens_are_causal():
    """A later block may change nothing before it; the whole sequence as published leaks."""
    x = random(2, 24, 40)
    changed = x.clone()
    changed[:, 16:] *= 30
    for quant, same in ((smooth(8, block=8), True), (smooth(8), False)):
        before, after = (fake_quantize_inputs(v, quant)[:, :16] for v in (x, changed))
        assert torch.equal(before, after) == same
    rows = [fake_quantize_inputs(x[:, i : i + 8], smooth(8)) for i in (0, 8, 16)]
    assert torch.equal(torch.cat(rows, 1), fake_quantize_inputs(x, smooth(8, block=8)))


@pytest.mark.parametrize("group", [1, 8])
def test_a_last_block_may_be_short(group):
    """Every block of tokens is smoothed by its own maxima, also one that is not full."""
    x = random(2, 21, 40)
    rows = [fake_quantize_inputs(x[:, first : first + 8], smooth(group)) for first in (0, 8, 16)]
    assert torch.equal(torch.cat(rows, 1), fake_quantize_inputs(x, smooth(group, block=8)))


def test_sequences_of_a_batch_do_not_meet():
    x = random(3, 10, 40)
    together = fake_quantize_inputs(x, smooth(8))
    assert all(torch.equal(fake_quantize_inputs(x[i], smooth(8)), together[i]) for i in range(3))


def test_a_channel_of_zeros_is_harmless():
    x = random(9, 40)
    x[:, 3] = 0
    found = fake_quantize_inputs(x, smooth(1))
    assert torch.isfinite(found).all() and (found[:, 3] == 0).all()
