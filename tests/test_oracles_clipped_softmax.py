"""Oracles of clipped softmax and softmax1, and of attention through transformers' interface."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, tiny_model

from calibration.errors import ToolkitError
from ptq.analysis.heads import HeadStatistics, Probe, head_projections, is_delimiter
from ptq.numerics.softmax import SoftmaxRule, clipped, gamma_of, renormalised, softmax1
from ptq.runtime.explicit_attention import Scores, exchanged_softmax, parse_softmax, unsupported

IDS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(*shape: int) -> torch.Tensor:
    return 4 * torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def clipped_softmax(logits: torch.Tensor, gamma: float, zeta: float = 1.0) -> torch.Tensor:
    return SoftmaxRule(gamma, zeta)(logits)


def test_gamma_0_zeta_1_is_softmax_bit_for_bit():
    for dtype in (torch.float64, torch.float32):
        a = logits(50, 200).to(dtype)
        assert torch.equal(clipped_softmax(a, 0.0, 1.0), a.softmax(-1))


def test_zero_exactly_where_p_is_small():
    p, gamma = logits(50, 200).softmax(-1), -0.003
    assert torch.equal(clipped(p, gamma) == 0, p <= -gamma / (1 - gamma))


def test_row_sums_before_clipping():
    p = logits(50, 30).softmax(-1)
    gamma, zeta = -0.02, 1.03
    torch.testing.assert_close(
        ((zeta - gamma) * p + gamma).sum(-1), torch.full((50,), zeta - gamma + 30 * gamma).double()
    )


def test_larger_gamma_never_increases_and_keeps_order():
    a = logits(50, 30)
    before = a.softmax(-1)
    order = before.argsort(-1)
    for gamma in (0.0, -1e-4, -1e-3, -1e-2, -0.1):
        p = clipped_softmax(a, gamma)
        assert bool((p <= before + 1e-15).all())
        assert bool((p.gather(-1, order).diff(dim=-1) >= 0).all())
        before = p


def test_uniform_rows_die_at_44_keys():
    gamma = gamma_of(12, 512)
    assert gamma == pytest.approx(-0.0234, abs=1e-4)
    for n, expected in ((43, 0.0156), (44, 0.0)):
        row = clipped_softmax(torch.zeros(n, dtype=torch.float64), gamma)
        assert float(row.sum()) == pytest.approx(expected, abs=5e-5)


def test_masked_keys_stay_zero():
    a = logits(4, 10)
    a[:, 5:] = -torch.inf
    assert bool((clipped_softmax(a, -0.01)[:, 5:] == 0).all())


def test_softmax1_is_softmax_with_a_zero_logit():
    for shift in (-300.0, 0.0, 300.0):
        a = logits(20, 30) + shift
        padded = torch.cat([a, torch.zeros(20, 1, dtype=a.dtype)], -1).softmax(-1)[:, :-1]
        torch.testing.assert_close(softmax1(a), padded, rtol=1e-13, atol=1e-15)


def test_renormalised_rows():
    p = clipped_softmax(logits(50, 200), -0.005)
    sums = renormalised(p).sum(-1)
    torch.testing.assert_close(sums, (p.sum(-1) > 0).double())
    assert float(renormalised(torch.zeros(3)).sum()) == 0


def test_clipped_rows_have_no_gradient():
    a = torch.zeros(60, dtype=torch.float64, requires_grad=True)
    clipped_softmax(a, -0.05).sum().backward()
    assert bool((a.grad == 0).all())
    b = logits(60).requires_grad_()
    (clipped_softmax(b, -0.001) * logits(60)).sum().backward()
    assert bool((b.grad != 0).any())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_rule_is_eager_attention_bit_for_bit(family):
    model = tiny_model(family)
    if unsupported(model):
        assert family.startswith(("falcon", "bloom"))
        with pytest.raises(ToolkitError, match="interface"), exchanged_softmax(model, SoftmaxRule()):
            pass
        return
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(IDS, use_cache=False).logits
        for rule in (SoftmaxRule(), SoftmaxRule(gamma=0.0, zeta=1.0)):
            with exchanged_softmax(model, rule):
                assert torch.equal(model(IDS, use_cache=False).logits, expected)
        with exchanged_softmax(model, SoftmaxRule(gamma=-0.01)):
            assert not torch.equal(model(IDS, use_cache=False).logits, expected)
        assert torch.equal(model(IDS, use_cache=False).logits, expected), "what was there before is there again"


def test_rules_as_text():
    assert parse_softmax("gamma=-0.003,zeta=1.003", 512) == SoftmaxRule(-0.003, 1.003)
    assert parse_softmax("alpha=4", 512) == SoftmaxRule(-4 / 512)
    assert parse_softmax("off-by-one,normalise", 512) == SoftmaxRule(off_by_one=True, normalise=True)
    assert parse_softmax("closed=0.9", 512) == SoftmaxRule(closed_from=0.9)
    for text in ("gama=-0.1", "gamma=x", "gamma=0.1", "zeta=0.9", "closed=2", "gamma=-0.1,alpha=4", "", "normalise=1"):
        with pytest.raises(ToolkitError, match="--softmax") as caught:
            parse_softmax(text, 512)
        assert "gamma=-0.003" in caught.value.fix


def test_a_gate_closes_where_the_first_key_gets_much():
    p = SoftmaxRule(closed_from=0.5)(torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0]]))
    assert not bool(p[0].any()) and torch.equal(p[1], torch.tensor([0.0, 4.0, 0.0]).softmax(-1))


def test_decoding_with_a_cache_is_consistent():
    model = tiny_model("llama")
    with torch.no_grad(), exchanged_softmax(model, SoftmaxRule(gamma=-0.02)):
        whole = model(IDS, use_cache=False).logits
        cache, rows = None, []
        for i in range(IDS.shape[1]):
            out = model(IDS[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache, rows = out.past_key_values, [*rows, out.logits]
    torch.testing.assert_close(torch.cat(rows, 1), whole, rtol=1e-4, atol=1e-4)


def scores(p: torch.Tensor, values: torch.Tensor) -> Scores:
    mask = torch.ones(p.shape[-2:]).tril().bool()
    a = p.clamp_min(1e-30).log().masked_fill(~mask, torch.finfo(torch.float32).min)
    return Scores(a, p, values, p @ values)


def causal(tokens: int) -> torch.Tensor:
    mask = torch.ones(tokens, tokens).tril()
    return mask / mask.sum(-1, keepdim=True)


def test_a_head_on_an_empty_first_token_does_nothing():
    tokens, width = 32, 8
    values = torch.randn(1, 3, tokens, width, generator=torch.Generator().manual_seed(3))
    sink = torch.zeros(tokens, tokens)
    sink[:, 0] = 1.0
    p = torch.stack([sink, causal(tokens), sink])[None]
    values[:, 0, 0] = 0  # head 0: the sink carries nothing; head 2: the same mass on a key that matters
    values[:, 2, 0] *= 1
    weight = torch.randn(16, 3 * width, generator=torch.Generator().manual_seed(4))
    probe = Probe(torch.zeros(1, tokens).bool(), torch.ones(1, tokens), head_projections(weight, 3))
    found = HeadStatistics()
    found.update(scores(p, values), probe)
    nothing, uniform, busy = found.records(0)
    assert nothing.first_mass == 1 and nothing.value_ratio == 0 and nothing.contribution == 0
    assert nothing.no_op_score == 1 and nothing.no_op_share == 1
    assert uniform.entropy == pytest.approx(1, abs=1e-5) and uniform.no_op_share == 0 and uniform.logit_range < 1e-5
    assert busy.first_mass == 1 and busy.value_ratio > 0.3 and busy.no_op_score == 0 and busy.no_op_share == 0
    expected = (busy_output := values[0, 2, 0]) @ weight[:, 2 * width :].T
    assert busy_output.any() and busy.contribution == pytest.approx(float(expected.norm()), rel=1e-4)


def test_values_of_zero_contribute_nothing_whatever_the_mass():
    tokens = 16
    values = torch.zeros(1, 1, tokens, 4)
    probe = Probe(torch.zeros(1, tokens).bool(), torch.ones(1, tokens), head_projections(torch.randn(8, 4), 1))
    found = HeadStatistics()
    found.update(scores(causal(tokens)[None, None], values), probe)
    assert found.records(0)[0].contribution == 0


def test_delimiters():
    assert all(map(is_delimiter, (".", " ,", "\n", "\n\n"))) and not any(map(is_delimiter, ("the", " ", "...", "a.")))
