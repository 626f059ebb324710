"""Planted outliers: the same function, and activations that round badly."""

from __future__ import annotations

import pytest
import torch
from command import text_file, tiny
from tiny_runs import IDS, logits, plain_model

from benchmarks.stress_model import PLACES, PlantOutliers, plant
from calibration.errors import ToolkitError
from calibration.model.opening import locate, open_model
from calibration.progress import Silent
from calibration.text.samples import model_tokens
from ptq.analysis.observe import Subject, observe
from ptq.evaluation import evaluate


def inputs_of(model, suffix: str) -> torch.Tensor:
    """What enters the first linear of this name, ``[tokens, in]``."""
    seen = []
    module = next(m for n, m in model.named_modules() if n.endswith(suffix))
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    logits(model)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "opt", "gpt2", "mixtral"])
def test_outliers_leave_the_function_alone(family, tmp_path):
    source = tiny(tmp_path / "float", family, dtype=torch.bfloat16)
    places = ("norm", "value") if family == "gpt2" else tuple(PLACES)
    plant(source, tmp_path / "stress", PlantOutliers(4, 60.0, places), "")
    expected, found = (logits(plain_model(tmp_path / f)) for f in ("float", "stress"))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_planted_channels_are_large_and_perplexity_is_unchanged(tmp_path):
    source = tiny(tmp_path / "float")
    text = str(text_file(tmp_path / "text.txt"))
    plant(source, tmp_path / "stress", PlantOutliers(4, 60.0), "")
    before, after = (evaluate(tmp_path / f, dataset=text, seq_len=32).perplexity for f in ("float", "stress"))
    assert after == pytest.approx(before, rel=1e-4)
    plain, stressed = (plain_model(tmp_path / f) for f in ("float", "stress"))
    for suffix in ("q_proj", "up_proj", "down_proj"):
        growth = inputs_of(stressed, suffix).abs().amax(0) / inputs_of(plain, suffix).abs().amax(0)
        assert torch.allclose(growth.sort().values[-4:], torch.full((4,), 60.0), rtol=1e-3)
        assert torch.allclose(growth.sort().values[:-4], torch.ones(len(growth) - 4), rtol=1e-3)


def test_spikes_hit_few_tokens(tmp_path):
    source = tiny(tmp_path / "float")
    text = str(text_file(tmp_path / "text.txt"))
    plant(source, tmp_path / "stress", PlantOutliers(places=(), spikes=1, spike_factor=300.0), text, 8, 32)
    expected, found = (logits(plain_model(tmp_path / f)) for f in ("float", "stress"))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    x = inputs_of(plain_model(tmp_path / "stress"), "down_proj").abs()
    channel = int(x.amax(0).argmax())
    others = torch.cat([x[:, :channel], x[:, channel + 1 :]], 1).amax(1)
    assert x[:, channel].max() > 20 * others.max()
    assert IDS.numel() == len(x)


def test_places_that_a_family_lacks_are_named(tmp_path):
    with pytest.raises(ToolkitError, match="gpt2 has no place for: down"):
        plant(tiny(tmp_path / "float", "gpt2"), tmp_path / "out", PlantOutliers(), "")


def test_the_analysis_finds_exactly_the_planted_channels(tmp_path):
    """On the demo, whose own channels are even: all that were planted before norms, and nothing else there."""
    plant("demo", tmp_path / "stress", PlantOutliers(6, 60.0, ("norm",)), "")
    (plain, _, _), (stressed, config, spec) = (open_model(f) for f in (locate("demo"), tmp_path / "stress"))
    tokens = model_tokens(tmp_path / "stress", config, "builtin", 2, 128, 0, False)
    subject = Subject(stressed, config, spec, torch.float32, torch.device("cpu"))
    for site in observe(subject, tokens, str, Silent()).sites:
        norm = {"attention input": "input_layernorm", "mlp input": "post_attention_layernorm"}.get(site.role)
        planted: list[int] = []
        if norm is not None:
            name = f"{spec.prefix(site.block)}{norm}.weight"
            growth = stressed.tensor(name).float() / plain.tensor(name).float()
            planted = (growth > 10).nonzero().flatten().tolist()
            assert len(planted) == 6
        assert sorted(site.standout) == planted, (site.block, site.role)
