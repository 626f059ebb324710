"""The same command gives the same bytes: twice, after interruptions at any place, and after kill -9."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import done, environment, products, refused, run_ptq, text_file, tiny

import calibration.model.checkpoint
import calibration.walk.finished
import ptq.formats.write
import ptq.run.pipeline
import ptq.session
from calibration.record import read_timings
from ptq.session import PLAN_FILE, Session

METHODS = ("rtn", "gptq", "gptaq", "awq", "awq+gptq")
MODELS = ("llama", "qwen3_moe")
QUICK = (("llama", "gptaq"), ("qwen3_moe", "rtn"), ("qwen3_moe", "awq+gptq"))
"""A float stream beside the quantized one, no text at all, statistics of experts; the others are slow."""


class Killed(BaseException):
    """Stands for kill -9: nothing of ours may catch it."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a dense model and a mixture of experts."""
    folder = tmp_path_factory.mktemp("resume")
    text_file(folder / "text.txt")
    for method, recipe in RECIPES.items():
        (folder / f"{method}.toml").write_text(recipe)
    for family in MODELS:
        tiny(folder / family, family)
    return folder


AWQ = '[[pass]]\nname = "awq"\ngrid = 3\nclip_steps = 2\n'  # a small search: what is tested here is its bytes
RECIPES = {"awq": AWQ, "awq+gptq": AWQ + '[[pass]]\nname = "gptq"\n'}


def command(place: Path, method: str, model: str, out: Path) -> list[str | Path]:
    how = ["--recipe", place / f"{method}.toml"] if method in RECIPES else ["--method", method]
    words = ["quantize", place / model, *how, "--scheme", "w4a16-g32", "--out", out]
    return [*words, "--dataset", place / "text.txt", "--samples", "4", "--seq-len", "24"]


CASES = [
    pytest.param((model, method), marks=() if (model, method) in QUICK else pytest.mark.slow, id=f"{model}-{method}")
    for model in MODELS
    for method in METHODS
]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, place: Path) -> tuple[str, str, dict[str, bytes]]:
    """Model, method, and the files of an uninterrupted run."""
    model, method = request.param
    out = place / f"whole-{model}-{method}"
    done(*command(place, method, model, out))
    return model, method, products(out)


def kill_after(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, calls: int) -> None:
    """Make the run die after so many calls of a function."""
    original, left = getattr(owner, name), [calls]

    def counted(*args: object, **named: object) -> object:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return original(*args, **named)

    monkeypatch.setattr(owner, name, counted)


def interrupted(words: list[str | Path]) -> None:
    with pytest.raises(Killed):
        run_ptq(*words)
    assert not Path(words[words.index("--out") + 1]).exists(), "the folder appears only at the end"


def test_two_runs_give_the_same_bytes(case, place, tmp_path):
    model, method, expected = case
    done(*command(place, method, model, tmp_path / "again"))
    assert products(tmp_path / "again") == expected and "report.html" in expected


def test_resumed_after_every_block(case, place, tmp_path):
    model, method, expected = case
    for finished in (0, 1, 2):
        words = command(place, method, model, tmp_path / f"after-{finished}")
        with pytest.MonkeyPatch.context() as patch:
            if finished < 2:
                kill_after(patch, calibration.walk.finished, "save_tensors", finished)
            else:
                kill_after(patch, ptq.run.pipeline, "write_checkpoint", 0)
            interrupted(words)
        done(*words, "--resume")
        assert products(tmp_path / f"after-{finished}") == expected
        assert read_timings(tmp_path / f"after-{finished}").resumed_from == finished
    assert sorted(p.name for p in tmp_path.iterdir()) == ["after-0", "after-1", "after-2"]


PLACES = [
    (ptq.run.pipeline, "walk_of", 0),
    (calibration.walk.finished, "write_atomically", 0),
    (calibration.walk.finished, "save_tensors", 0),
    (calibration.model.checkpoint, "save_file", 1),
    (calibration.model.checkpoint, "sync_folder", 3),
    (ptq.formats.write.ShardWriter, "finish", 0),
    (ptq.formats.write, "write_atomically", 0),
    (ptq.run.pipeline, "copy_small_files", 0),
    (ptq.run.pipeline, "verify_checkpoint", 0),
    (ptq.run.pipeline, "write_reports", 0),
    (Session, "finish", 0),
    (ptq.session, "sync_folder", 0),
]


@pytest.mark.parametrize(("owner", "name", "calls"), PLACES, ids=[f"{name}-{n}" for _, name, n in PLACES])
def test_resumed_from_any_stage(place, tmp_path, monkeypatch, owner, name, calls):
    expected = run_once(place)
    words = command(place, "gptq", "llama", tmp_path / "out")
    kill_after(monkeypatch, owner, name, calls)
    interrupted(words)
    assert "an interrupted run is here" in refused(*words)
    monkeypatch.undo()
    done(*words, "--resume")
    assert products(tmp_path / "out") == expected and [p.name for p in tmp_path.iterdir()] == ["out"]


def run_once(place: Path, made: dict[Path, dict[str, bytes]] = {}) -> dict[str, bytes]:  # noqa: B006
    """The files of one uninterrupted GPTQ run, made once."""
    if place not in made:
        done(*command(place, "gptq", "llama", place / "once"))
        made[place] = products(place / "once")
    return made[place]


def test_leftovers_of_a_killed_writer_do_not_matter(place, tmp_path, monkeypatch):
    words = command(place, "gptq", "llama", tmp_path / "out")
    kill_after(monkeypatch, ptq.run.pipeline, "write_checkpoint", 0)
    interrupted(words)
    monkeypatch.undo()
    partial = tmp_path / "out.partial"
    (partial / "blocks" / "block-00001.safetensors").unlink()
    for name in ("blocks/block-00001.safetensors.tmp", "blocks/.tmpAbC", ".tmpXyZ123", "config.json.tmp"):
        (partial / name).write_bytes(b"half")
    for name in (
        "shard-00000.safetensors.part",
        "shard-00007.safetensors.part.tmp",
        "model-00001-of-00002.safetensors",
    ):
        (partial / name).write_bytes(b"half")
    done(*words, "--resume")
    assert products(tmp_path / "out") == run_once(place)


CHANGES = [
    (["--method", "rtn"], "recipe.method"),
    (["--scheme", "w3a16-g32"], "recipe.schemes.0.scheme"),
    (["--seed", "1"], "calibration."),
    (["--samples", "3"], "calibration."),
    (["--format", "native"], "format"),
    (["--unseen-experts", "rtn"], "unseen_experts"),
    (["--dtype", "bfloat16"], "forward"),
]


@pytest.fixture(scope="module")
def unfinished(place: Path) -> Path:
    """The folder of a run that died after its first block."""
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, calibration.walk.finished, "save_tensors", 1)
        interrupted(command(place, "gptq", "llama", place / "unfinished"))
    return place / "unfinished"


@pytest.mark.parametrize(("change", "field"), CHANGES, ids=[c[0].removeprefix("--") for c, _ in CHANGES])
def test_resume_with_another_option_names_it(place, unfinished, change, field):
    before = products(unfinished.with_name("unfinished.partial"))
    words = command(place, "gptq", "llama", unfinished)
    if change[0] in words:
        words[words.index(change[0]) + 1] = change[1]
        change = []
    message = refused(*words, *change, "--resume")
    assert f"--resume: '{field}" in message and "differs from the interrupted run" in message
    assert products(unfinished.with_name("unfinished.partial")) == before and not unfinished.exists()


def test_overwrite_keeps_the_old_folder_until_the_new_one_is_whole(place, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    words = [*command(place, "gptq", "llama", out), "--overwrite"]
    assert "holds files that no run of ptq has written" in refused(*words)
    (out / PLAN_FILE).write_text('{"program": "ptq"}')
    for owner, name in ((calibration.walk.finished, "save_tensors"), (Session, "finish")):
        kill_after(monkeypatch, owner, name, 0)
        with pytest.raises(Killed):
            run_ptq(*words)
        monkeypatch.undo()
        assert sorted(p.name for p in out.iterdir()) == ["old.txt", PLAN_FILE]
    kill_after(monkeypatch, Path, "rename", count_renames(place, tmp_path))
    with pytest.raises(Killed):  # between the two renames at the very end: the old folder waits beside
        run_ptq(*words)
    monkeypatch.undo()
    assert not out.exists() and (tmp_path / ".out.ptq-replaced" / "old.txt").read_text() == "old"
    done(*words, "--resume")
    assert products(out) == run_once(place) and [p.name for p in tmp_path.iterdir()] == ["out"]


def count_renames(place: Path, tmp_path: Path) -> int:
    """Renames in a run that replaces a folder, but the last."""
    calls, original = [0], Path.rename

    def counted(self: Path, target: Path) -> Path:
        calls[0] += 1
        return original(self, target)

    out = tmp_path / "counted"
    out.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", counted)
        done(*command(place, "gptq", "llama", out))
    shutil.rmtree(out)
    return calls[0] - 1


def test_a_full_disk_is_resumed_when_there_is_room(place, tmp_path, monkeypatch):
    words = command(place, "gptq", "llama", tmp_path / "out")
    original, left = calibration.model.checkpoint.save_file, [2]

    def full(*args: object, **named: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(*args, **named)

    monkeypatch.setattr(calibration.model.checkpoint, "save_file", full)
    message = refused(*words)
    assert "the disk is full" in message and "--resume" in message and not (tmp_path / "out").exists()
    monkeypatch.undo()
    done(*words, "--resume")
    assert products(tmp_path / "out") == run_once(place)


@pytest.mark.slow
def test_kill_9_at_a_random_point(place, tmp_path):
    """A real process, a real SIGKILL. More points and real models: benchmarks/kill_resume.py."""
    words = list(map(str, command(place, "awq+gptq", "llama", tmp_path / "out")))
    line = [sys.executable, "-m", "cli.main", *words]
    begun = time.monotonic()
    subprocess.run(line, check=True, capture_output=True, env=environment())
    seconds, expected = time.monotonic() - begun, products(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    generator, killed = random.Random(0), 0
    while killed < 2:
        run = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
        partial = tmp_path / "out.partial"
        while not partial.exists() and run.poll() is None:
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.2 * seconds))
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        if partial.exists():
            killed += 1
            assert not (tmp_path / "out").exists()
            subprocess.run([*line, "--resume"], check=True, capture_output=True, env=environment())
        assert products(tmp_path / "out") == expected
        shutil.rmtree(tmp_path / "out")
