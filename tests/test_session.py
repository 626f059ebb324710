"""The output folder: nothing is lost in it, and one process at a time writes there."""

from __future__ import annotations

import os
import shutil
import signal
import time
import weakref
from pathlib import Path

import pytest
import torch
from command import done, products, refused, run_ptq, text_file, tiny

import calibration.walk.finished
import ptq.run.pipeline
from calibration.errors import ToolkitError
from calibration.model.contents import small_files
from calibration.model.reading import inside
from ptq.session import PLAN_FILE, Session, interrupted

OURS = '{"program": "ptq"}'


def finished(out: Path, overwrite: bool = False) -> None:
    """A run that writes one file."""
    session = Session(out)
    session.check(overwrite, resume=False)
    session.begin({"run": 1}, resume=False)
    (session.partial / "new").write_text("new")
    session.finish()


def test_the_current_folder_is_replaced_and_stays_current(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    (home / PLAN_FILE).write_text(OURS)
    (home / "old").write_text("old")
    monkeypatch.chdir(home)
    finished(Path("."), overwrite=True)
    assert sorted(p.name for p in home.iterdir()) == ["new", PLAN_FILE] and Path("new").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["home"]


def test_a_link_names_the_folder_behind_it(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    finished(tmp_path / "link")
    assert (tmp_path / "real" / "new").exists() and (tmp_path / "link").is_symlink()


def test_only_what_a_run_has_written_is_replaced(tmp_path):
    for name in ("out", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis").write_text("years")
        with pytest.raises(ToolkitError, match="holds files that no run of ptq has written"):
            finished(tmp_path / "out", overwrite=True)
        assert (tmp_path / name / "thesis").read_text() == "years"
        (tmp_path / name / "thesis").unlink()
        (tmp_path / name).rmdir()


def test_killed_before_the_plan_was_written_is_no_dead_end(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "plan.json.tmp").write_text("{")
    finished(tmp_path / "out")
    assert (tmp_path / "out" / "new").exists()


def test_the_old_folder_comes_back_where_the_new_one_cannot_take_its_name(tmp_path, monkeypatch):
    out = tmp_path / "out"
    finished(out)
    (out / "new").write_text("old")
    original, renames = Path.rename, []

    def second_fails(path: Path, target: Path) -> Path:
        renames.append(target.name)
        if target.name == "out" and renames.count("out") == 1:
            raise OSError(5, "Input/output error")
        return original(path, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(ToolkitError, match="Input/output error"):
        finished(out, overwrite=True)
    assert (out / "new").read_text() == "old" and (tmp_path / "out.partial" / "new").read_text() == "new"


def test_one_process_at_a_time(tmp_path):
    """A forked process holds the folder; this one is refused, by its number, until it has ended."""
    out, ready = tmp_path / "out", tmp_path / "ready"
    child = os.fork()
    if child == 0:
        try:
            session = Session(out)
            session.check(overwrite=False, resume=False)
            ready.write_text("")
            time.sleep(60)
        finally:
            os._exit(0)
    while not ready.exists():
        time.sleep(0.01)
    with pytest.raises(ToolkitError, match=f"process {child} is writing there"):
        finished(out)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    finished(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "ready"], "the lock is gone with the run"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("session")
    text_file(folder / "text.txt")
    tiny(folder / "model", intermediate_size=64)
    return folder


def words(place: Path, out: Path) -> list[str | Path]:
    small = ["--dataset", place / "text.txt", "--samples", "2", "--seq-len", "16", "--scheme", "w4a16-g32"]
    return ["quantize", place / "model", "--method", "gptq", *small, "--out", out]


def stop(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, how: object, calls: int = 0) -> None:
    """Interrupt the run at a call of a function, by an exception or by a signal to this process."""
    original, left = getattr(owner, name), [calls]

    def interrupting(*args: object, **named: object) -> object:
        if left[0]:
            left[0] -= 1
            return original(*args, **named)
        if isinstance(how, signal.Signals):
            os.kill(os.getpid(), how)
            time.sleep(5)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupting)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_say_what_is_kept_and_how_to_go_on(place, tmp_path, monkeypatch, number):
    command = words(place, tmp_path / "out")
    stop(monkeypatch, ptq.run.pipeline, "write_checkpoint", number)
    result = run_ptq(*command)
    assert result.code == 128 + number and "Traceback" not in result.err
    assert f"{tmp_path}/out.partial keeps what is finished" in result.err
    assert result.err.rstrip().endswith(" ".join(map(str, ["ptq", *command, "--resume"])))
    monkeypatch.undo()
    assert interrupted() is None, "nothing is locked any more"
    done(*command, "--resume")


def test_commands_without_resume_clean_up(place, tmp_path, monkeypatch):
    import ptq.conversion

    done(*words(place, tmp_path / "q"))
    stop(monkeypatch, ptq.conversion, "write_checkpoint", signal.SIGTERM)
    result = run_ptq("export", tmp_path / "q", "--format", "native", "--out", tmp_path / "out")
    assert result.code == 143 and "nothing is left of it" in result.err
    assert [p.name for p in tmp_path.iterdir()] == ["q"]


def test_without_memory_what_was_held_is_let_go_before_the_folder_is_removed(place, tmp_path, monkeypatch):
    import ptq.conversion
    import ptq.session

    done(*words(place, tmp_path / "q"))
    held: list[weakref.ref[torch.Tensor]] = []

    def write(*_, **__):
        largest = torch.zeros(9)
        held.append(weakref.ref(largest))
        raise MemoryError

    def remove(path, ignore_errors):
        seen.append(held[-1]() is None)

    seen: list[bool] = []
    command = ["export", tmp_path / "q", "--format", "native", "--out", tmp_path / "out"]
    monkeypatch.setattr(ptq.conversion, "write_checkpoint", write)
    message = refused(*command)
    assert "no memory is left" in message and "nothing is left of it" in message
    monkeypatch.setattr(ptq.session.shutil, "rmtree", remove)
    message = refused(*command)
    assert seen == [True] and f"{tmp_path}/out.partial could not be removed" in message
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "out.partial")
    done(*command)


def test_damaged_and_foreign_files_of_an_interrupted_run(place, tmp_path, monkeypatch):
    """One flipped bit, an edited record, a stray file: the result is that of an undisturbed run."""
    done(*words(place, tmp_path / "whole"))
    expected = products(tmp_path / "whole")
    for kind in ("bit", "record", "stray"):
        out = tmp_path / kind
        with monkeypatch.context() as patch:
            stop(patch, calibration.walk.finished, "save_tensors", None, calls=1)
            assert run_ptq(*words(place, out)).code == 130
        partial = tmp_path / f"{kind}.partial"
        block, record = (partial / "blocks" / f"block-00000.{end}" for end in ("safetensors", "json"))
        if kind == "bit":
            data = bytearray(block.read_bytes())
            data[-1] ^= 1
            block.write_bytes(bytes(data))
        elif kind == "record":
            record.write_text(record.read_text().replace('"scheme": "w4', '"scheme": "w8'))
        else:
            (partial / "stray.txt").write_text("not ours")
        done(*words(place, out), "--resume")
        assert products(out) == expected, kind


@pytest.mark.parametrize(("name", "field"), [("model.safetensors", "weights"), ("tokenizer_config.json", "files")])
def test_another_model_is_not_gone_on_with(place, tmp_path, monkeypatch, name, field):
    path = place / "model" / name
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        stop(patch, calibration.walk.finished, "save_tensors", None, calls=1)
        assert run_ptq(*words(place, tmp_path / "out")).code == 130
    changed = before[:-2] + bytes([before[-2] ^ 1, before[-1]]) if field == "weights" else before + b"\n"
    try:
        path.write_bytes(changed)
        assert f"'{field}' differs" in refused(*words(place, tmp_path / "out"), "--resume")
    finally:
        path.write_bytes(before)
    done(*words(place, tmp_path / "out"), "--resume")


def test_a_folder_where_a_block_was(place, tmp_path, monkeypatch):
    """It is made again, whatever stands in its place."""
    done(*words(place, tmp_path / "whole"))
    stop(monkeypatch, ptq.run.pipeline, "write_checkpoint", signal.SIGTERM)
    assert run_ptq(*words(place, tmp_path / "out")).code == 143
    monkeypatch.undo()
    for name in ("block-00000.json", "block-00001.safetensors"):
        (tmp_path / "out.partial" / "blocks" / name).unlink()
        (tmp_path / "out.partial" / "blocks" / name).mkdir()
    done(*words(place, tmp_path / "out"), "--resume")
    assert products(tmp_path / "out") == products(tmp_path / "whole")


def test_a_link_to_itself_is_no_file_of_a_checkpoint(tmp_path):
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    assert not inside(tmp_path / "loop.json", tmp_path) and small_files(tmp_path) == []
