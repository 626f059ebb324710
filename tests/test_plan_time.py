"""Seconds in the plan: amounts of work over measured rates; what they grow with; one block for real."""

from __future__ import annotations

import json
import time
from dataclasses import fields, replace

import pytest
import torch
from command import done, refused, run_ptq, text_file, tiny

import ptq
from calibration.walk.cost import BlockShape, InputShape, Work
from calibration.walk.passes import Pass, Phase
from ptq.fitting.outlook import busiest
from ptq.fitting.sensitivity import Sweep
from ptq.methods import METHODS
from ptq.planning import rates
from ptq.planning.block_time import block_shapes
from ptq.planning.duration import block_seconds, expected
from ptq.planning.job import Options, prepare
from ptq.planning.rates import Rates
from ptq.sparse.methods import all_methods

UNIT = Rates(torch.device("cpu"), torch.float32, 1)
vars(UNIT).update({field.name: 1.0 for field in fields(Work)})
SHAPE = BlockShape(
    (InputShape(64, (64, 32, 32), 512.0), InputShape(96, (64,), 512.0)), 32, 8, 2, Work(products=1e6), True
)
SMALL = ["--scheme", "w4a16-g32", "--samples", "2", "--seq-len", "16", "--dataset", "text.txt"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("time")
    text_file(folder / "text.txt")
    tiny(folder / "model")
    return folder


@pytest.fixture
def there(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def job_of(place, method="gptq", samples=8, **options):
    text = str(place / "text.txt")
    return prepare(place / "model", method=method, scheme="w4a16-g32", options=Options(text, samples, 16, **options))


def test_work_adds_up_and_takes_its_share_of_every_rate():
    work = Work(products=2.0, calls=3.0) + Work(products=1.0, read=4.0) * 2.0
    assert work == Work(products=4.0, calls=3.0, read=8.0)
    assert UNIT.seconds(work) == 15.0
    faster = Rates(torch.device("cpu"), torch.float32, 1)
    vars(faster).update(vars(UNIT), products=4.0)
    assert faster.seconds(work) == 12.0


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_every_pass_says_what_it_costs(name):
    """Finite amounts, none negative; a pass that rounds has something to do, and more on more weights."""
    step = all_methods()[name]()
    twice = replace(SHAPE, inputs=tuple(replace(s, rows=s.rows * 2) for s in SHAPE.inputs))
    seconds = [sum(UNIT.seconds(task) for task in step.cost(shape)) for shape in (SHAPE, twice)]
    assert all(0 <= s < 1e15 for s in seconds) and seconds[0] <= seconds[1], seconds
    if Phase.ROUND in step.phases:
        assert 0 < seconds[0] < seconds[1]
    assert not step.spreads or len(list(step.cost(SHAPE))) > 1


@pytest.mark.parametrize(("scheme", "integers"), [("q4_k", 2), ("q3_k", 1), ("q4_0", 0)])
def test_grids_with_super_blocks_are_searched_and_settled(tmp_path, scheme, integers):
    """Rounding to nearest took 24 and 34 times as long as on other grids, GPTQ 13 and 11 times."""
    tiny(tmp_path / "model", hidden_size=256, intermediate_size=512)
    job = prepare(tmp_path / "model", method="rtn", scheme=scheme, format="gguf")
    [block, *_] = block_shapes(job, job.plan.layout.linears, False)
    assert block.integers == integers
    for name in ("rtn", "gptq"):
        step = METHODS[name]()
        plain = sum(UNIT.seconds(task) for task in step.cost(replace(block, integers=0)))
        assert (sum(UNIT.seconds(task) for task in step.cost(block)) > 10 * plain) == (integers > 0)


def test_the_plan_of_several_processes(there, monkeypatch):
    """Whose memory it is, how many have nothing to do."""
    words = ["quantize", "model", "--method", "gptq", *SMALL, "--dry-run"]
    alone = done(*words)
    assert "processes" not in alone
    for name, value in {"RANK": 0, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    for command in (words, [*COMMANDS["analyze"], "--dry-run", "--out", "new"]):
        printed = done(*command)
        assert "in each of 3 processes" in printed and "3 processes, and work for 1" in printed, printed


def test_a_new_method_need_not_say_anything():
    class Mine(Pass):
        name, summary, phases = "mine", "does it", (Phase.ROUND,)

        def apply(self, segment, context):
            pass

    assert sum(task.values for task in Mine().cost(SHAPE)) > 0


def test_rates_of_this_machine():
    found = Rates(torch.device("cpu"), torch.float32, torch.get_num_threads())
    assert 1e8 < found.exact < 1e14 and found.products == found.exact
    assert found.fresh > 1e7 and found.values > 1e7 and found.calls > 1e3 and found.written > 1e5


def test_what_takes_long_is_tried_once(monkeypatch):
    tries = []
    monkeypatch.setattr(rates, "LONG", 0.0)
    rates._best(lambda: tries.append(sum(range(10**4))), torch.device("cpu"))
    assert len(tries) == 2  # the first one is not counted


def test_a_busy_machine_does_not_count(monkeypatch):
    """Waiting for a core takes no time, and threads that wait for each other are no reason for a rate below one
    thread's."""
    assert rates._best(lambda: time.sleep(0.05), torch.device("cpu"), 1) < 0.01
    before, seconds = torch.get_num_threads(), {1: 2.0, 2: 6.0}
    monkeypatch.setattr(rates, "_best", lambda work, device: seconds[torch.get_num_threads()])
    try:
        torch.set_num_threads(2)
        found = Rates(torch.device("cpu"), torch.float32, 2)
        assert found.calls == 100.0
        assert torch.get_num_threads() == 2
        seconds[1] = 10.0
        assert found.calls == 100.0  # measured once
        assert Rates(torch.device("cpu"), torch.float32, 2).calls == 200 / 6
    finally:
        torch.set_num_threads(before)


def test_only_what_a_plan_has_is_measured(monkeypatch):
    found = Rates(torch.device("cpu"), torch.bfloat16, 1)
    monkeypatch.setattr(Rates, "_product_rate", lambda *_: pytest.fail("no matrix is multiplied"))
    assert found.seconds(Work(values=1e6, text=1e6)) > 0


def test_the_time_of_blocks_follows_the_text_and_the_processes(place):
    few, many = (sum(block_seconds(job_of(place, samples=n), 1)) for n in (256, 2048))
    assert 3 < many / few < 8.1
    alone, shared = (sum(block_seconds(job_of(place, samples=2048), n)) for n in (1, 2))
    assert 1.2 < alone / shared < 2
    assert sum(block_seconds(job_of(place, samples=2048), 8)) == sum(block_seconds(job_of(place, samples=2048), 99))


def test_an_expert_sees_a_share_of_the_tokens(tmp_path):
    text_file(tmp_path / "text.txt")
    tiny(tmp_path / "model", "mixtral")
    job = job_of(tmp_path)
    block = block_shapes(job, job.plan.layout.linears, True)[0]
    tokens = {shared.tokens for shared in block.inputs}
    assert tokens == {8 * 16.0, 8 * 16 * job.config.num_experts_per_tok / job.config.num_local_experts}


def test_phases(place):
    seconds = expected(job_of(place, evaluate=str(place / "text.txt"), eval_windows=2)).seconds
    assert list(seconds) == ["tokenize", "check weights", "embed", "blocks", "export", "verify", "evaluate"]
    assert all(s >= 0 for s in seconds.values())
    assert list(expected(job_of(place, method="rtn")).seconds) == ["check weights", "blocks", "export", "verify"]
    unknown = prepare("demo", method="gptq", options=Options("c4", 8, 16))
    assert expected(unknown).unknown == ("c4",)


def test_dry_run_shows_and_writes_seconds(there):
    before = sorted(p.name for p in there.iterdir())
    printed = done("quantize", "model", "--method", "gptq", *SMALL, "--out", "out", "--dry-run", "--json", "-")
    plan = json.loads(printed)
    assert plan["total_seconds"] == pytest.approx(sum(plan["seconds"].values())) and plan["peak_bytes"] > 0
    result = run_ptq("quantize", "model", "--method", "gptq", *SMALL, "--dry-run", "--measure")
    assert result.code == 0 and "time about" in result.out and "one block was run" in result.out
    assert sorted(p.name for p in there.iterdir()) == before


def test_one_block_for_real_scales_all_blocks(place):
    job = job_of(place, samples=8)
    found = ptq.plan_time(job, measure=True)
    took, foreseen = found.measured
    assert took > 0 and found.seconds["blocks"] == pytest.approx(sum(block_seconds(job, 1)) * took / foreseen)


def test_dry_run_refuses_what_the_run_would(there):
    (there / "mine").mkdir(exist_ok=True)
    (there / "mine" / "thesis.txt").write_text("kept")
    words = ["quantize", "model", "--method", "gptq", *SMALL, "--dry-run"]
    for more in (
        ["--out", "mine"],
        ["--out", "mine", "--overwrite"],
        ["--out", "text.txt/x"],
        ["--out", "new", "--resume"],
    ):
        assert refused(*words, *more) == refused(*[w for w in words if w != "--dry-run"], *more)
    (there / "short.txt").write_text("few words")
    short = ["short.txt" if w == "text.txt" else "64" if w == "16" else w for w in words]
    assert "short" in refused(*short)
    assert "--dry-run" in refused("quantize", "model", "--method", "gptq", *SMALL, "--out", "new", "--measure")
    assert set(METHODS) <= set(all_methods())


def reason(*words):
    """A refusal, without the stages that come before it."""
    return refused(*words).partition("error:")[2]


def outlook(*words):
    return json.loads(done(*words, "--dry-run", "--json", "-"))


COMMANDS = {
    "sparsify": ["sparsify", "model", "--method", "teal", "--samples", "64", *SMALL[4:]],
    "analyze": ["analyze", "model", *SMALL[2:]],
    "fit": ["fit", "model", "--bpw", "4.25", "--schemes", "w3a16-g32,w4a16-g32", *SMALL[2:]],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_other_commands_have_a_dry_run(there, name):
    before = sorted(p.name for p in there.iterdir())
    found = outlook(*COMMANDS[name], "--out", "new")
    assert found["total_seconds"] > 0 and found["peak_bytes"] > 1e6 and found["seconds"]["embed"] > 0
    printed = done(*COMMANDS[name], "--dry-run", "--out", "new")
    assert "time about" in printed and "memory about" in printed
    assert sorted(p.name for p in there.iterdir()) == before


def test_a_fit_takes_as_long_as_the_busiest_of_its_processes(there, monkeypatch):
    words = [*COMMANDS["fit"], "--samples", "8"]
    alone = outlook(*words)["seconds"]
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    shared = outlook(*words)
    for phase in ("forward", "head"):
        assert shared["seconds"][phase] == pytest.approx(alone[phase] / 2)
    assert all(shared["seconds"][phase] < alone[phase] for phase in ("backward", "choice"))
    assert shared["processes"] == 2 and "in each of 2 processes" in done(*words, "--dry-run")
    assert busiest(Sweep({}, {}, False, 16), 3) == (6, 2), "lanes of two windows, of which probes see two lanes"


WRONG = {
    "sparsify": [["--target", "2"], ["--skip-bytes", "0.9", "--target", "0.5"], ["--samples", "1"], ["--method", "x"]],
    "analyze": [["--gated"], ["--samples", "2", "--clipped-softmax"], ["--resume"], ["--sensitivity", "w4"]],
    "fit": [["--bpw", "1"], ["--method", "x"], ["--size", "1MB"], ["--schemes", "w9"], ["--max-ppl-increase", "x"]],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_their_dry_run_refuses_what_they_would(there, name):
    (there / "mine").mkdir(exist_ok=True)
    (there / "mine" / "thesis.txt").write_text("kept")
    (there / "short.txt").write_text("few")
    everywhere = [
        ["--dataset", "no.txt"],
        ["--dataset", "short.txt", "--seq-len", "64"],
        ["--device", "tpu"],
        ["--dtype", "int8"],
    ]
    for more in [*everywhere, *WRONG[name]]:
        words = [*COMMANDS[name], *more]
        assert reason(*words, "--dry-run") == reason(*words, "--out", "new"), more
        assert not (there / "new").exists()
    assert reason(*COMMANDS[name], "--out", "mine", "--dry-run") == reason(*COMMANDS[name], "--out", "mine")
    assert "--dry-run" in refused(*COMMANDS[name], "--out", "new", "--json", "x.json")
