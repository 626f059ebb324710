"""Statistics of one block: accumulators against direct computation, and what `Context` gathers when."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from test_exactness import load_whole, open_blocks
from tiny_models import save_tiny

from calibration.errors import ToolkitError
from calibration.progress import Silent
from calibration.text.crops import TokenBatches
from calibration.walk import lanes
from calibration.walk.context import Context
from calibration.walk.passes import forwards_per_block
from calibration.walk.states import HiddenStates
from calibration.walk.statistics import AbsMean, CrossGram, Gram, Mean
from calibration.walk.walk import Walk
from ptq.methods import Awq, Gptq, Rtn
from ptq.scheme import Grouping, QuantScheme, TensorQuant

torch.set_num_threads(1)
CPU = torch.device("cpu")
Q, K, V, OUT = (f"self_attn.{c}_proj" for c in "qkvo")
DOWN = "mlp.down_proj"


def tokens(n: int = 5, length: int = 16) -> TokenBatches:
    return TokenBatches(torch.randint(0, 96, (n, length), generator=torch.Generator().manual_seed(5)), {})


@torch.no_grad()
def open_block(family, folder, *, dtype=torch.float32, scheme=None, data=None, changes=None, index=0):
    """One block of a tiny model, ready for passes: its segment and the hidden states that enter block 0."""
    blocks = open_blocks(save_tiny(family, folder, **(changes or {})), dtype)
    blocks = replace(blocks, master_dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    segment = load_whole(blocks)[index]
    if scheme is not None:
        segment.schemes = dict.fromkeys(segment.spec.linears, scheme)
    return segment, HiddenStates.from_tokens(blocks.skeleton, data or tokens(), batch_size=2)


def new_context(segment, states, kinds=(Gram, AbsMean), propagate=False, allow_unseen=False, log=None, weights="none"):
    log = log if log is not None else []
    return Context(segment, states, kinds, propagate, allow_unseen, log.append, token_weights=weights)


def inputs_of(segment, states, linear):
    """Everything that enters a linear, in float64 ``[tokens, in]``, with the block as it is now."""
    segment.sync()
    seen = []
    module = segment.module.get_submodule(segment.architecture.module_name(linear))
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).double()))
    states.run(segment.module, segment.index, keep=False, advance=lambda _: None)
    handle.remove()
    return torch.cat(seen)


def scheme(bits: int = 4, group: int = 16, kind: str = "sym_gptq") -> QuantScheme:
    return QuantScheme(TensorQuant(bits, Grouping("group", group), kind))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_streaming_equals_direct_computation(dtype):
    """Batches of uneven size add up to X^T X and mean |X|, to the precision of the sums; bfloat16 also rounds every
    batch's product once, by at most 2^-8."""
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(n, 24, generator=generator) + 0.5).to(dtype) for n in (1, 7, 64, 300)]
    gram, mean = Gram(24, CPU), AbsMean(24, CPU)
    for x in batches:
        gram.update(x)
        mean.update(x)
    exact = torch.cat(batches).double()
    expected = exact.T @ exact
    allowed = (1e-14 if dtype == torch.float64 else 1e-6) * (exact.abs().T @ exact.abs())
    if dtype == torch.bfloat16:
        allowed += 2**-8 * sum((x.double().T @ x.double()).abs() for x in batches)
    assert ((gram.matrix.double() - expected).abs() <= allowed).all()
    assert gram.matrix.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(mean.mean().double(), exact.abs().mean(0), rtol=1e-6)
    assert gram.tokens == mean.tokens == len(exact)
    assert gram.finite() and mean.finite()


def test_float16_outliers_do_not_overflow():
    gram, mean = Gram(2, CPU), AbsMean(2, CPU)
    for statistic in (gram, mean):
        statistic.update(torch.full((100, 2), 6e4, dtype=torch.float16))
        assert statistic.finite()
    assert torch.allclose(gram.matrix, torch.full((2, 2), 100 * 6e4**2), rtol=1e-6)


def test_rescale_is_a_closed_form():
    """Dividing the input by s afterwards equals having seen X / s; no token was seen: zeros."""
    generator = torch.Generator().manual_seed(0)
    x, s = torch.randn(50, 8, generator=generator).double(), torch.rand(8, generator=generator) + 0.1
    for kind, read in ((Gram, lambda g: g.matrix), (AbsMean, lambda a: a.mean())):
        rescaled, fresh = kind(8, CPU), kind(8, CPU)
        rescaled.update(x)
        rescaled.rescale(s)
        fresh.update(x / s)
        assert torch.allclose(read(rescaled), read(fresh), rtol=1e-6)
        assert rescaled.tokens == 50 and (read(kind(8, CPU)) == 0).all()


def test_a_token_of_weight_two_counts_twice():
    """Sums over tokens with weights 2, 1 and 0 are those of the tokens repeated so often; rescaling stays exact."""
    generator = torch.Generator().manual_seed(0)
    x, s = torch.randn(30, 8, generator=generator), torch.rand(8, generator=generator) + 0.1
    weight = torch.tensor([2.0, 1.0, 0.0]).repeat(10)
    repeated = x.repeat_interleave(weight.long(), dim=0)
    for kind, read in ((Gram, lambda g: g.matrix), (Mean, lambda m: m.mean()), (AbsMean, lambda a: a.mean())):
        weighed, counted = kind(8, CPU), kind(8, CPU)
        weighed.update(x, weight)
        weighed.rescale(s)
        counted.update(repeated / s)
        assert torch.allclose(read(weighed), read(counted), rtol=1e-4, atol=1e-6)
        assert weighed.tokens == 30


@pytest.mark.parametrize("kind", [Gram, AbsMean])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_value_is_found(kind, bad):
    statistic = kind(8, CPU)
    x = torch.ones(4, 8)
    x[2, 5] = bad
    statistic.update(x)
    assert not statistic.finite()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_every_input_against_hooks(family, tmp_path):
    """Every linear's Gram and mean equal those of the tensor that enters it."""
    segment, states = open_block(family, tmp_path)
    context = new_context(segment, states)
    with torch.no_grad():
        for linear in segment.spec.linears:
            x = inputs_of(segment, states, linear)
            gram, mean = context.statistic(linear, Gram), context.statistic(linear, AbsMean)
            assert gram.tokens == mean.tokens == len(x) > 0
            assert torch.allclose(gram.matrix.double(), x.T @ x, rtol=1e-5, atol=1e-5 * float(gram.matrix.max()))
            assert torch.allclose(mean.mean().double(), x.abs().mean(0), rtol=1e-5)
    assert context.forwards == 1


@torch.no_grad()
def test_one_forward_serves_everything(tmp_path):
    """q/k/v share one object; all kinds and inputs come from one forward; its batches reach the progress display."""
    segment, states = open_block("llama", tmp_path)
    log: list[str] = []
    context = new_context(segment, states, log=log)
    assert context.forwards == 0 and context.has(Gram)
    grams = [context.statistic(name, Gram) for name in (Q, K, V)]
    assert grams[0] is grams[1] is grams[2] is not context.statistic(OUT, Gram)
    assert context.statistic(Q, AbsMean) is context.statistic(V, AbsMean)
    assert context.statistic(DOWN, AbsMean).tokens == 5 * 16
    assert context.forwards == 1 and log == ["forward"] * 3
    assert not new_context(segment, states, kinds=(Gram,)).has(AbsMean)
    with pytest.raises(AssertionError, match="AbsMean without declaring"):
        new_context(segment, states, kinds=(Gram,)).statistic(Q, AbsMean)


@torch.no_grad()
def test_gathering_on_a_float_stream_propagates(tmp_path):
    """With ``propagate`` the states become the block's outputs, once and before any edit; otherwise they stay."""
    segment, states = open_block("llama", tmp_path)
    before = [b.clone() for b in states.batches]
    new_context(segment, states).statistic(Q, Gram)
    assert all(torch.equal(a, b) for a, b in zip(states.batches, before, strict=True))
    context = new_context(segment, states, propagate=True)
    context.statistic(Q, Gram)
    after = [b.clone() for b in states.batches]
    states.batches = before
    states.run(segment.module, 0, keep=True, advance=lambda _: None)
    assert all(torch.equal(a, b) for a, b in zip(after, states.batches, strict=True))
    with pytest.raises(AssertionError, match="collected once"):
        context.refresh(0, Gram)
    segment.set_weight(Q, segment.weight(Q) * 2)
    with pytest.raises(AssertionError, match="before any edit"):
        new_context(segment, states, propagate=True).statistic(Q, Gram)


@torch.no_grad()
def test_exact_edits_keep_statistics_valid(tmp_path):
    """After a balance and its rescale, gathered statistics are those of the edited block, without a forward."""
    segment, states = open_block("llama", tmp_path)
    context = new_context(segment, states)
    context.statistic(Q, Gram)
    for group in segment.spec.balance:
        n = group.heads.key_value * group.heads.width if group.heads else segment.weight(group.consumers[0]).shape[1]
        s = torch.randn(n, generator=torch.Generator().manual_seed(1)).exp()
        context.rescale(group.consumers, segment.absorb(group, s))
    assert segment.edits == 0 and context.forwards == 1
    fresh = new_context(segment, states)
    for name in (Q, OUT, "mlp.up_proj", DOWN):
        a, b = context.statistic(name, Gram).matrix, fresh.statistic(name, Gram).matrix
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.diagonal().max()))
        assert torch.allclose(context.statistic(name, AbsMean).mean(), fresh.statistic(name, AbsMean).mean(), rtol=1e-4)


@torch.no_grad()
def test_other_edits_make_statistics_stale_until_refreshed(tmp_path):
    """An inexact edit is counted and changes nothing that was gathered; `refresh` gathers one stage and one kind."""
    segment, states = open_block("llama", tmp_path)
    context = new_context(segment, states)
    old = {name: context.statistic(name, Gram) for name in (Q, OUT, DOWN)}
    old_mean = context.statistic(OUT, AbsMean)
    segment.set_weight(V, 2 * segment.weight(V), exact=True)
    assert segment.edits == 0
    segment.set_weight(V, 1.5 * segment.weight(V))
    assert segment.edits == 1 and context.forwards == 1
    kept = old[OUT].matrix.clone()
    assert context.statistic(OUT, Gram) is old[OUT] and torch.equal(old[OUT].matrix, kept)
    context.refresh(1, Gram)
    assert context.forwards == 2
    assert torch.allclose(context.statistic(OUT, Gram).matrix, 9 * kept, rtol=1e-4, atol=1e-5 * float(kept.max()))
    assert context.statistic(Q, Gram) is old[Q] and context.statistic(DOWN, Gram) is old[DOWN]
    assert context.statistic(OUT, AbsMean) is old_mean


@torch.no_grad()
def test_product_gram_follows_the_forward_dtype(tmp_path):
    segment, states = open_block("llama", tmp_path, dtype=torch.bfloat16)
    context = new_context(segment, states)
    product, gram = context.product_gram(Q), context.statistic(Q, Gram).matrix
    assert product.dtype == torch.bfloat16 and torch.equal(product, gram.bfloat16())
    assert context.product_gram(K) is product
    context.rescale([Q], torch.full((64,), 2.0))
    assert torch.equal(context.product_gram(Q), product / 4)
    wide, wide_states = open_block("llama", tmp_path / "wide")
    context = new_context(wide, wide_states)
    assert context.product_gram(Q) is context.statistic(Q, Gram).matrix


@torch.no_grad()
def test_bad_inputs_are_an_error_that_names_the_layer(tmp_path):
    segment, states = open_block("llama", tmp_path, index=1)
    states.batches[1][0, 3, 5] = torch.nan
    with pytest.raises(ToolkitError, match=r"model\.layers\.1\.self_attn\.q_proj: NaN or Inf") as caught:
        new_context(segment, states).statistic(Q, Gram)
    assert "--dtype float32" in caught.value.fix


@torch.no_grad()
def test_experts_without_tokens(tmp_path):
    """Two tokens with two experts each leave four of eight without data: an error by name, or rounding without data."""
    few = TokenBatches(torch.tensor([[1, 2]]), {})
    open_expert = {"scheme": scheme(), "data": few, "changes": {"num_local_experts": 8}}
    segment, states = open_block("mixtral", tmp_path, **open_expert)
    with pytest.raises(ToolkitError, match=r"model\.layers\.0\.block_sparse_moe\.experts\.\d\.w1.*no calibration") as e:
        new_context(segment, states).statistic(Q, Gram)
    assert "--unseen-experts rtn" in e.value.fix
    context = new_context(segment, states, allow_unseen=True)
    unseen = [n for n in segment.spec.linears if context.statistic(n, Gram).tokens == 0]
    assert len(unseen) >= 12 and not any(context.statistic(n, Gram).matrix.any() for n in unseen)
    Awq().apply(segment, context)
    Gptq().apply(segment, context)
    assert set(segment.quantized) == set(segment.spec.linears)
    assert all(("gptq" in segment.notes.get(n, {})) == (n in unseen) for n in segment.spec.linears)
    assert all(torch.isfinite(m).all() for m in segment.masters.values())


RECIPES = {
    "rtn": ((Rtn(),), 0, 0),
    "awq": ((Awq(grid=2, clip_steps=2), Rtn()), 1, 1),
    "gptq": ((Gptq(),), 1, 2),
    "awq+gptq": ((Awq(grid=2, clip_steps=2), Gptq(true_sequential=True)), 4, 5),
}


@pytest.mark.parametrize("name", RECIPES)
def test_forwards_are_counted(name, tmp_path, monkeypatch):
    """What the plan announces is what the first block runs, and what its record says it gathered."""
    passes, gathered, total = RECIPES[name]
    calls = []
    output = HiddenStates.output
    monkeypatch.setattr(HiddenStates, "output", lambda self, b, i, *a: (calls.append(i), output(self, b, i, *a))[1])
    blocks = open_blocks(save_tiny("llama", tmp_path), torch.float32)
    schemes = [dict.fromkeys(blocks.skeleton.spec.block(i).linears, scheme()) for i in range(len(blocks))]
    walk = Walk(
        replace(blocks, passes=passes, schemes=schemes.__getitem__),
        encode=lambda segment: {segment.full_name(n): t.clone() for n, t in segment.masters.items()},
        restore=lambda tensors, schemes, dtype: dict(tensors),
        folder=tmp_path / "blocks",
    )
    walk.run(tokens() if gathered else None, Silent())
    batches = len(list(tokens().batches(blocks.batch_size)))
    assert forwards_per_block(passes) == total and calls.count(0) == total * batches
    assert calls.count(1) == gathered * batches  # nothing follows the last block
    assert [json.loads(walk.finished.record_path(i).read_text())["forwards"] for i in (0, 1)] == [gathered, gathered]


@pytest.mark.parametrize("kind", [Gram, CrossGram])
def test_products_that_nothing_was_added_to_are_zeros_without_memory(kind):
    empty, seen = (kind(1000, torch.device("cpu")) for _ in range(2))
    assert empty.matrix.shape == (1000, 1000) and empty.matrix.untyped_storage().nbytes() == 4
    empty.rescale(torch.full((1000,), 2.0))
    assert empty.finite() and not empty.matrix.any()
    x = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        seen.update(x) if kind is Gram else seen.update_pair(x, 2 * x)
    for total, other in ((empty, seen), (seen, kind(1000, torch.device("cpu")))):
        lanes.merge(total, other)
        torch.testing.assert_close(total.matrix, 2 * x.T @ x)
        assert total.tokens == 6
