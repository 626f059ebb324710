"""The oracles of AWQ: the searches against slow float64 code, and the pass on tiny models."""

from __future__ import annotations

import pytest
import torch
from test_statistics import inputs_of, new_context, open_block, scheme

from calibration.walk.segment import Segment
from ptq.methods import Awq, Gptq, Rtn
from ptq.numerics.awq import (
    candidate_scales,
    clip_bounds,
    duo_scales,
    normalize,
    relative_magnitude,
    sample_rows,
    scaled_error,
)
from ptq.numerics.integers import fake_quantize, grid_parameters, quantize
from ptq.numerics.objective import output_error
from ptq.scheme import QUANTIZERS, Grouping, TensorQuant

torch.set_num_threads(1)
ALPHAS = [i / 20 for i in range(20)]
QUANT = TensorQuant(3, Grouping("group", 16), "asym_zero_in")
FAMILIES = [  # with biases: llama-tied-bias, qwen2 (q/k/v), opt, gpt2; without: llama, opt-no-bias
    ("llama", {}),
    ("llama-tied-bias", {}),
    ("qwen2", {}),
    ("gemma2", {}),
    ("phi3", {}),
    ("opt", {}),
    ("opt", {"enable_bias": False}),
    ("gpt2", {}),
    ("mixtral", {}),
]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """W ``[12, 64]`` and X ``[300, 64]`` float64 whose channels differ in size, some by a lot."""
    x = randn(300, 64, seed=seed + 1) @ (torch.eye(64).double() + 0.1 * randn(64, 64, seed=seed + 2))
    return randn(12, 64, seed=seed), x * (1.2 * randn(64, seed=seed + 3)).exp()


@torch.no_grad()
def outputs(segment, states) -> torch.Tensor:
    segment.sync()
    run = [segment.module(b, *a[0], **a[1]) for b in states.batches for a in (states._calls[len(b)][segment.index],)]
    return torch.cat([y[0] if isinstance(y, tuple) else y for y in run])


def width_of(group, segment) -> int:
    heads = group.heads
    return heads.key_value * heads.width if heads else segment.weight(group.consumers[0]).shape[1]


@pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=[f + "".join(c) for f, c in FAMILIES])
def test_oracle_1_scaling_a_pair_preserves_the_block(family, changes, tmp_path):
    """1. Applying any positive s to a pair without quantizing preserves block output: rel. error <= 1e-5 in fp32, per
    pair type (norm->linears, v->o, up->down, fc1->ReLU->fc2), with and without biases."""
    segment, states = open_block(family, tmp_path, changes=changes)
    expected = outputs(segment, states)
    for i, group in enumerate(segment.spec.balance):
        before = segment.weight(group.consumers[0]).clone()
        segment.absorb(group, (0.7 * randn(width_of(group, segment), seed=i)).exp().float())
        assert not torch.allclose(segment.weight(group.consumers[0]), before, rtol=0.1)
        assert (outputs(segment, states) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("family", "changes"), [("gpt2", {}), ("opt", {"activation_function": "gelu"})])
def test_oracle_1_no_pair_across_other_activations(family, changes, tmp_path):
    """1. (wrapped activation) is not on offer: nothing is absorbed across a GELU, and the plan says so."""
    segment, _ = open_block(family, tmp_path, changes=changes)
    down = segment.spec.linears[-1]
    assert not any(down in group.consumers for group in segment.spec.balance)
    assert any(down in reason for reason in segment.spec.unbalanced)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_oracle_2_alpha_zero_is_rtn(family, tmp_path):
    """2. alpha=0, x-only: s == ones; weights after the round trip equal RTN exactly."""
    _, x = problem()
    assert (candidate_scales(x.abs().mean(0), [0.0])[0] == 1).all()
    plain, states = open_block(family, tmp_path, scheme=scheme())
    Rtn().apply(plain, new_context(plain, None, kinds=()))
    balanced, _ = open_block(family, tmp_path, scheme=scheme())
    context = new_context(balanced, states)
    for step in (Awq(grid=1, clip=False), Rtn()):
        step.apply(balanced, context)
    assert all(torch.equal(balanced.masters[n], plain.masters[n]) for n in plain.masters)
    assert all(n["awq.alpha"] == 0 for n in balanced.notes.values()) and balanced.notes


def test_oracle_3_search_is_never_worse_than_rtn():
    """3. Best searched loss <= loss at alpha=0 (x-only): alpha 0 is among the candidates, and the loss of each is
    ||(Q(W s)/s - W) X^T||^2. On uneven channels the best is much better."""
    for seed in range(3):
        w, x = problem(seed)
        scales = candidate_scales(x.abs().mean(0), ALPHAS)
        losses = [float(scaled_error(w, s, x.T @ x, QUANT)) for s in scales]
        direct = [float((x @ (fake_quantize(w * s, QUANT) / s - w).T).square().sum()) for s in scales]
        assert losses == pytest.approx(direct, rel=1e-5)
        assert min(losses) < 0.8 * losses[0]


def test_oracle_3_duo_may_be_worse_than_rtn():
    """3. With duo this need not hold: weights on their grid are exact for RTN and not after scaling."""
    codes = torch.randint(0, 8, (12, 4, 16), generator=torch.Generator().manual_seed(0)).double()
    codes[..., 0], codes[..., 1] = 0, 7
    w, x_mean = ((codes - 3) * 0.25).flatten(1), torch.ones(64, dtype=torch.float64)
    gram = torch.eye(64, dtype=torch.float64)
    assert all(float(scaled_error(w, s, gram, QUANT)) == 0 for s in candidate_scales(x_mean, ALPHAS))
    duo = duo_scales(x_mean, relative_magnitude(w, QUANT), ALPHAS)
    assert min(float(scaled_error(w, s, gram, QUANT)) for s in duo) > 0


def test_oracle_4_normalization():
    """4. max(s)*min(s) == 1 after normalisation; replacing X by c*X leaves s unchanged (no floor active)."""
    w, x = problem()
    x_mean, w_mean = x.abs().mean(0), relative_magnitude(w, QUANT)
    for s in (*candidate_scales(x_mean, ALPHAS), *duo_scales(x_mean, w_mean, ALPHAS), normalize(x_mean)):
        assert float(s.amax() * s.amin()) == pytest.approx(1, rel=1e-12)
    for c in (4.0, 0.3):
        for a, b in zip(candidate_scales(c * x_mean, ALPHAS), candidate_scales(x_mean, ALPHAS), strict=True):
            assert torch.allclose(a, b, rtol=1e-12)
    assert candidate_scales(x_mean, [0.5])[0].log().diff().sign().equal(x_mean.log().diff().sign())
    live = candidate_scales(torch.cat([x_mean, torch.zeros(2)]), [0.5])[0]  # channels that never fire change nothing
    assert torch.equal(live, torch.cat([candidate_scales(x_mean, [0.5])[0], torch.ones(2)]))


def test_sampled_rows_are_evenly_spaced():
    w = torch.arange(10.0)[:, None]
    for rows, step in ((0, 1), (10, 1), (5, 2), (4, 3)):
        assert sample_rows(w, rows).flatten().tolist() == list(range(0, 10, step))


def test_relative_magnitude_by_hand():
    w = torch.tensor([[1.0, -2.0, 0.0, 4.0], [3.0, 3.0, 5.0, -1.0]])
    expected = torch.tensor([0.5 + 1.0, 1.0 + 1.0, 0.0 + 1.0, 1.0 + 0.2]) / 2
    found = relative_magnitude(w, TensorQuant(4, Grouping("group", 2)))
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_oracle_5_scaling_rows_of_v(kind):
    """5. v->o: row-scaling v leaves v's integer codes and relative error unchanged (groups lie inside rows)."""
    v, quant = randn(16, 64), TensorQuant(4, Grouping("group", 16), kind)
    for c, exact in ((2.0 ** torch.randint(-4, 5, (16, 1)), False), (randn(16, 1, seed=1).exp(), True)):
        codes, errors = [], []
        for w in (v, v / c):
            units = w.unflatten(1, (-1, 16))
            s, z = grid_parameters(units, quant, exact_scale=exact)
            codes.append(quantize(units, s[..., None], None if z is None else z[..., None], quant))
            errors.append((fake_quantize(w, quant, exact_scale=exact) - w).abs() / w.abs())
        ends = (units.abs() == units.abs().amax(-1, keepdim=True)) & (kind == "sym_gptq")  # there they are ties
        assert torch.equal(codes[0][~ends], codes[1][~ends])
        assert torch.allclose(*errors, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_oracle_6_clip_search(kind):
    """6. Clip search: returned error <= error at c=c0 for every (row, group); with max_shrink=0 weights are unchanged.
    Every bound against a search over explicit inputs."""
    (w, x), quant = problem(), TensorQuant(3, Grouping("group", 16), kind)
    w[:, ::16] *= 3
    full = w.unflatten(1, (4, 16)).abs().amax(2)

    def error(bound):
        d = fake_quantize(w, quant, bound) - w
        return torch.stack([(x[:, i : i + 16] @ d[:, i : i + 16].T).square().sum(0) for i in range(0, 64, 16)], dim=1)

    found = clip_bounds(w, x.T @ x, quant, steps=10, shrink=0.5)
    table = torch.stack([error(full * (1 - 0.5 * i / 10)) for i in range(10)])
    assert torch.allclose(error(found), table.amin(0), rtol=1e-9)
    assert torch.equal(found, full * (1 - 0.5 * table.argmin(0).double() / 10))
    assert (error(found) <= table[0]).all() and error(found).sum() < 0.9 * table[0].sum()
    unchanged = clip_bounds(w, x.T @ x, quant, shrink=0.0)
    assert torch.equal(unchanged, full) and torch.equal(fake_quantize(w, quant, unchanged), fake_quantize(w, quant))


def test_oracle_7_grids_along_the_outputs_do_not_care():
    """7. Per-IC grouping commutes with s (Q_ic(W s)/s == Q_ic(W)): AWQ has no effect there, all alphas give the same
    loss."""
    (w, x), quant = problem(), TensorQuant(4, Grouping("channel"), "asym_zero_in")
    scales = candidate_scales(x.abs().mean(0), ALPHAS)
    q = [fake_quantize((w * s).T, quant, exact_scale=True).T / s for s in scales]
    losses = [float((x @ (v - w).T).square().sum()) for v in q]
    assert all(torch.allclose(v, q[0], rtol=1e-12, atol=0) for v in q)
    assert losses == pytest.approx([losses[0]] * 20, rel=1e-9) and losses[0] > 0


@torch.no_grad()
@pytest.mark.parametrize("duo", [False, True])
def test_oracle_8_searching_changes_nothing(duo, tmp_path, monkeypatch):
    """8. Running the search twice gives identical s and leaves weights bit-identical (catches the aliasing bug on CPU).
    Clipping bounds are found without touching weights either."""
    segment, states = open_block("llama", tmp_path, scheme=scheme(3))
    before = {n: m.clone() for n, m in segment.masters.items()}
    chosen: list[torch.Tensor] = []
    monkeypatch.setattr(Segment, "absorb", lambda self, g, s: (chosen.append(s), torch.ones(width_of(g, self)))[1])
    monkeypatch.setattr("calibration.walk.context.Context.rescale", lambda *args: None)
    for _ in range(2):
        Awq(duo=duo).apply(segment, new_context(segment, states))
    n = len(segment.spec.balance)
    assert len(chosen) == 2 * n and all(torch.equal(a, b) for a, b in zip(chosen[:n], chosen[n:], strict=True))
    assert any((s != 1).any() for s in chosen)
    assert all(torch.equal(m, before[n]) for n, m in segment.masters.items()) and segment.edits == 0
    assert set(segment.grids) == set(segment.spec.linears) - set(segment.spec.scores)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_oracle_9_routing_is_unchanged(family, tmp_path):
    """9. MoE: after norm->experts scaling with router compensation, top-k indices and gate values are unchanged."""
    segment, states = open_block(family, tmp_path)
    router = segment.module.get_submodule(segment.architecture.module_name(segment.spec.routers[0]))
    routes = []
    router.register_forward_hook(lambda _, args, out: routes.append(out))
    outputs(segment, states)
    group = next(g for g in segment.spec.balance if segment.spec.routers[0] in g.consumers)
    segment.absorb(group, randn(64).exp().float())
    outputs(segment, states)
    half = len(routes) // 2
    for (_, weights, index), (_, weights_after, index_after) in zip(routes[:half], routes[half:], strict=True):
        assert torch.equal(index, index_after)
        assert torch.allclose(weights, weights_after, rtol=0, atol=1e-5)


def test_oracle_10_shared_values_need_tied_scales(tmp_path):
    """10. GQA extension: tied s preserves attention output; untied s (different per query head) does not."""
    segment, states = open_block("llama", tmp_path)
    expected = outputs(segment, states)
    group = next(g for g in segment.spec.balance if g.kind == "value")
    assert group.heads.repeats == 2
    spread = segment.absorb(group, randn(width_of(group, segment)).exp().float())
    by_head = spread.view(group.heads.query, group.heads.width)
    assert torch.equal(by_head[0], by_head[1]) and not torch.equal(by_head[1], by_head[2])
    assert (outputs(segment, states) - expected).abs().max() <= 1e-5 * expected.abs().max()
    segment.set_weight(group.consumers[0], segment.weight(group.consumers[0]) / spread * spread.roll(16))
    assert (outputs(segment, states) - expected).abs().max() > 1e-2 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_pass_chooses_the_best_alpha_and_keeps_the_function(family, tmp_path):
    """Norm group by norm group the noted alpha is the best of a float64 search over explicit inputs; linears that stay
    float follow the scales; and nothing changes before rounding."""
    segment, states = open_block(family, tmp_path, scheme=scheme(3))
    segment.masters["post_attention_layernorm.weight"].mul_(randn(64).exp())
    segment._touch("post_attention_layernorm.weight", exact=True)
    left = segment.spec.balance[0].consumers[1]
    del segment.schemes[left]
    expected, best = outputs(segment, states), {}
    for group in (g for g in segment.spec.balance if g.kind == "norm"):
        members = [n for n in group.consumers if n in segment.schemes]
        x = {n: inputs_of(segment, states, n) for n in members}
        once = torch.cat([x[s.linears[-1]] for s in segment.spec.inputs if s.linears[-1] in members])
        quant, losses = scheme(3).weights, []
        for s in candidate_scales(once.abs().mean(0), ALPHAS):
            d = {n: fake_quantize(segment.weight(n).double() * s, quant) / s - segment.weight(n) for n in members}
            losses.append(sum(float((x[n] @ d[n].T).square().sum()) for n in members))
        best |= dict.fromkeys(members, ALPHAS[losses.index(min(losses))])
    Awq().apply(segment, new_context(segment, states))
    assert {n: segment.notes[n]["awq.alpha"] for n in best} == best and any(best.values())
    assert left not in segment.notes and left not in segment.grids and segment.edits == 0
    assert (outputs(segment, states) - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_awq_beats_rtn_and_gptq_goes_on_from_there(tmp_path):
    """Usefulness: summed relative output error at 3 bits, on a block whose channels differ in size."""
    errors = {}
    for passes in ((Rtn(),), (Awq(clip=False), Rtn()), (Awq(), Rtn()), (Gptq(),), (Awq(), Gptq())):
        segment, states = open_block("llama-mha", tmp_path, scheme=scheme(3))
        segment.masters["input_layernorm.weight"].mul_(randn(64).exp())
        segment._touch("input_layernorm.weight", exact=True)
        context = new_context(segment, states)
        for step in passes:
            step.apply(segment, context)
        assert set(segment.errors) == set(segment.spec.linears)
        errors["+".join(p.name + ("" if getattr(p, "clip", True) else "-") for p in passes)] = sum(
            e["output"] for e in segment.errors.values()
        )
    assert errors["awq+rtn"] < errors["awq-+rtn"] < errors["rtn"]
    assert errors["gptq"] < errors["rtn"] and errors["awq+gptq"] < errors["awq+rtn"]


def test_output_error_against_explicit_inputs():
    w, x = problem()
    changed = fake_quantize(w, QUANT)
    expected = float((x @ (changed - w).T).square().sum() / (x @ w.T).square().sum())
    assert output_error(w, changed, x.T @ x) == pytest.approx(expected, rel=1e-12)
    assert output_error(w, changed, torch.zeros(64, 64).double()) == 0
