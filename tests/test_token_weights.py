"""What calibration tokens count, and what few of them say of many: see docs/token_weights.md."""

from __future__ import annotations

import pytest
import torch
from test_statistics import CPU, DOWN, inputs_of, new_context, open_block

from calibration.model.watching import rows_of
from calibration.walk.statistics import Gram
from calibration.walk.token_weights import weights_by_norm
from ptq.numerics.gptq import gptq_round
from ptq.quantized import QuantizedTensor
from ptq.scheme import Grouping, QuantScheme, TensorQuant


def test_weights_by_norm_make_tokens_equally_long():
    """Every token's share of the Gram matrix's trace is the same, the median token's own is unchanged; a silent token
    gets a finite weight, and so do tokens of which none says anything."""
    x = torch.randn(101, 16, generator=torch.Generator().manual_seed(0))
    x[0] *= 1000
    lengths = (x.square().sum(1) * weights_by_norm(x)).double()
    assert torch.allclose(lengths, x.square().sum(1).median().double().expand(101), rtol=1e-5)
    x[1] = 0
    assert bool(torch.isfinite(weights_by_norm(x)).all())
    assert bool(torch.isfinite(weights_by_norm(torch.zeros(3, 4))).all())


def shrunk(matrix, tokens):
    """As if as many tokens as channels had come besides, without correlation."""
    return matrix + len(matrix) / tokens * torch.diag(matrix.diagonal())


def outputs_of(segment, states):
    """What the block returns, per batch, in float64 ``[tokens, hidden]``."""
    return [states.output(segment.module, segment.index, i).flatten(0, -2).double() for i in range(len(states.batches))]


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "linear", "by_output"),
    [
        ("llama", DOWN, True),
        ("llama", "self_attn.o_proj", False),  # writes to another stream than the block returns
        ("llama", "mlp.up_proj", False),
        ("gemma3", DOWN, False),  # a norm comes before the stream
        ("opt", "fc2", True),
    ],
)
def test_tokens_are_weighed_by_the_stream_that_a_linear_writes_to(family, linear, by_output, tmp_path):
    segment, states = open_block(family, tmp_path)
    found = new_context(segment, states, weights="norm").statistic(linear, Gram).matrix.double()
    x = inputs_of(segment, states, linear)
    inputs = x.split(32)  # two windows of 16 tokens

    def expected(vectors):
        weighed = [b * weights_by_norm(v).sqrt()[:, None] for b, v in zip(inputs, vectors, strict=True)]
        return shrunk(torch.cat(weighed).T @ torch.cat(weighed), len(x))

    mine, other = (outputs_of(segment, states), inputs)[:: 1 if by_output else -1]
    assert torch.allclose(found, expected(mine), rtol=1e-4, atol=1e-5 * float(found.max()))
    assert not torch.allclose(found, expected(other), rtol=1e-2)
    assert not torch.allclose(found, x.T @ x, rtol=1e-2)


@torch.no_grad()
def test_experts_weigh_the_tokens_that_they_got(tmp_path):
    segment, states = open_block("mixtral", tmp_path)
    linear = "block_sparse_moe.experts.1.w2"
    path = segment.architecture.module_name(linear)
    context = new_context(segment, states, weights="norm", allow_unseen=True)
    found = context.statistic(linear, Gram).matrix.double()
    expected, module, count = torch.zeros_like(found), segment.module.get_submodule(path), 0
    for i, stream in enumerate(outputs_of(segment, states)):
        seen = []
        handle = module.register_forward_pre_hook(lambda _, args, to=seen: to.append(args[0].double()))
        states.output(segment.module, segment.index, i)
        handle.remove()
        for x in seen:
            count += len(x)
            expected += (x * weights_by_norm(stream[rows_of(segment.module, path)])[:, None]).T @ x
    assert torch.allclose(found, shrunk(expected, count), rtol=1e-4, atol=1e-5 * float(found.max()))


def test_shrinking_helps_on_other_tokens_where_there_are_few():
    """From 96 tokens of 64 weakly correlated channels GPTQ makes a larger error on other tokens than from the shrunk
    matrix; with many tokens nothing changes."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(64) + torch.randn(64, 64, generator=generator) / 32
    w, quant = torch.randn(32, 64, generator=generator), TensorQuant(3, Grouping("group", 16), "sym_gptq")
    other = torch.randn(20000, 64, generator=generator) @ mix

    def loss(gram):
        rounded = gptq_round(w, gram.matrix, quant)
        q = QuantizedTensor(rounded.codes, rounded.scale, rounded.zero, QuantScheme(quant))
        return float(((q.dequantize() - w) @ other.T).square().mean())

    gains = []
    for tokens in (96, 20000):
        x = torch.randn(tokens, 64, generator=generator) @ mix
        plain, moved = Gram(64, CPU), Gram(64, CPU)
        for gram in (plain, moved):
            gram.update(x)
        moved.shrink()
        factor = 1 + 64 / tokens
        assert torch.allclose(moved.matrix.diagonal(), factor * plain.matrix.diagonal())
        assert torch.equal(moved.matrix.triu(1), plain.matrix.triu(1))
        gains.append(loss(moved) / loss(plain))
    assert gains[0] < 0.9 and gains[1] == pytest.approx(1, abs=0.03)
