"""The oracles of norm tweaking, from the loss to whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import done, products, refused, run_ptq, text_file, tiny
from safetensors.torch import load_file, save_file
from test_statistics import new_context, open_block, scheme, tokens
from tiny_runs import tiny_checkpoint

import ptq
from calibration.walk.context import Context
from calibration.walk.passes import forwards_per_block
from ptq.methods import Gptq, NormTweak, Rtn
from ptq.numerics.distribution import channel_distance, channel_moments, learning_rate
from ptq.planning.job import Options, prepare
from ptq.runtime.load import load_model

torch.set_num_threads(1)
WORDS = ("--samples", "6", "--seq-len", "24", "--scheme", "w2a16-g32")
TWEAK = '[[pass]]\nname = "{method}"\n[[pass]]\nname = "norm-tweak"\nrate = {rate}\n'


def outputs(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# the loss ------------------------------------------------------------------------------------------------------------


def test_loss_of_equal_outputs_and_of_known_changes():
    f, k, s, c = outputs(0, 3, 20, 8), 0.7, 1.5, 5
    assert channel_distance(f, f) == 0
    shifted = f.clone()
    shifted[..., c] += k
    assert channel_distance(f, shifted) == pytest.approx(k / 8)
    f[..., c] -= f[..., c].mean(dim=1, keepdim=True)
    scaled = f.clone()
    scaled[..., c] *= s
    expected = float((abs(1 - s**2) * channel_moments(f)[1][:, c]).mean()) / 8
    assert channel_distance(f, scaled) == pytest.approx(expected)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    assert channel_distance(f, scaled[:, order]) == pytest.approx(float(channel_distance(f, scaled)))


def test_loss_has_the_gradient_of_finite_differences():
    f, y = outputs(1, 2, 9, 5), outputs(2, 2, 9, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: channel_distance(f, q), (y,))


def test_gradient_of_no_difference_is_zero():
    y = outputs(3, 2, 9, 5).requires_grad_()
    channel_distance(y.detach(), y).backward()
    assert y.grad is not None and not y.grad.any()


def test_rate_over_depth():
    assert learning_rate(1e-5, 5, 0, 12) == 1e-5
    assert learning_rate(1e-5, 5, 11, 12) == pytest.approx(1e-5 * (1 + 5 * 11 / 12))


# one block -----------------------------------------------------------------------------------------------------------


def tweakable(family: str, folder: Path, **options: torch.dtype) -> tuple[object, Context]:
    """A block of a tiny model whose references are its own outputs."""
    segment, states = open_block(family, folder, scheme=scheme(), data=tokens(16, 24), **options)
    segment.keep_originals = True
    reference = states.copy()
    with torch.no_grad():
        reference.run(segment.module, segment.index, True, lambda _: None)
    context = Context(segment, states, (), False, False, lambda _: None, {"inputs": reference.batches})
    return segment, context


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_a_gain_that_was_changed_comes_back(family, tmp_path):
    segment, context = tweakable(family, tmp_path, dtype=torch.float32)
    name = segment.norms()[0]
    expected = segment.masters[name].clone()
    offset = 1.0 if family == "gemma2" else 0.0
    segment.set_vector(name, (expected + offset) * 1.05 - offset)
    segment.originals.clear()
    for rate in (6e-3, 6e-4):
        NormTweak(rate=rate, depth_scale=0, epochs=20).apply(segment, context)
    off = (segment.masters[name] - expected) / (expected + offset)
    weight = (expected + offset).abs() > 0.2  # a gain near zero has no say
    assert off[weight].abs().median() < 0.01 and off[weight].abs().max() < 0.02


def test_identity_moves_nothing_and_steps_are_bounded(tmp_path):
    segment, context = tweakable("llama", tmp_path, dtype=torch.float32)
    before = {n: segment.masters[n].clone() for n in segment.norms()}
    NormTweak(rate=1e-3).apply(segment, context)
    assert all(torch.equal(segment.masters[n], before[n]) for n in before)
    Rtn().apply(segment, new_context(segment, None, ()))
    steps, rate = 3 * len(context.batches), 1e-3
    NormTweak(rate=rate, depth_scale=0, epochs=3).apply(segment, context)
    moved = max(float((segment.masters[n] - before[n]).abs().max()) for n in before)
    assert 0.1 * rate < moved <= 3.2 * steps * rate


@pytest.mark.parametrize(
    ("family", "count", "first"),
    [
        ("llama", 2, "input_layernorm.weight"),
        ("qwen3", 2, "input_layernorm.weight"),  # norms of queries and keys are left alone
        ("gemma2", 4, "input_layernorm.weight"),
        ("opt", 4, "final_layer_norm.bias"),
        ("gpt2", 4, "ln_1.bias"),
        ("falcon-40b", 4, "ln_attn.bias"),
        ("mixtral", 2, "input_layernorm.weight"),
    ],
)
def test_which_parameters_are_trained(family, count, first, tmp_path):
    segment, _ = open_block(family, tmp_path)
    found = sorted(segment.norms())
    assert len(found) == count and found[0] == first


# whole runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tweak")
    text_file(folder / "text.txt")
    tiny(folder / "llama", intermediate_size=128)
    return folder


def run(place: Path, out: str, method: str, rate: float, more: str = "") -> dict[str, torch.Tensor]:
    recipe = place / f"{out}.toml"
    recipe.write_text(TWEAK.format(method=method, rate=rate) + more)
    words = ["--recipe", recipe, "--dataset", place / "text.txt", *WORDS]
    done("quantize", place / "llama", *words, "--out", place / out, "--overwrite")
    return load_file(place / out / "model.safetensors")


def test_rate_zero_is_the_rounded_model_bit_for_bit(place):
    plain = place / "plain"
    words = ["--method", "gptq", "--dataset", place / "text.txt", *WORDS, "--out", plain]
    done("quantize", place / "llama", *words)
    still = run(place, "still", "gptq", 0.0)
    expected = load_file(plain / "model.safetensors")
    assert expected.keys() == still.keys() and all(torch.equal(expected[n], still[n]) for n in expected)
    assert (plain / "model.safetensors").read_bytes() == (place / "still/model.safetensors").read_bytes()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "mixtral"])
def test_only_norms_change(family, tmp_path):
    source = tiny_checkpoint(family, tmp_path / "float", torch.bfloat16)
    text_file(tmp_path / "text.txt")
    (tmp_path / "r.toml").write_text(TWEAK.format(method="rtn", rate=1e-3) + 'target = "model"\n')
    settings = {"scheme": "w4a16-g32", "samples": 6, "seq_len": 24, "dataset": str(tmp_path / "text.txt")}
    ptq.quantize(source, out=tmp_path / "plain", method="rtn", **settings)
    ptq.quantize(source, out=tmp_path / "tweaked", recipe=tmp_path / "r.toml", **settings)
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("plain", "tweaked"))
    changed = {n for n in before if not torch.equal(before[n].float(), after[n].float())}
    blocks = [n for n in before if ".0." in n or ".1." in n]
    norms = {n for n in blocks if before[n].ndim == 1 and "_proj" not in n and not n.endswith((".zero", "shape"))}
    norms = {n for n in norms if ("norm" in n or "ln_" in n) and ".attn." not in n and "self_attn." not in n}
    assert (
        changed
        and changed <= norms
        and {n.rsplit(".", 2)[-2] for n in changed} == {n.rsplit(".", 2)[-2] for n in norms}
    )
    assert all(after[n].dtype == torch.float32 for n in changed), "steps below the resolution of bfloat16 are kept"
    assert all(after[n].dtype == before[n].dtype for n in before if n not in norms)
    assert load_model(tmp_path / "tweaked").model.dtype == torch.bfloat16


def test_states_are_those_of_the_final_model(place, monkeypatch):
    """What enters a block in calibration is what enters it when the finished model runs on the same tokens."""
    entering: list[torch.Tensor] = []
    first = Context.__init__

    def spy(self, segment, states, *args, **named):  # type: ignore[no-untyped-def]
        entering.append(torch.cat(states.batches).clone())
        first(self, segment, states, *args, **named)

    ids = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, place / "ids.safetensors")
    (place / "r.toml").write_text(TWEAK.format(method="gptq", rate=1e-3))
    words = ["--recipe", place / "r.toml", "--dataset", place / "ids.safetensors", *WORDS]
    with monkeypatch.context() as patch:
        patch.setattr(Context, "__init__", spy)
        done("quantize", place / "llama", *words, "--out", place / "fresh")
    model, seen = load_model(place / "fresh", dtype=torch.float32, kernel="reference").model, []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids, use_cache=False)
    for found, expected in zip(entering, seen, strict=True):
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_references_on_inputs_and_of_the_model(place, monkeypatch):
    """The two references are one at the first block and part from the second block on."""
    pairs: list[list[torch.Tensor]] = []
    monkeypatch.setattr(NormTweak, "references", property(lambda self: ("inputs", "model")))

    def look(self, segment, context):  # type: ignore[no-untyped-def]
        pairs.append([torch.cat([context.reference(k, b) for b in context.batches]) for k in self.references])

    monkeypatch.setattr(NormTweak, "apply", look)
    run(place, "pairs", "rtn", 1e-3)
    (one, same), (two, other) = pairs
    assert torch.equal(one, same)
    assert (two - other).norm() > 0.05 * other.norm()


def test_a_killed_run_resumes_to_the_same_bytes(place, monkeypatch):
    run(place, "whole", "gptq", 1e-3, 'target = "model"\n')
    words = ["quantize", place / "llama", "--recipe", place / "whole.toml", "--dataset", place / "text.txt", *WORDS]
    with monkeypatch.context() as patch:
        patch.setattr("ptq.run.pipeline.write_checkpoint", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run_ptq(*words, "--out", place / "again").code == 130
    (place / "again.partial/blocks/block-00001.safetensors").unlink()
    done(*words, "--out", place / "again", "--resume")
    tensors = [products(place / name)["model.safetensors"] for name in ("again", "whole")]
    assert tensors[0] == tensors[1]


def test_the_plan_counts_forwards_and_memory(place):
    def plan(method: str):  # type: ignore[no-untyped-def]
        options = Options(dataset=str(place / "text.txt"), samples=6, seq_len=24)
        return prepare(place / "llama", method=method, scheme="w2a16-g32", options=options).plan

    assert forwards_per_block((Gptq(),)) == 2
    assert forwards_per_block((Gptq(), NormTweak(epochs=2))) == 2 + 1 + 2
    assert forwards_per_block((Rtn(), NormTweak())) == 3  # no statistics to gather
    plain, tweaked = plan("gptq").sizes, plan("gptq+norm-tweak").sizes
    assert tweaked.forwards == plain.forwards + 2 and tweaked.peak_bytes > plain.peak_bytes


REFUSALS = {
    "rate": ("rate = 2.0", "norm-tweak.rate: 2.0 is outside [0, 1)", "use 1e-4"),
    "depth": ("depth_scale = -1.0", "-1.0 is negative", "use 1"),
    "epochs": ("epochs = -1", "norm-tweak.epochs: -1 is negative", "use 1"),
    "target": ('target = "imputs"', "unknown value 'imputs'", "did you mean 'inputs'?"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_settings_are_refused_in_the_plan(case, place, tmp_path):
    setting, *parts = REFUSALS[case]
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'[[pass]]\nname = "rtn"\n[[pass]]\nname = "norm-tweak"\n{setting}\n')
    message = refused("quantize", place / "llama", "--recipe", recipe, *WORDS, "--dry-run")
    assert all(part in message for part in parts), message
