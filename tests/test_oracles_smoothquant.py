"""The oracles of SmoothQuant: scales and expected errors against slow float64 code, and the pass on tiny models."""

from __future__ import annotations

import pytest
import torch
from command import done, refused, text_file, tiny
from test_oracles_awq import outputs, randn
from test_statistics import inputs_of, new_context, open_block, scheme

from calibration.record import read_record
from calibration.walk.statistics import AbsMax, Sample
from ptq.methods import SmoothQuant
from ptq.numerics.integers import fake_quantize
from ptq.numerics.smoothquant import activation_noise, smoothed_error, smoothing_scales
from ptq.scheme import Grouping, TensorQuant, parse_scheme

torch.set_num_threads(1)
ROW8 = TensorQuant(8, Grouping("channel"))


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """W ``[24, 64]`` and X ``[300, 64]`` float64 whose channels differ in size."""
    x = randn(300, 64, seed=seed + 1) * (0.8 * randn(64, seed=seed + 2)).exp()
    return randn(24, 64, seed=seed) * (0.5 * randn(64, seed=seed + 3)).exp(), x


def maxima(w: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.abs().amax(0), w.abs().amax(0)


def per_tensor(x: torch.Tensor, bits: int = 8) -> torch.Tensor:
    """X rounded to one symmetric grid, the slow way."""
    top = 2 ** (bits - 1) - 1
    step = float(x.abs().max()) / top
    return (x / step).round().clamp(-top, top) * step


@torch.no_grad()
@pytest.mark.parametrize("family", ["opt", "llama", "gemma2", "falcon-7b", "mixtral"])
def test_oracle_1_smoothing_preserves_the_block(family, tmp_path):
    """1. Smoothing without quantization preserves the block output (rel. <= 1e-5 fp32) for LayerNorm+bias, RMSNorm,
    (1+w) norm; norms with a second consumer (parallel MLP, router) included."""
    segment, states = open_block(family, tmp_path, scheme=scheme(8))
    expected = outputs(segment, states)
    SmoothQuant().apply(segment, new_context(segment, states, (AbsMax,)))
    assert (outputs(segment, states) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert segment.edits == 0 and segment.notes[segment.spec.linears[0]] == {"smoothquant.alpha": 0.5}
    untouched = {n for n in segment.spec.linears if n not in segment.notes}
    assert untouched == {n for g in segment.spec.balance if g.kind != "norm" for n in g.consumers} | {
        n for n in segment.spec.linears if not any(n in g.consumers for g in segment.spec.balance)
    }


def test_oracle_2_half_balances_both_sides():
    """2. alpha=0.5: per-channel max|X/s| equals per-channel joint max|W*s| to 1e-6."""
    w, x = problem()
    s = smoothing_scales(*maxima(w, x), 0.5)
    assert torch.allclose((x / s).abs().amax(0), (w * s).abs().amax(0), rtol=1e-6)
    assert torch.allclose((x / s).abs().amax(0), (x.abs().amax(0) * w.abs().amax(0)).sqrt(), rtol=1e-6)


def test_oracle_3_ends():
    """3. alpha=1: max|X_j/s_j| = 1 for every live channel. alpha=0: joint max|W_:j s_j| = 1."""
    w, x = problem()
    x[:, 5] = 0
    live = x.abs().amax(0) > 0
    assert torch.allclose((x / smoothing_scales(*maxima(w, x), 1.0)).abs().amax(0)[live], torch.ones(63).double())
    assert torch.allclose((w * smoothing_scales(*maxima(w, x), 0.0)).abs().amax(0)[live], torch.ones(63).double())


def test_oracle_4_only_maxima_count():
    """4. s is invariant to token order and to adding tokens that do not change ax; batches do not matter."""
    w, x = problem()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    found = []
    for batches in ((x,), (x[order][:7], x[order][7:]), (x, 0.5 * x)):
        statistic = AbsMax(64, torch.device("cpu"))
        for batch in batches:
            statistic.update(batch)
        found.append(smoothing_scales(statistic.maximum, w.abs().amax(0), 0.5))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.85, 1.0])
def test_oracle_5_homogeneity(alpha):
    """5. Scaling X by c: s scales by c^alpha; scaling all W_i by c: s scales by c^(alpha-1)."""
    w, x = problem()
    x_max, w_max = maxima(w, x)
    s = smoothing_scales(x_max, w_max, alpha)
    for c in (3.0, 0.2):
        assert torch.allclose(smoothing_scales(c * x_max, w_max, alpha), s * c**alpha, rtol=1e-12)
        assert torch.allclose(smoothing_scales(x_max, c * w_max, alpha), s * c ** (alpha - 1), rtol=1e-12)


def test_oracle_6_an_outlier_channel():
    """6. With one channel of X set 100x larger, per-tensor A8 output MSE after smoothing (alpha=0.5) is < before, by
    > 5x."""
    x, w = randn(300, 64, seed=1), randn(24, 64)
    x[:, 7] *= 100
    s = smoothing_scales(*maxima(w, x), 0.5)
    before = (per_tensor(x) @ w.T - x @ w.T).square().mean()
    after = (per_tensor(x / s) @ (w * s).T - x @ w.T).square().mean()
    assert after < before / 5


@torch.no_grad()
def test_oracle_7_joint_scales(tmp_path):
    """7. Joint s for q,k,v: computing it from the concatenated weight equals computing it from the list."""
    segment, states = open_block("llama", tmp_path, scheme=scheme(8))
    group = segment.spec.balance[0]
    x_max = inputs_of(segment, states, group.consumers[0]).abs().amax(0).float()
    w_max = torch.cat([segment.weight(n) for n in group.consumers]).abs().amax(0)
    gain = segment.masters["input_layernorm.weight"].clone()
    SmoothQuant(alpha=0.4).apply(segment, new_context(segment, states, (AbsMax,)))
    expected = gain / smoothing_scales(x_max, w_max, 0.4)
    assert torch.allclose(segment.masters["input_layernorm.weight"], expected, rtol=1e-6)


@torch.no_grad()
def test_values_are_tied_across_query_heads(tmp_path):
    """v -> o with grouped queries: the maximum over the query heads that share a value channel counts, on both
    sides."""
    segment, states = open_block("llama", tmp_path, scheme=scheme(8))
    group = next(g for g in segment.spec.balance if g.kind == "value")
    x = inputs_of(segment, states, group.consumers[0]).abs().amax(0).float().view(2, 2, 16)
    w = segment.weight(group.consumers[0]).abs().amax(0).view(2, 2, 16)
    before = segment.weight(group.producer).clone()
    SmoothQuant(values=True).apply(segment, new_context(segment, states, (AbsMax,)))
    s = smoothing_scales(x.amax(1).flatten(), w.amax(1).flatten(), 0.5)
    # the norm in front was smoothed too; its factors are the same for every row
    columns = segment.weight(group.producer) / before * s[:, None]
    assert torch.allclose(columns, columns[:1].expand_as(columns), rtol=1e-4)


@torch.no_grad()
def test_oracle_9_dead_channels(tmp_path):
    """9. Dead channel test: zero channel in X gives finite weights, and the output is unchanged."""
    segment, states = open_block("llama", tmp_path, scheme=scheme(8))
    segment.masters["input_layernorm.weight"][3] = 0
    segment._touch("input_layernorm.weight", exact=True)
    expected = outputs(segment, states)
    SmoothQuant(alpha=0.9).apply(segment, new_context(segment, states, (AbsMax,)))
    assert all(torch.isfinite(m).all() for m in segment.masters.values())
    assert segment.masters["input_layernorm.weight"][3] == 0
    assert (outputs(segment, states) - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_float16_gains_stay_in_range(tmp_path):
    segment, states = open_block("llama", tmp_path, scheme=scheme(8))
    segment.masters["input_layernorm.weight"][3] = 3e-5
    segment._touch("input_layernorm.weight", exact=True)
    segment.stored_dtypes = dict.fromkeys(segment.stored_dtypes, torch.float16)
    SmoothQuant(alpha=1.0).apply(segment, new_context(segment, states, (AbsMax,)))
    assert all(torch.isfinite(m.half()).all() for m in segment.masters.values())


@pytest.mark.parametrize("share", ["token", "tensor"])
def test_expected_error_is_the_error(share):
    """The search's objective, from Gram matrix and maxima, against rounding weights and activations explicitly."""
    w, x = problem()
    for alpha in (0.2, 0.5, 0.9):
        s = smoothing_scales(*maxima(w, x), alpha)
        smooth = x / s
        top = smooth.abs().amax(1) if share == "token" else smooth.abs().max()[None]
        step = top[:, None] / 127
        direct = ((smooth / step).round() * step) @ fake_quantize(w * s, ROW8).T - x @ w.T
        expected = smoothed_error(w, s, x.T @ x, ROW8, activation_noise(top, 8), len(x))
        assert float(expected) == pytest.approx(float(direct.square().sum()), rel=0.15)


@torch.no_grad()
@pytest.mark.parametrize("activations", ["token", "tensor"])
def test_search_takes_the_best_candidate(activations, tmp_path):
    """The noted alpha is the best of a float64 search that rounds explicit inputs, or as good to 10 %; it beats no
    smoothing on a block with outlier channels."""
    segment, states = open_block("llama", tmp_path, scheme=scheme(8))
    gain = segment.masters["input_layernorm.weight"]
    gain[:4] *= 60
    for name in segment.spec.balance[0].consumers:
        segment.weight(name)[:, :4] /= 60
        segment._touch(f"{name}.weight", exact=True)
    segment._touch("input_layernorm.weight", exact=True)
    members = segment.spec.balance[0].consumers
    x = inputs_of(segment, states, members[0])
    w = torch.cat([segment.weight(n) for n in members]).double()
    losses: dict[float | str, float] = {}
    for alpha in ["none", *(i / 10 for i in range(11))]:
        s = torch.ones(64).double() if alpha == "none" else smoothing_scales(*maxima(w, x), float(alpha))
        smooth = x / s
        step = (smooth.abs().amax(1, keepdim=True) if activations == "token" else smooth.abs().max()) / 127
        rounded = fake_quantize(w * s, ROW8)
        losses[alpha] = float((((smooth / step).round() * step) @ rounded.T - x @ w.T).square().sum())
    segment.schemes = dict.fromkeys(segment.schemes, parse_scheme(f"w8a8-a{activations}"))
    step = SmoothQuant(search=True, grid=10)
    step.apply(segment, new_context(segment, states, step.statistics))
    chosen = segment.notes[members[0]]["smoothquant.alpha"]
    assert losses[chosen] <= 1.1 * min(losses.values()) and losses[chosen] < 0.5 * losses["none"]


def test_sample_is_spread_over_batches():
    sample = Sample(2, torch.device("cpu"))
    for i in range(20):
        sample.update(torch.full((100, 2), float(i)) + torch.arange(100)[:, None] / 100)
    assert sample.rows.shape[0] <= Sample.LIMIT and sample.tokens == 2000
    assert sample.rows[:, 0].floor().unique().numel() >= Sample.LIMIT // Sample.PER_BATCH
    assert sample.rows[: 100 // 4, 0].max() > 0.9
    sample.rescale(torch.tensor([2.0, 1.0]))
    assert torch.equal(sample.rows[:, 0] * 2, sample.rows[:, 1])


def test_from_the_command_line(tmp_path):
    text_file(tmp_path / "text.txt")
    tiny(tmp_path / "llama", intermediate_size=128)
    (tmp_path / "r.toml").write_text('scheme = "w8a16-gchannel"\n[[pass]]\nname = "smoothquant"\nsearch = true\n')
    words = ["--dataset", tmp_path / "text.txt", "--samples", "4", "--seq-len", "24"]
    done("quantize", tmp_path / "llama", "--recipe", tmp_path / "r.toml", *words, "--out", tmp_path / "out")
    record = read_record(tmp_path / "out")
    assert record.recipe["method"] == "smoothquant+rtn"
    smoothed = [e for e in record.linears if "smoothquant.alpha" in e.notes]
    assert len(smoothed) == 10  # q, k, v, gate and up of two blocks
    (tmp_path / "r.toml").write_text('[[pass]]\nname = "smoothquant"\nalpha = 1.5\ngrid = 0\nrows = -1\n')
    message = refused("quantize", tmp_path / "llama", "--recipe", tmp_path / "r.toml", *words, "--dry-run")
    assert all(part in message for part in ("1.5 is outside [0, 1]", "smoothquant.grid", "rows"))
