"""The oracles of OutlierTune: shift and steps against slow code, and the pass on tiny models."""

from __future__ import annotations

import json

import pytest
import torch
from command import done, refused, text_file, tiny
from safetensors.torch import load_file
from test_oracles_awq import outputs, randn
from test_statistics import inputs_of, new_context, open_block
from tiny_runs import logits, plain_model

from calibration.architectures import resolve
from calibration.errors import ToolkitError
from calibration.record import read_record
from calibration.walk.context import Context
from calibration.walk.ranges import Midpoints
from ptq.activations import ActivationQuant
from ptq.formats.loadable import check_keys
from ptq.methods import OutlierTune
from ptq.methods.static_steps import take_shift
from ptq.numerics.activations import fake_quantize_inputs, quantize_inputs
from ptq.numerics.integers import dequantize, grid_parameters, quantize
from ptq.numerics.outliertune import channel_steps, covering_scale, shift_of
from ptq.numerics.smoothquant import smoothing_scales
from ptq.runtime.linear import QuantLinear
from ptq.runtime.load import load_model
from ptq.scheme import Grouping, TensorQuant, parse_scheme

torch.set_num_threads(1)
CPU = torch.device("cpu")
ROWS = TensorQuant(8, Grouping("channel"), "asym_zero_in")
STATIC8 = ActivationQuant(8, "int", "tensor", dynamic=False)
W8A8 = parse_scheme("w8a8-asym")


def problem(sequences: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W ``[24, 32]``, b ``[24]`` and X ``[sequences, 20, 32]`` float64 whose channels lie off zero."""
    x = randn(sequences, 20, 32, seed=1) * randn(32, seed=2).exp() + 3 * randn(32, seed=3)
    return randn(24, 32), randn(24, seed=4), x


def gathered(x: torch.Tensor) -> Midpoints:
    seen = Midpoints(x.shape[-1], CPU)
    for part in x.split(2):
        seen.update_sequences(part)
    return seen


def tuned(family, folder, scheme=W8A8, **changes):
    """A block before and after the pass, with the hidden states that enter it."""
    segment, states = open_block(family, folder, scheme=scheme, changes=changes)
    expected = outputs(segment, states)
    OutlierTune().apply(segment, new_context(segment, states, (Midpoints,)))
    return segment, states, expected


@torch.no_grad()
@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neox", "bloom", "falcon-7b", "falcon-rw", "llama", "mixtral"])
def test_oracle_1_the_block_is_unchanged(family, tmp_path):
    """1. Shift only: block output unchanged, rel. <= 1e-5 fp32 (with steps too; new biases: below)."""
    segment, states, expected = tuned(family, tmp_path)
    assert (outputs(segment, states) - expected).abs().max() <= 1e-5 * expected.abs().max() and segment.edits == 0
    fed = {n for g in segment.spec.balance if g.kind == "norm" for n in g.consumers} & set(segment.schemes)
    assert {n for n, s in segment.schemes.items() if not s.inputs.dynamic} == fed == set(segment.parts)
    shifted = {segment.notes[n]["outliertune.shifted"] for n in fed}
    assert shifted == ({"false"} if family in ("llama", "mixtral") else {"true"})
    for group in (g for g in segment.spec.balance if g.kind == "norm" and g.consumers[0] in fed):
        x = inputs_of(segment, states, group.consumers[0])
        assert x.abs().max() == pytest.approx(127, rel=1e-4)


def test_oracle_2_one_sequence_is_centred():
    """2. With n=1 sequence: after the shift max_t x_j == -min_t x_j, and absmax equals half the original range; hence
    m_j(after) <= m_j(before)."""
    *_, x = problem(1)
    seen = gathered(x)
    z = shift_of(seen.total, seen.sequences)
    low, high = torch.aminmax((x - z).flatten(0, 1), dim=0)
    assert torch.allclose(high, -low) and torch.allclose(high, (seen.high - seen.low) / 2)
    steps = channel_steps(seen.low, seen.high, z, 8)
    assert torch.allclose(steps * 127, high)
    assert (steps <= channel_steps(seen.low, seen.high, torch.zeros_like(z), 8) + 1e-12).all()


def test_oracle_3_migration_alone():
    """3. Migration only, no rounding: W' (x/s) + b == W x + b (1e-5)."""
    w, b, x = problem()
    seen = gathered(x)
    s = channel_steps(seen.low, seen.high, torch.zeros(32).double(), 8)
    assert torch.allclose((x / s) @ (w * s).T + b, x @ w.T + b, rtol=1e-10)


def test_oracle_4_integers_equal_the_float_path():
    """4. Integer equivalence: Q(W') xq + b computed in int32 with per-row weight scale equals the float path."""
    w, b, x = problem()
    seen = gathered(x)
    s = channel_steps(seen.low, seen.high, torch.zeros(32).double(), 8)
    scale, zero = grid_parameters((w * s).float(), ROWS)
    codes = quantize((w * s).float(), scale[:, None], zero[:, None], ROWS)
    rounded = dequantize(codes, scale[:, None], zero[:, None], ROWS)
    step = covering_scale(127.0, 8)
    xq, *_ = quantize_inputs((x / s).flatten(0, 1), STATIC8, step)
    integer = xq.to(torch.int32).long() @ (codes - zero[:, None]).to(torch.int32).long().T
    found = integer.double() * scale.double() + b
    expected = fake_quantize_inputs((x / s).flatten(0, 1).float(), STATIC8, step).double() @ rounded.double().T + b
    assert torch.allclose(found, expected, rtol=1e-6)


def test_oracle_5_is_smoothquant_with_alpha_1():
    """5. Equals SmoothQuant(alpha=1) + static per-tensor scale 1/qmax when z=0 and weights use the same quantizer
    (codes identical)."""
    w, _, x = problem()
    seen = gathered(x)
    steps = channel_steps(seen.low, seen.high, torch.zeros(32).double(), 8)
    s = smoothing_scales(x.abs().amax((0, 1)), w.abs().amax(0), 1.0)
    assert torch.allclose(s, steps * 127)
    mine, *_ = quantize_inputs(x / steps, STATIC8, torch.ones(1))
    theirs, *_ = quantize_inputs(x / s, STATIC8, torch.tensor([1 / 127]))
    assert (mine != theirs).double().mean() < 1e-3 and (mine - theirs).abs().max() <= 1  # ties in float32


@pytest.mark.parametrize("bits", [6, 8])
def test_oracles_6_and_7_nothing_is_clipped_and_everything_else_is(bits):
    """6. Calibration data itself is never clipped: |round(x/s)| <= qmax on the tokens used for m. 7. Clamp test: input
    at 10x m_j gives code qmax, not larger."""
    *_, x = problem()
    seen = gathered(x)
    z, top = shift_of(seen.total, seen.sequences), 2 ** (bits - 1) - 1
    s = channel_steps(seen.low, seen.high, z, bits)
    grid = ActivationQuant(bits, "int", "tensor", dynamic=False)
    codes = ((x - z) / s).round()
    assert codes.abs().max() == top
    beyond, *_ = quantize_inputs(10 * (x - z) / s, grid, covering_scale(float(top), bits))
    assert beyond.max() == top and beyond.min() == -top - 1


def test_the_scale_covers_what_rounded_gains_let_through():
    for largest in (127.0, 127.4, 126.2, 63.0, 31.1):
        scale = covering_scale(largest, 8)
        assert largest / float(scale) <= 127.001 and float(scale) <= largest / 127 * 1.016
        assert torch.equal(scale.bfloat16().half().float(), scale)
    assert covering_scale(127.0, 8) == 1


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_oracle_8_the_norm_emits_the_codes(dtype, tmp_path):
    """8. Folding 1/s in the norm gives the same codes as dividing after the norm (except ties at fp precision); and 6.
    through gains and biases that are stored in bfloat16."""
    segment, states = open_block("opt", tmp_path, scheme=W8A8)
    segment.stored_dtypes = dict.fromkeys(segment.stored_dtypes, dtype)
    for name in list(segment.masters):
        segment.replace(name, segment.masters[name].to(dtype).float())
    (q, *_), x = segment.spec.balance[0].consumers, inputs_of(segment, states, "self_attn.q_proj")
    context = new_context(segment, states, (Midpoints,))
    seen = context.statistic(q, Midpoints)
    z = shift_of(seen.total, seen.sequences)
    s = channel_steps(seen.low, seen.high, z, 8)
    OutlierTune().apply(segment, context)
    after = inputs_of(segment, states, q)
    codes, *_ = quantize_inputs(after, STATIC8, segment.parts[q]["input_scale"])
    assert (after / segment.parts[q]["input_scale"]).round().abs().max() <= 127
    if dtype == torch.float32:
        assert (codes != ((x - z) / s).round()).double().mean() < 0.01


@torch.no_grad()
def test_oracle_9_a_constant_channel_costs_nothing(tmp_path):
    """9. Constant channel: shift makes it exactly 0 and the output is exact even at 2 bits for that channel."""
    segment, states = open_block("opt", tmp_path, scheme=W8A8)
    segment.masters["self_attn_layer_norm.weight"][5] = 0
    segment.masters["self_attn_layer_norm.bias"][5] = 7.5
    for name in ("weight", "bias"):
        segment._touch(f"self_attn_layer_norm.{name}", exact=True)
    expected = outputs(segment, states)
    OutlierTune().apply(segment, new_context(segment, states, (Midpoints,)))
    assert (inputs_of(segment, states, "self_attn.q_proj")[:, 5] == 0).all()
    assert (outputs(segment, states) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("sequences", [1, 3, 7])
def test_oracle_10_the_mean_of_midpoints(sequences):
    """10. z from n sequences equals the mean of per-sequence midpoints, for any n (catches the hard-coded 512)."""
    *_, x = problem(sequences)
    seen = gathered(x)
    expected = torch.stack([(s.amax(0) + s.amin(0)) / 2 for s in x]).mean(0)
    assert torch.allclose(shift_of(seen.total, seen.sequences), expected) and seen.tokens == 20 * sequences
    s = randn(32, seed=9).exp()
    seen.rescale(s)
    assert torch.allclose(shift_of(seen.total, seen.sequences), expected / s)


@torch.no_grad()
@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_sequences_are_told_apart_in_the_model(family, tmp_path):
    """OPT flattens the batch in front of fc1; each sequence still has a midpoint of its own."""
    segment, states = open_block(family, tmp_path)
    linear = segment.spec.inputs[2].linears[0]
    seen = new_context(segment, states, (Midpoints,)).statistic(linear, Midpoints)
    x = inputs_of(segment, states, linear).view(5, 16, -1)
    expected = torch.stack([(s.amax(0) + s.amin(0)) / 2 for s in x]).sum(0)
    assert seen.sequences == 5 and torch.allclose(seen.total.double(), expected, atol=1e-5)


@torch.no_grad()
def test_other_statistics_are_gathered_again(tmp_path):
    """GPTQ behind OutlierTune sees the shifted inputs."""
    from calibration.walk.statistics import Gram

    segment, states = open_block("opt", tmp_path, scheme=W8A8)
    context: Context = new_context(segment, states, (Midpoints, Gram))
    context.statistic("fc1", Gram)
    OutlierTune().apply(segment, context)
    x = inputs_of(segment, states, "fc1")
    assert torch.allclose(context.statistic("fc1", Gram).matrix.double(), x.T @ x, rtol=1e-4, atol=1.0)


@torch.no_grad()
def test_a_shift_is_one_definition(tmp_path):
    """What the norm loses is what the biases get, to the last bit of a bfloat16 bias."""
    segment, states = open_block("opt", tmp_path)
    segment.stored_dtypes = dict.fromkeys(segment.stored_dtypes, torch.bfloat16)
    expected = outputs(segment, states)
    group = segment.spec.balance[0]
    wanted = randn(64).float()
    taken = take_shift(segment, group, wanted)
    assert not torch.equal(taken, wanted) and torch.allclose(taken, wanted, atol=0.05)
    bias = segment.masters[f"{group.producer}.bias"]
    assert torch.equal(bias.bfloat16().float(), bias)
    assert (outputs(segment, states) - expected).abs().max() <= 1e-5 * expected.abs().max()


SMALL = ("--samples", "4", "--seq-len", "24")


@pytest.mark.parametrize(
    ("family", "changes", "switch", "new"),
    [
        ("falcon-40b", {}, "bias", 8),
        ("falcon-7b", {"bias": False}, "bias", 8),
        ("opt", {"enable_bias": False}, "enable_bias", 12),
        ("gpt_neox", {"attention_bias": False}, "attention_bias", 4),
    ],
)
@pytest.mark.parametrize("method", ["outliertune", "outliertune+gptq"])
def test_new_biases_are_switched_on_in_the_config(family, changes, switch, new, method, tmp_path):
    """Families without biases: config.json says so, siblings are zeros, and the model is the old one up to rounding."""
    text_file(tmp_path / "text.txt")
    tiny(tmp_path / "float", family, **changes)
    words = ["--method", method, "--dataset", tmp_path / "text.txt", *SMALL, "--scheme", "w8a8-asym"]
    done("quantize", tmp_path / "float", *words, "--out", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("float", "out"))
    made = [n for n in after if n.endswith(".bias") and n not in before]
    assert config[switch] is True and len(made) == new
    untouched = [n for n in made if any(part in n for part in ("dense.", "4h_to_h", "out_proj", "fc2"))]
    assert all((after[n] == 0).all() for n in untouched) and any((after[n] != 0).any() for n in made)
    expected = logits(plain_model(tmp_path / "float"))
    loaded = load_model(tmp_path / "out", dtype=torch.float32, kernel="reference").model
    for module in loaded.modules():
        if isinstance(module, QuantLinear):
            module._simulated = False  # inputs as they are: these ids lie beyond the few calibration windows
    found = logits(loaded)
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert any(r.scheme.endswith("astatic") for r in read_record(tmp_path / "out").linears)


def test_a_tensor_that_a_class_lacks_stops_the_run(tmp_path, monkeypatch):
    """Without the entry in config.json the new biases would be dropped with a warning: the check refuses that."""
    text_file(tmp_path / "text.txt")
    tiny(tmp_path / "float", "falcon-40b")
    words = ["--method", "outliertune", "--dataset", tmp_path / "text.txt", *SMALL]
    monkeypatch.setattr("ptq.run.pipeline.check_keys", lambda *_: None)
    done("quantize", tmp_path / "float", *words, "--out", tmp_path / "out")
    path = tmp_path / "out/config.json"
    source = load_file(tmp_path / "float/model.safetensors")
    check_keys(tmp_path / "out", source)
    path.write_text(json.dumps({**json.loads(path.read_text()), "bias": False}))
    with pytest.raises(ToolkitError, match="has no place in the model class"):
        check_keys(tmp_path / "out", source)
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 3, "bias": True}))
    with pytest.raises(ToolkitError, match="counts 3 layers, the checkpoint stores 2"):
        check_keys(tmp_path / "out", source)


def test_refusals_and_remarks(tmp_path):
    tiny(tmp_path / "float")
    words = ["quantize", tmp_path / "float", "--method", "outliertune", "--dry-run"]
    assert "no integer inputs" in refused(*words, "--scheme", "w8a16-gchannel")
    assert "norms without a bias cannot shift" in done(*words, "--format", "native")
    assert resolve(plain_model(tmp_path / "float").config).bias_switches == {}
