"""Advice: planted outliers are found exactly and name what fixes them; a plain model gives no alarm."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_models import save_tiny
from tiny_runs import tiny_checkpoint

from calibration.model.checkpoint import CheckpointReader
from calibration.model.opening import locate, open_model
from calibration.progress import Silent
from calibration.text.crops import TokenBatches
from calibration.text.samples import model_tokens
from ptq.analysis.accepted import refusal_of
from ptq.analysis.activations import standout_channels
from ptq.analysis.advice import advise
from ptq.analysis.observe import Findings, Subject, observe
from ptq.planning.job import Options, prepare

ALL = (("rotate+gptq", "w8a8"), ("smoothquant+gptq", "w8a8"), ("rotate+gptq", "w4a8"), ("rrs", "w4a4"))
CHANNELS = (3, 77, 130, 131, 200, 255)


class Planted:
    """The demo's tensors with channels of a norm multiplied, and divided again in every reader."""

    def __init__(self, reader: CheckpointReader, gains: dict[str, torch.Tensor], columns: dict[str, torch.Tensor]):
        self.infos, self._reader, self._gains, self._columns = reader.infos, reader, gains, columns

    def tensor(self, name: str) -> torch.Tensor:
        t = self._reader.tensor(name).float()
        if name in self._gains:
            s = self._gains[name]
            t = t * (s if t.ndim == 1 else s[:, None])
        return t / self._columns[name] if name in self._columns else t

    def rows(self, name: str, indices: torch.Tensor) -> torch.Tensor:
        return self.tensor(name)[indices]

    def close(self) -> None:
        self._reader.close()


def analysed(gains: dict[str, torch.Tensor], columns: dict[str, torch.Tensor]) -> Findings:
    demo = locate("demo")
    reader, config, spec = open_model(demo)
    tokens = model_tokens(demo, config, "builtin", 4, 128, 0, False)
    subject = Subject(Planted(reader, gains, columns), config, spec, torch.float32, torch.device("cpu"))
    return observe(subject, tokens, str, Silent())


@pytest.fixture(scope="module")
def found() -> Findings:
    """Of the demo as it is."""
    return analysed({}, {})


def factors(width: int, channels: tuple[int, ...], factor: float) -> torch.Tensor:
    s = torch.ones(width)
    s[list(channels)] = factor
    return s


def test_no_alarm_on_a_plain_model(found):
    advice = advise(found.sites, found.weights)
    assert [a.rule for a in advice] == ["recipe"] and not advice[0].alarm
    assert advice[0].recipes == (("rtn", "w8a8"), ("awq+gptq", "w4a16"), ("rrs", "w4a4"))
    assert not any(s.standout for s in found.sites)


def test_exactly_the_planted_channels_and_what_moves_them():
    s = factors(256, CHANNELS, 60.0)
    prefix = "model.layers.{}."
    gains = {prefix.format(i) + "input_layernorm.weight": s for i in range(3)}
    readers = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    columns = {f"{prefix.format(i)}{r}.weight": s for i in range(3) for r in readers}
    found = analysed(gains, columns)
    for site in found.sites:
        assert site.standout == (CHANNELS if site.role == "attention input" else ()), (site.block, site.role)
    channels, recipe = (a for a in advise(found.sites, found.weights) if a.rule in ("channels", "recipe"))
    assert channels.alarm and channels.channels == CHANNELS and "attention input (blocks 0, 1, 2)" in channels.finding
    assert channels.helps[1].startswith("smoothquant:") and channels.cannot[0].startswith("atoken")
    assert recipe.recipes == ALL
    inputs = [s for s in found.sites if s.role == "attention input"]
    assert all(s.sqnr["channel-8"] > 30 for s in inputs) and all(s.output_error["token-8"] > 0.03 for s in inputs)


def test_a_first_token_calls_for_a_scale_per_token(found):
    first = dataclasses.replace(found.sites[0].largest, position=0)
    sites = [dataclasses.replace(found.sites[0], token_disparity=300.0, largest=first), *found.sites[1:]]
    advice = {a.rule: a for a in advise(sites, found.weights)}
    assert advice["first token"].helps[0].startswith("atoken") and advice["first token"].cannot[0].startswith("atensor")
    spike = dataclasses.replace(found.sites[0].largest, position=9)
    sites[0] = dataclasses.replace(sites[0], largest=spike)
    advice = {a.rule: a for a in advise(sites, found.weights)}
    assert advice["spikes"].helps[0].startswith("rotate") and "rotate" in advice["recipe"].helps[0]


def test_static_inputs_are_proposed_as_a_mixture(found, tmp_path):
    """Where one token is too large for a static step, as a recipe that the plan takes, and that does what is said."""
    sites = [dataclasses.replace(s, token_disparity=300.0) if s.role == "down input" else s for s in found.sites]
    (advice,) = (a for a in advise(sites, found.weights) if a.rule == "static inputs")
    assert advice.finding.startswith("3 of 21 linears") and not advice.alarm
    assert advice.helps[0].startswith("--method rotate+ranges+gptq --scheme w8a8-astatic:")
    folder = tiny_checkpoint("gemma3", tmp_path / "gemma3")
    (advice,) = (a for a in advise(sites, found.weights, refusal_of(folder, Options())) if a.rule == "static inputs")
    assert advice.helps[0].startswith("--method smoothquant+ranges+gptq ")


def test_channels_and_spikes_together_call_for_rotation(found):
    spike = dataclasses.replace(found.sites[0].largest, position=9)
    site = dataclasses.replace(
        found.sites[0], token_disparity=300.0, largest=spike, standout=(5,), output_error={"token-8": 0.2}
    )
    *_, recipe = advise([site, *found.sites[1:]], found.weights)
    assert recipe.recipes == ALL


def test_a_channel_stands_out_by_its_mean_and_its_largest_value():
    mean, largest = torch.ones(64), torch.full((64,), 4.0)
    mean[[3, 7]], largest[[3, 9]] = 20.0, 90.0  # 7 is never large, 9 only in few tokens
    assert standout_channels(mean, largest).tolist() == [3]


def test_heads_are_seen_and_falcon_says_why_not(found, tmp_path):
    assert {h.block for h in found.heads} == {0, 1, 2}
    assert all(0 <= h.first_mass + h.delimiter_mass <= 1.0001 and 0 <= h.entropy <= 1.0001 for h in found.heads)
    folder = save_tiny("falcon-rw", tmp_path / "falcon")
    reader, config, spec = open_model(folder)
    ids = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(0))
    subject = Subject(reader, config, spec, torch.float32, torch.device("cpu"))
    falcon = observe(subject, TokenBatches(ids, {}), str, Silent())
    assert falcon.no_heads is not None and "interface" in falcon.no_heads and not falcon.heads


def test_unbalanced_inputs_do_not_name_smoothquant_as_a_cure(found):
    sites = [dataclasses.replace(found.sites[0], standout=(5,), balanced=None), *found.sites[1:]]
    (advice,) = (a for a in advise(sites, found.weights) if a.rule == "channels")
    assert advice.channels == (5,) and not any(h.startswith("smoothquant") for h in advice.helps)
    assert any(c.startswith("smoothquant") for c in advice.cannot)


def test_what_is_said_to_help_touches_the_inputs_concerned(found):
    """smoothquant by itself scales what norms feed; what lies behind up or v needs a setting, and is told so."""
    for kind, said in (("linear", "smoothquant, with down = true"), ("value", "smoothquant, with values = true")):
        site = dataclasses.replace(found.sites[0], standout=(5,), balanced=kind)
        (advice,) = (a for a in advise([site, *found.sites[1:]], found.weights) if a.rule == "channels")
        assert [h.partition(":")[0] for h in advice.helps if h.startswith("smoothquant")] == [said]


def test_what_the_plan_refuses_is_not_advised(found, tmp_path):
    """Gemma 3 has norms behind its blocks, between which the stream cannot turn."""
    sites = [dataclasses.replace(found.sites[0], standout=(5,), output_error={"token-8": 0.2}), *found.sites[1:]]
    folder = tiny_checkpoint("gemma3", tmp_path / "gemma3")
    channels, *_, recipe = advise(sites, found.weights, refusal_of(folder, Options()))
    assert not any(h.startswith("rotate") for h in channels.helps)
    assert any(c.startswith("rotate:") for c in channels.cannot)
    assert recipe.recipes == (("smoothquant+gptq", "w8a8"), ("rs+gptq", "w4a4"))
    for method, scheme in recipe.recipes:
        prepare(folder, method=method, scheme=scheme, options=Options())


def test_without_anything_that_the_plan_takes_plain_rounding_is_left(found):
    sites = [dataclasses.replace(found.sites[0], output_error={"token-8": 0.2}), *found.sites[1:]]
    assert advise(sites, found.weights, lambda method, scheme: "no")[-1].recipes == (("rtn", "w8a8"),)
