"""The oracles of PTQ1.61, from the mask to whole runs, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import done, refused, run_ptq, text_file, tiny
from runtime_layers import inputs
from safetensors.torch import load_file
from test_statistics import new_context, open_block, tokens
from tiny_runs import assert_close, logits, tiny_checkpoint

from calibration.record import read_record
from calibration.walk.context import Context
from calibration.walk.statistics import AbsMax
from ptq.formats.native import Native
from ptq.methods import Ptq161
from ptq.methods.ptq161 import SALIENT, MixedLinear
from ptq.methods.rtn import round_to_nearest
from ptq.numerics.binary import (
    SALIENT_BITS,
    binary_start,
    binary_weight,
    block_loss,
    pack_mask,
    salient_mask,
    signs,
    unpack_mask,
)
from ptq.planning.job import prepare
from ptq.quantized import QuantizedTensor
from ptq.runtime.linear import QuantLinear
from ptq.runtime.load import load_model
from ptq.scheme import QuantScheme, parse_scheme

torch.set_num_threads(1)
WORDS = ("--samples", "6", "--seq-len", "24", "--scheme", "w1a16-salient20")
SCHEME = parse_scheme("w1a16-salient20")
EPOCHS = '[[pass]]\nname = "ptq1.61"\nepochs = 2\n'


def published_bits(out_features: int, in_features: int, salient: float, vectors: int) -> float:
    """Bits per weight of the method's own accounting: codes, mask, and ``vectors`` 16-bit numbers per matrix."""
    weights = out_features * in_features
    return 1 + (SALIENT_BITS - 1) * salient + 1 / out_features + 16 * vectors / weights


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixed(percent: int = 20, out: int = 12, columns: int = 50) -> tuple[torch.Tensor, torch.Tensor, MixedLinear]:
    w, peaks = randn(0, out, columns) + 0.1, randn(1, columns).abs()
    return w, peaks, MixedLinear.start(w, peaks, parse_scheme(f"w1a16-salient{percent}"))


def stored(linear: MixedLinear) -> QuantizedTensor:
    with torch.no_grad():
        linear.row.mul_(1 + 0.1 * randn(2, *linear.row.shape))
        linear.column.mul_(1 + 0.1 * randn(3, *linear.column.shape))
    return linear.finish()


def test_mask():
    act = randn(4, 101).abs()
    mask = salient_mask(act, SCHEME.weights.salient_count(101))
    assert int(mask.sum()) == int(0.2 * 101) + 1 and mask[act.argmax()] and act[mask].min() > act[~mask].max()
    assert int(salient_mask(torch.zeros(10), 3).sum()) == 3, "a channel that saw nothing does not take all"
    for n in (1, 7, 8, 9, 101):
        m = randn(n, n) > 0
        assert torch.equal(unpack_mask(pack_mask(m), n), m)


def test_all_salient_is_plain_4_bit_rounding_and_none_is_the_sign():
    w, _, full = mixed(100)
    assert bool(full.mask.all())
    plain = round_to_nearest(w, QuantScheme(SALIENT)).dequantize()
    assert torch.equal(full.weight().detach(), plain) and torch.equal(full.finish().dequantize(), plain)
    w, _, none = mixed(0)
    assert not none.mask.any()
    none.mean = torch.zeros_like(none.mean)
    none.sign = signs(w, none.mean)
    expected = w.abs().mean(dim=1, keepdim=True) * w.sign()
    assert torch.allclose(none.weight().detach(), expected)


def test_the_start_is_the_best_scale_of_signs():
    w = randn(5, 6, 40)
    mask = torch.zeros(40, dtype=torch.bool)
    scale, _ = binary_start(w, mask)
    error = [(w - f * scale * signs(w, torch.zeros(6, 1))).square().sum(dim=1) for f in (0.99, 1.0, 1.01)]
    assert (error[0] > error[1]).all() and (error[2] > error[1]).all()
    dead = binary_start(torch.zeros(2, 40), mask)
    assert not dead[0].any() and not dead[1].any()


def test_two_values_per_row_and_one_gauge():
    _, _, linear = mixed()
    with torch.no_grad():
        linear.row.mul_(1 + 0.1 * randn(6, *linear.row.shape))
    values = linear.weight().detach()[:, ~linear.mask]
    pair = torch.cat([linear.row * (linear.mean + s * linear.scale) for s in (-1, 1)], dim=1).detach()
    assert all(set(row.tolist()) == set(p.tolist()) for row, p in zip(values, pair, strict=True))
    args = (linear.sign, linear.scale, linear.mean)
    weights = [binary_weight(*args, f * linear.row, linear.column / f) for f in (1, 3)]
    assert torch.allclose(*weights)


def test_loss():
    y, other = randn(7, 2, 9, 16), randn(8, 2, 9, 16)
    assert abs(float(block_loss(y, y, y))) < 1e-6
    assert float(block_loss(y, y, 2 * y)) == pytest.approx(2 * float(y.square().mean()), rel=1e-5)
    assert block_loss(y, other, y) > 1


def test_bits_of_the_method_and_of_the_file():
    n = 4096
    assert published_bits(n, n, 0.2, 3 * n + n // 5) == pytest.approx(1.6127, abs=1e-4)
    assert published_bits(n, n, 0.2, 5 * n + n) == pytest.approx(1.6237, abs=1e-4)
    ours = SCHEME.bits_per_weight(n, n) + Ptq161().part_bits(n, n) / n**2
    exact = published_bits(n, n, 820 / n, 4 * n) + 4 / n  # one step, two row vectors, one column; 4-bit zero points
    assert exact <= ours <= exact + 2 * 31 / n, "each kind of code fills the last word of a row"
    for shape in ((12, 50), (64, 96), (33, 129)):
        _, _, linear = mixed(20, *shape)
        q = stored(linear)
        size = 8 * sum(t.nbytes for t in Native().encode(q, torch.float32).values())
        counted = SCHEME.bits_per_weight(*shape) * q.codes.numel() + Ptq161().part_bits(*shape)
        assert 0 <= size - counted < 32, "zero points fill their last word"


@pytest.mark.parametrize("shape", [(12, 50), (64, 96), (5, 31)])
@pytest.mark.parametrize("percent", [0, 20, 100])
def test_stored_tensors_give_the_same_weight(shape, percent):
    q = stored(mixed(percent, *shape)[2])
    native = Native()
    back = native.decode(native.encode(q, torch.float32), q.scheme, q.shape)
    assert torch.equal(back.codes, q.codes) and torch.equal(back.zero, q.zero)
    assert torch.equal(back.dequantize(), q.dequantize())
    assert QuantScheme.from_json(q.scheme.to_json()) == q.scheme == parse_scheme(str(q.scheme))


def test_product_from_packed_parts_and_from_the_runtime():
    _, _, linear = mixed(20, 24, 64)
    q, x = stored(linear), inputs(3, 7, 64, dtype=torch.float32)
    dense = x @ q.dequantize().T
    mask = unpack_mask(q.parts["salient"], 64)
    scale, mean, column = (q.parts[n].float() for n in ("binary_scale", "binary_mean", "column_scale"))
    four = (q.codes[:, mask].float() - q.zero.float()) * q.scale
    rest, sign = x[..., ~mask] * column[~mask], 2 * q.codes[:, ~mask].float() - 1
    y = x[..., mask] @ four.T + (rest @ sign.T) * scale + rest.sum(-1, keepdim=True) * mean
    assert (y - dense).abs().max() <= 1e-5 * dense.abs().max()
    layer = QuantLinear(q, None, torch.float32)
    assert layer.kernel == "reference" and (layer(x) - dense).abs().max() <= 1e-5 * dense.abs().max()
    half = QuantLinear(q, None, torch.bfloat16)
    assert half.kernel == "reference" and "one-bit" in " ".join(half.reasons.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_training_changes_scales_alone_and_lowers_the_loss(family, tmp_path):
    segment, states = open_block(family, tmp_path, scheme=SCHEME, data=tokens(12, 24))
    reference = states.copy()
    with torch.no_grad():
        reference.run(segment.module, 0, True, lambda _: None)
    context = Context(
        segment,
        states,
        (AbsMax,),
        False,
        False,
        lambda _: None,
        {"inputs": reference.batches, "model": reference.batches},
    )
    starts = {
        name: MixedLinear.start(segment.weight(name), context.statistic(name, AbsMax).maximum, SCHEME)
        for name in segment.spec.linears
    }
    before = {name: linear.finish() for name, linear in starts.items()}
    Ptq161(epochs=6, scale_rate=0.02).apply(segment, context)
    for name, q in segment.quantized.items():
        assert torch.equal(q.codes, before[name].codes) and torch.equal(q.scale, before[name].scale)
        assert torch.equal(q.zero, before[name].zero)
        assert torch.equal(q.parts["salient"], before[name].parts["salient"])
        assert not torch.equal(q.parts["column_scale"], before[name].parts["column_scale"])
        notes = segment.notes[name]
        assert notes["ptq1.61.last_loss"] < 0.9 * notes["ptq1.61.first_loss"]
    for shared in segment.spec.inputs:  # linears that read one input share the mask
        assert len({tuple(segment.quantized[n].parts["salient"].tolist()) for n in shared.linears}) == 1
    assert new_context(segment, states) is not None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("binary")
    text_file(folder / "text.txt")
    tiny(folder / "llama", intermediate_size=128)
    (folder / "r.toml").write_text(EPOCHS)
    words = ["--recipe", folder / "r.toml", "--dataset", folder / "text.txt", *WORDS, "--out", folder / "out"]
    assert "native" in done("quantize", folder / "llama", *words)
    return folder


def test_whole_runs(place):
    record, file = read_record(place / "out"), load_file(place / "out/model.safetensors")
    assert record.result["verified"] == 14 and record.linears[0].scheme == "w1a16-salient20"
    kept = {n: t for n, t in file.items() if not n.endswith(("norm.weight", "lm_head.weight", "embed_tokens.weight"))}
    total = 8 * sum(t.nbytes for t in kept.values())
    counted = record.result["bits_per_weight"] * record.result["quantized_weights"]
    assert 0 <= total - counted < 14 * 32
    done("export", place / "out", "--format", "native", "--out", place / "copy")
    assert_close(logits(load_model(place / "copy").model), logits(load_model(place / "out").model))


def test_parts_are_counted_for_transposed_weights(tmp_path):
    """GPT-2 stores ``[in, out]``; rows and columns have different vectors."""
    job = prepare(tiny_checkpoint("gpt2", tmp_path), method="ptq1.61", scheme="w1a16-salient20")
    for linear in job.plan.layout.quantized:
        assert linear.part_bits == Ptq161().part_bits(*linear.shape)
    assert any(linear.shape[0] != linear.shape[1] for linear in job.plan.layout.quantized)


def test_a_killed_run_resumes_to_the_same_bytes(place, monkeypatch):
    words = ["quantize", place / "llama", "--recipe", place / "r.toml", "--dataset", place / "text.txt", *WORDS]
    with monkeypatch.context() as patch:
        patch.setattr("ptq.run.pipeline.write_checkpoint", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run_ptq(*words, "--out", place / "again").code == 130
    (place / "again.partial/blocks/block-00001.safetensors").unlink()
    done(*words, "--out", place / "again", "--resume")
    assert (place / "again/model.safetensors").read_bytes() == (place / "out/model.safetensors").read_bytes()


def test_repairs_go_on_top(place):
    (place / "both.toml").write_text(EPOCHS + '[[pass]]\nname = "lorc"\nrank = 4\n[[pass]]\nname = "norm-tweak"\n')
    words = ["--recipe", place / "both.toml", "--dataset", place / "text.txt", *WORDS, "--out", place / "both"]
    done("quantize", place / "llama", *words)
    file = load_file(place / "both/model.safetensors")
    assert {"lora_a", "binary_scale"} <= {n.rsplit(".", 1)[1] for n in file}
    assert read_record(place / "both").linears[0].notes["lorc.error_left"] < 1


@pytest.mark.parametrize("name", ["compressed-tensors", "awq", "gptq"])
def test_integer_exports_are_refused(name, place):
    words = ["quantize", place / "llama", "--method", "ptq1.61", *WORDS[:4], "--dry-run"]
    message = refused(*words, "--format", name)
    assert "1-bit weights have no place in" in message and "use --format native" in message
    done(*words, "--format", "native")
    assert "1-bit weights" in refused("export", place / "out", "--format", name, "--out", place / "no")


@pytest.mark.parametrize(
    ("method", "scheme", "part"),
    [
        ("ptq1.61", "w4a16-g32", "use --scheme w1a16-salient20"),
        ("gptq", "w1a16-salient20", "use ptq1.61 for one-bit weights"),
        ("awq+ptq1.61", "w1a16-salient20", "leave awq out"),
        ("ptq1.61", "w1a16-salient101", "has 101 % salient columns"),
        ("ptq1.61", "w1a16-g32", "asks for 1-bit weights"),
    ],
)
def test_schemes_and_methods_that_do_not_fit(method, scheme, part, place):
    assert part in refused("quantize", place / "llama", "--method", method, "--scheme", scheme, "--dry-run")


def test_bad_settings(place, tmp_path):
    (tmp_path / "r.toml").write_text('[[pass]]\nname = "ptq1.61"\nepochs = -1\nscale_rate = 2.0\n')
    message = refused("quantize", place / "llama", "--recipe", tmp_path / "r.toml", *WORDS, "--dry-run")
    assert "ptq1.61.epochs: -1 is negative" in message and "2.0 is outside [0, 1)" in message
