"""The sweep behind `ptq fit`: gradients with one block in memory, what they say of small errors, how losses add up."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from command import text_file, tiny
from tiny_models import tiny_model

from calibration.errors import ToolkitError
from calibration.model.skeleton import Skeleton
from calibration.progress import CallbackProgress, Silent
from calibration.walk.float_blocks import FloatBlocks
from calibration.walk.kept_states import KeptStates
from ptq.fitting.job import Fit, prepare_fit
from ptq.fitting.memory import kept_bytes, sweeping_bytes
from ptq.fitting.sensitivity import Sensitivities, Sweep
from ptq.fitting.together import Point, Together
from ptq.numerics.grids import fake_quantize
from ptq.planning.job import Options
from ptq.scheme import parse_scheme

WINDOWS, LENGTH = 3, 32
W3, W6 = parse_scheme("w3a16-gchannel-sym"), parse_scheme("w6a16-gchannel-sym")


def prepared(folder, family: str, samples: int = WINDOWS, seq_len: int = LENGTH) -> Fit:
    if not (folder / family).exists():
        text_file(folder / "text.txt")
        tiny(folder / family, family)
    options = Options(dataset=str(folder / "text.txt"), samples=samples, seq_len=seq_len)
    return prepare_fit(
        folder / family, format="native", schemes=("w3a16-gchannel-sym", "w6a16-gchannel-sym"), options=options
    )


def swept(fit: Fit, scheme=W3, seed: int = 0, progress=None) -> tuple[Sensitivities, torch.Tensor]:
    """In float64, every linear of the model with one scheme."""
    job, names = fit.job, [name for unit in fit.units for name in unit.names]
    skeleton = Skeleton(job.config, job.plan.spec, torch.float64, job.device)
    blocks = FloatBlocks(job.reader, skeleton, schemes=job.plan.schemes, batch_size=1, master_dtype=torch.float64)
    tokens = job.windows(Silent())
    sweep = Sweep(dict.fromkeys(names, (scheme,)), {"all": dict.fromkeys(names, scheme)}, False, len(tokens), seed=seed)
    return sweep.run(blocks, tokens, progress or Silent()), tokens.input_ids


@pytest.mark.parametrize("family", ["llama-tied-bias", "gpt2", "gemma3", "opt-post-norm", "mixtral"])
def test_losses_are_those_of_gradients_through_the_whole_model(tmp_path, family):
    """The same labels, autograd through all of it, and the formula written out, in float64."""
    fit = prepared(tmp_path, family)
    found, ids = swept(fit)
    model = tiny_model(family, vocab_size=260).double()
    model.config._experts_implementation = "eager"  # the default one knows no float64
    parameters = dict(model.named_parameters())
    spec = fit.plan.spec
    seeds = torch.randint(2**62, (WINDOWS,), generator=torch.Generator().manual_seed(0)).tolist()
    paths = {name: spec.root_module_name(f"{name}.weight") for name in found.nearest}
    paths = {name: path for name, path in paths.items() if path in parameters}  # experts are one tensor in the class
    assert len(paths) == len(found.nearest) or family == "mixtral"
    moments = {name: [] for name in paths}
    for window, seed in zip(ids.split(1), seeds, strict=True):
        model.zero_grad()
        log_p = model(window, use_cache=False).logits[0, :-1].log_softmax(-1)
        labels = torch.multinomial(log_p.detach().exp(), 1, generator=torch.Generator().manual_seed(seed))
        (-log_p.gather(1, labels).sum()).backward()
        for name, path in paths.items():
            d = parameters[path].grad
            moments[name].append(d.T.clone() if spec.conv1d else d.clone())
    for name, path in paths.items():
        w = parameters[path].data
        w = w.T if spec.conv1d else w
        change = fake_quantize(w, W3.weights) - w
        columns = sum(d.T @ d for d in moments[name])
        rows = sum(d.square().sum(1) for d in moments[name])
        errors = torch.einsum("ri,ij,rj->r", change, columns, change)
        expected = float(rows @ errors / rows.sum()) / (2 * WINDOWS * (LENGTH - 1))
        assert found.nearest[name][W3] == pytest.approx(expected, rel=1e-9, abs=1e-18), name


def test_small_errors_cost_what_was_expected(tmp_path):
    """At six bits, every linear alone on the same windows: in the median within a tenth, and within a factor of 2."""
    fit = prepared(tmp_path, "llama-tied-bias", samples=12)
    found, ids = swept(fit, W6)
    model = tiny_model("llama-tied-bias", vocab_size=260).double()
    ratios = []
    with torch.no_grad():
        base = model(ids).logits[:, :-1].log_softmax(-1)
        for name, losses in found.nearest.items():
            w = model.get_parameter(f"{name}.weight").data
            kept = w.clone()
            w.copy_(fake_quantize(kept, W6.weights))
            kl = float((base.exp() * (base - model(ids).logits[:, :-1].log_softmax(-1))).sum(-1).mean())
            w.copy_(kept)
            ratios.append(losses[W6] / kl)
    assert sorted(ratios)[len(ratios) // 2] == pytest.approx(1, abs=0.1)
    assert min(ratios) > 0.5 and max(ratios) < 2, ratios
    for check in found.checks:
        assert 0.5 < check.expected / check.measured < 2
    assert len(found.checks) == 6


def test_a_seed_decides_the_labels(tmp_path):
    fit = prepared(tmp_path, "llama")
    first, again, other = (swept(fit, seed=seed)[0].nearest for seed in (1, 1, 2))
    assert first == again and first != other


def test_progress_ends_with_the_last_unit(tmp_path):
    seen = []
    swept(prepared(tmp_path, "llama"), progress=CallbackProgress(lambda *told: seen.append(told)))
    told = [entry for entry in seen if entry[0] == "sensitivities"]
    assert told[-1][1] == told[-1][2] == max(done for _, done, _, _ in told)
    details = " ".join(detail for *_, detail in told)
    assert "head, probes" in details and "head, gradient" in details and "block 1/2 backward" in details


def test_how_losses_add_up():
    measured = Together.through([Point(4.0, 2.0, 1.0), Point(0.1, 0.2, 0.1), Point(0, 0, 0), Point(1.0, 1.0, -0.3)])
    assert [p.parts for p in measured.points] == [0.1, 1.0, 4.0]
    assert measured.points[1].nll == pytest.approx(0.1, rel=1e-6), "what falls by chance is not believed"
    assert measured.kl(1.0) == pytest.approx(1.0) and measured.kl(0.05) == pytest.approx(0.1)
    assert measured.kl(8.0) == pytest.approx(4.0) and measured.kl(2.0) == pytest.approx(math.sqrt(2))
    for parts in (0.01, 0.1, 0.7, 1.0, 3.0, 9.0):
        assert measured.parts(measured.nll(parts)) == pytest.approx(parts, rel=1e-6)
        assert measured.kl(parts * 1.01) > measured.kl(parts) and measured.nll(parts * 1.01) > measured.nll(parts)
    assert Together(()).kl(0.3) == Together(()).nll(0.3) == 0.3 and measured.kl(0.0) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_come_back_as_they_were(tmp_path, dtype):
    fit = prepared(tmp_path, "llama")
    skeleton = Skeleton(fit.job.config, fit.plan.spec, dtype, fit.job.device)
    states = FloatBlocks(fit.job.reader, skeleton, batch_size=1).enter(fit.job.windows(Silent()), Silent()).first(2)
    own = [[torch.randn(1, LENGTH, 64).to(dtype) for _ in range(2)] for _ in range(3)]
    with KeptStates() as kept:
        for windows in own:
            states.batches = list(windows)
            kept.append(states)
        for block in (2, 0, 1):
            kept.load(block, states)
            assert all(torch.equal(a, b) for a, b in zip(states.batches, own[block], strict=True))


def test_room_and_memory_are_counted(tmp_path, monkeypatch):
    """The states of every block on the disk; twice in memory, with their gradients."""
    short, long = (prepared(tmp_path, "llama", samples=8, seq_len=n) for n in (16, 48))
    assert kept_bytes(short.job, 8) == 2 * 8 * 16 * 64 * short.job.dtype.itemsize
    options = {name: unit.options for unit in short.units for name in unit.names}
    probes = {"all": {name: found[0] for name, found in options.items()}}
    few, many = (Sweep(options, probes, False, windows, probed=1) for windows in (2, 8))
    more = 2 * 6 * 48 * 64 * long.job.dtype.itemsize
    assert sweeping_bytes(long.job, many) - sweeping_bytes(long.job, few) == more
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    with pytest.raises(ToolkitError, match="hidden states of every block"):
        short.sweep(many, short.job.windows(Silent()), Silent())
