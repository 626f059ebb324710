"""Sparse decoding in one call per step: the tokens of the layers that decode sparsely, and what is left to them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from runtime_layers import quantized
from test_runtime_decoding import family, level, watched
from test_sparse_decode import gate_sites, input_sites, linears
from transformers import DynamicCache

from calibration.architectures import resolve
from ptq.runtime.decoding.builder import LINEAR, Unsupported
from ptq.runtime.decoding.native import Op, run_step, set_mask, word_matrix
from ptq.runtime.decoding.stepper import Stepper, check_inputs
from ptq.runtime.generate import decode_tokens
from ptq.runtime.kernels.rows import ROWS
from ptq.runtime.linear import QuantLinear
from ptq.sparse.decoding import int4_layers
from sparsity.attach import attach, decode_modes
from sparsity.decode import MaskedLinear, Phase
from sparsity.kernels.int4 import Int4Rows
from sparsity.kernels.kernel import Mask
from sparsity.sites import Site

__all__ = ["level"]  # a fixture
PROMPT, STEPS = 9, 12


def scap(model, architecture) -> list[Site]:
    return [site for site in input_sites(model, architecture) if ".mlp." in site.linear]


def chess_qo(model, architecture) -> list[Site]:
    ends = ("q_proj", "o_proj")
    return gate_sites(model, architecture) + [s for s in input_sites(model, architecture) if s.linear.endswith(ends)]


KINDS = {"teal": input_sites, "scap": scap, "cats": gate_sites, "chess-qo": chess_qo}
"""Thresholds of one value and of one per channel, some around a center; other ones at every site."""


def sparse_model(kind: str, scheme: str | None = None, name: str = "llama", **more: object):
    """A model that decodes sparsely, with random codes where there is a scheme, and its `SparseDecoder`."""
    model, phase = family(name, intermediate_size=128, **more), Phase()
    architecture = resolve(model.config)
    sites = KINDS[kind](model, architecture)
    if scheme is not None:
        sites = [Site(s.linear, s.mode, s.threshold) for s in sites]  # shifts belong to the float weights
        modes = decode_modes(architecture, sites)
        build = int4_layers(modes, phase, torch.float32, torch.device("cpu"), None)
        for number, path in enumerate(linears(architecture)):
            q = quantized(scheme, *model.get_submodule(path).weight.shape, seed=number)
            q = dataclasses.replace(q, scale=q.scale * 4)  # so that what blocks add matters
            layer = build(path, q, None) or QuantLinear(q, None, torch.float32, "cpu", ROWS.name)
            model.set_submodule(path, layer)
    return model, attach(model, architecture, sites, phase)


def prompt(seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 96, (1, PROMPT), generator=torch.Generator().manual_seed(seed))


def steps(
    model, monkeypatch, *, taken_over: bool = True, agreed: tuple[bool, ...] = (True,), seed: int = 1
) -> list[int]:
    """Tokens, which must be those of the layers."""
    with monkeypatch.context() as patched:
        seen = watched(patched)
        expected = decode_tokens(model, prompt(seed), STEPS, fused=False)
        found = decode_tokens(model, prompt(seed), STEPS)
    assert found.one_call == taken_over and tuple(seen) == agreed and not expected.one_call
    assert found.tokens == expected.tokens
    return found.tokens


@pytest.mark.parametrize("scheme", [None, "w4a16-g32-asym", "w4a16-g64-sym", "w8a16-g32-asym"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_layers(level, kind, scheme, monkeypatch):
    model, decoder = sparse_model(kind, scheme)
    eight_bit_rows = scheme == "w8a16-g32-asym" and kind in ("cats", "chess-qo")
    known = {"taken_over": False, "agreed": ()} if eight_bit_rows else {}  # rows of up are all read
    if (kind, scheme) == ("teal", "w8a16-g32-asym"):
        known = {"seed": 2}  # in the other a value lies so near its threshold that the last digit of a sum decides
    sparse = steps(model, monkeypatch, **known)
    decoder.phase.masked = False
    assert steps(model, monkeypatch, seed=known.get("seed", 1)) != sparse, "the masks do something"


def test_other_families_and_windows(monkeypatch):
    for name, more in (("qwen3", {}), ("mistral", {"sliding_window": 8})):
        model, decoder = sparse_model("teal", name=name, **more)
        sparse = steps(model, monkeypatch)
        decoder.phase.masked = False
        assert steps(model, monkeypatch) != sparse


@pytest.mark.parametrize("scheme", [None, "w4a16-g64-sym"])
@pytest.mark.parametrize("kind", ["teal", "cats"])
def test_threads_share_the_outputs(kind, scheme):
    """To the last bit: what a thread makes does not hang on who makes the rest."""
    model, _ = sparse_model(kind, scheme)
    cache, logits, before = DynamicCache(config=model.config), [], torch.get_num_threads()
    try:
        with torch.inference_mode():
            model(prompt(), past_key_values=cache, use_cache=True)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                stepper = Stepper(model, cache, PROMPT, PROMPT + 3)
                logits.append(torch.stack([stepper(torch.tensor([[token]])).clone() for token in (5, 70, 33)]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("inputs", ["int15", "int8"])
@pytest.mark.parametrize("scheme", ["w4a16-g32-asym", "w4a16-g64-sym", "w4a16-g128-asym", "w4a16-gchannel-sym"])
@pytest.mark.parametrize(("columns", "rows", "threads"), [(256, 200, 2), (1280, 2200, 3)])
def test_products_of_the_inputs_in_use(level, scheme, inputs, columns, rows, threads):
    """Against float64: masks and centers by the plain inputs, which are rounded to 15 or 8 bits behind them. Some
    groups have no input in use, some hold values so large and of one sign that their products go beyond 16 bits."""
    q = quantized(scheme, rows, columns, seed=1)
    weight = Int4Rows.pack(q.codes, q.scale, q.zero, "input")
    x = torch.randn(columns) * torch.logspace(-1, 1, columns)
    mask = Mask(torch.rand(columns) * 0.4 + 0.1, torch.randn(columns) * 0.05)
    x[:64], x[64:128] = x[:64].abs() + 3, mask.center[64:128] + 0.05
    kept = torch.where((x - mask.center).abs() <= mask.threshold, 0.0, x - mask.center)
    cut = min(64, columns // q.scale.shape[1]) if inputs == "int8" else columns // q.scale.shape[1]
    most = kept.view(-1, cut).abs().amax(1, keepdim=True) / (127 if inputs == "int8" else 32512 / 2)
    bias = torch.randn(rows)
    matrix = word_matrix(weight, bias, inputs)
    set_mask(matrix, mask)
    op = Op(kind=LINEAR, source=0, target=columns, first=matrix, barrier=1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        work = torch.cat((x, torch.zeros(rows)))
        run_step((Op * 1)(op), work, 0)
    finally:
        torch.set_num_threads(before)
    exact, plain = q.dequantize(torch.float64), kept.double()
    allowed = (most / 2 * (kept.view(-1, cut) != 0)).flatten().double() @ exact.abs().T
    error = (work[columns:].double() - bias.double() - plain @ exact.T).abs()
    near = 3e-6 * (plain.abs() @ exact.abs().T) + 1e-5
    assert (error <= 1.01 * allowed + near).all(), (error / (allowed + near)).max()
    assert not kept[64:128].any() and kept[:64].all() and (inputs == "int15" or error.max() > 10 * near.max())


def test_nan_shows_in_sparse_steps(level):
    q = quantized("w4a16-g64-sym", 64, 128, seed=1)
    weight, x = Int4Rows.pack(q.codes, q.scale, q.zero, "input"), torch.ones(128)
    x[70] = torch.nan
    op = Op(kind=LINEAR, source=0, target=128, first=word_matrix(weight, None), barrier=1)
    work = torch.cat((x, torch.zeros(64)))
    run_step((Op * 1)(op), work, 0)
    assert work[128:].isnan().all()


def test_inputs_of_8_bits():
    """Asked for, they are what sparse steps round to as well."""
    model, _ = sparse_model("teal", "w4a16-g32-asym")
    check_inputs(model, "int8")
    found = decode_tokens(model, prompt(), STEPS, inputs="int8")
    assert found.one_call and len(found.tokens) == STEPS


def test_bfloat16_is_taken_over():
    """Which values are pruned hangs on rounding: dense steps are compared, and the thresholds stay on behind it."""
    model, decoder = sparse_model("teal")
    model.to(torch.bfloat16)
    for layer in decoder.linears.values():
        layer.weight_rows, layer.dtype = layer.weight_rows.to(torch.bfloat16), torch.bfloat16
    assert decode_tokens(model, prompt(), STEPS).one_call and decoder.phase.masked


def test_a_model_that_does_more_goes_on_by_itself(monkeypatch):
    """Granite multiplies what it adds to the residual stream; its window is passed, and its cache as before."""
    steps(
        sparse_model("teal", name="granite", residual_multiplier=0.5)[0], monkeypatch, taken_over=False, agreed=(False,)
    )


def refused(model, why: str) -> None:
    with pytest.raises(Unsupported, match=why):
        Stepper(model, DynamicCache(config=model.config), 0, 8)


def test_what_it_does_not_know_is_left_to_the_layers(monkeypatch):
    model, decoder = sparse_model("teal")
    decoder.phase.counting = True
    refused(model, "rows are being counted")
    assert not decode_tokens(model, prompt(), 4).one_call and decoder.bytes_skipped(3) > 0
    decoder.phase.counting = False
    decoder.linears["model.layers.1.mlp.up_proj"].phase = Phase()
    refused(model, "sparse layers of another model")
    model = family("llama")
    architecture = resolve(model.config)
    attach(model, architecture, input_sites(model, architecture), Phase(), "reference")
    refused(model, "sparse kernel 'reference'")
    model, decoder = sparse_model("cats")
    network = model.model.layers[0].mlp
    network.up = MaskedLinear(network.up, torch.zeros(1), None, decoder.phase)
    refused(model, "rows are all read")
    model, decoder = sparse_model("teal")
    decoder.linears["model.layers.0.mlp.up_proj"].mask.threshold.resize_(7)
    refused(model, "thresholds of another width")
    model, _ = sparse_model("teal")
    model.register_forward_pre_hook(lambda module, args: None)
    refused(model, "hooks, or another forward pass, in the model")
