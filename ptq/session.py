"""The output of a run: work happens in ``DIR.partial``, and DIR (or the one file of GGUF) appears whole or not at all.

``plan.json`` says which run a folder belongs to. It stays in DIR: were it removed before the rename, a run killed
between the two could not be resumed; and ``--overwrite`` replaces nothing that does not carry one.
"""

from __future__ import annotations

import json
import os
import shutil
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from calibration.errors import ToolkitError, short_of_memory
from calibration.model.checkpoint import disk_errors, sync_folder, write_atomically
from calibration.model.gguf import file_of
from calibration.model.reading import read_json
from ptq.lock import Lock, locked_targets

PLAN_FILE = "plan.json"
BLOCKS = "blocks"
SINGLE_SUFFIX = ".gguf"
SINGLE_FILE = "model.gguf"
"""The name of that file inside DIR.partial."""
BESIDE = ("report.json", "report.html")
"""What goes beside a result of one file, under its name: ``FILE.report.json``."""
PROGRAM = ("program", "ptq")  # the entry by which a plan.json of ours is known
_MISSING = "nothing"


class Session:
    """One run's folders, locked for other processes as long as it lives.

    Attributes:
        out: DIR, as the user named it.
        target: DIR without ``.``, ``..`` and links, resolved once: the current folder may be renamed on the way.
        partial: where the work happens.
        replaced: where an old DIR waits while the new one takes its name.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        try:
            self.target = out.resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, an impossible name
            raise ToolkitError(f"--out {str(out)[:200]}: not a possible folder ({error})", "name another") from None
        self.partial = self.target.with_name(self.target.name + ".partial") if self.target.name else self.target
        self.replaced = self.target.with_name(f".{self.target.name}.ptq-replaced") if self.target.name else self.target
        self._lock: Lock | None = None

    @property
    def single(self) -> bool:
        """The result is one file (GGUF), not a folder."""
        return self.out.suffix.lower() == SINGLE_SUFFIX

    @property
    def blocks(self) -> Path:
        """Committed blocks, removed at the end."""
        return self.partial / BLOCKS

    def check(self, overwrite: bool, resume: bool, source: Path | None = None, resumable: bool = True) -> None:
        """Lock the folder, and refuse one that holds something, before any work.

        Args:
            source: the model's folder, which must outlive the run.
            resumable: whether the command has a ``--resume``.

        Raises:
            ToolkitError: another process writes there; DIR is not empty, or is no output of ours with ``overwrite``;
                DIR.partial is there without ``resume``, or is not there with it; DIR is or holds ``source``.
        """
        self._check_place(source)
        self._lock = self._lock or Lock(self.target)
        if self.replaced.exists() and not self.target.exists() and not self.partial.exists():
            self.replaced.rename(self.target)  # an old run was killed between its two renames: nothing else has it
        self._check_contents(overwrite, resume, resumable)

    def look(self, overwrite: bool, resume: bool, source: Path | None = None, resumable: bool = True) -> None:
        """For a plan: refuse what `check` would, and write nothing.

        Raises:
            ToolkitError: see `check`; no folder can be made there.
        """
        self._check_place(source)
        if Lock.path_of(self.target).exists():
            Lock(self.target).release()
        there = next(folder for folder in self.target.parents if folder.exists())
        if not os.access(there, os.W_OK):
            raise ToolkitError(f"{self.target}: not writable ({there} belongs to others)", "choose another place")
        self._check_contents(overwrite, resume, resumable)

    def _check_place(self, source: Path | None) -> None:
        if not self.target.name:
            raise ToolkitError(f"--out {self.out}: cannot be replaced", "name a folder below it")
        with disk_errors(self.target):
            for folder in (*([] if self.single else [self.target]), *self.target.parents):
                if folder.exists():
                    if not folder.is_dir():
                        raise ToolkitError(f"--out {self.out}: {folder} is a file", "name a folder")
                    break
        if self.single and self.target.exists() and not self.target.is_file():
            what = "a folder" if self.target.is_dir() else "no regular file"
            raise ToolkitError(f"--out {self.out}: {self.target} is {what}, and gguf is one file", "name a new file")
        if source is not None and (file_of(source) or source).resolve().is_relative_to(self.target):
            raise ToolkitError(
                f"--out {self.out}: the model that is read ({file_of(source) or source}) is there",
                f"choose another output {'file' if self.single else 'folder'}",
            )

    def _check_contents(self, overwrite: bool, resume: bool, resumable: bool) -> None:
        if self.single and self.target.is_file() and not overwrite:
            raise ToolkitError(f"--out {self.out}: is there already", "choose another file, or pass --overwrite")
        if self.target.is_dir() and any(self.target.iterdir()) and not resume:
            if not overwrite:
                raise ToolkitError(
                    f"--out {self.out}: the folder is not empty",
                    "choose another folder, or pass --overwrite to replace it",
                )
            self._ours(self.target)
        if resume and not (self.partial / PLAN_FILE).exists():
            raise ToolkitError(f"--resume: {self.partial} holds no interrupted run", "leave --resume out to start one")
        if not self._empty(self.partial) and not resume:
            if not overwrite and (self.partial / PLAN_FILE).exists():
                restart = "--overwrite to start again"
                raise ToolkitError(
                    f"{self.partial}: an interrupted run is here",
                    f"pass --resume to continue it, or {restart}" if resumable else f"pass {restart}",
                )
            self._ours(self.partial)

    @staticmethod
    def _empty(folder: Path) -> bool:
        """Whether nothing is lost with a folder: it is not there, or a run was killed before it wrote anything."""
        return not folder.exists() or (folder.is_dir() and all(p.name.endswith(".tmp") for p in folder.iterdir()))

    def _ours(self, folder: Path) -> None:
        """Refuse to replace what no run of ours has written."""
        with suppress(ToolkitError):
            if read_json(folder / PLAN_FILE).get(PROGRAM[0]) == PROGRAM[1]:
                return
        raise ToolkitError(
            f"{folder}: holds files that no run of ptq has written (its {PLAN_FILE} is missing or of another program)",
            "choose another --out, or empty the folder yourself",
        )

    def begin(self, identity: Mapping[str, Any], resume: bool) -> None:
        """Create DIR.partial for this run, or make sure that the one there is of the same run.

        What lies in a DIR.partial that is resumed and is made again anyway, or is no work of ours, is removed.

        Raises:
            ToolkitError: it is of another run; names the field that differs.
        """
        path = self.partial / PLAN_FILE
        plan = {**identity, PROGRAM[0]: PROGRAM[1]}
        if resume:
            before = read_json(path, "pass --overwrite without --resume to start again")
            for field, new, old in _differences("", json.loads(json.dumps(plan)), before):
                raise ToolkitError(
                    f"--resume: '{field}' differs from the interrupted run: {new!r}, was {old!r}",
                    "repeat the command of the interrupted run, or pass --overwrite without --resume to start again",
                )
            return
        with disk_errors(self.partial):
            if self.partial.exists():
                shutil.rmtree(self.partial)
            self.partial.mkdir(parents=True)
        try:
            write_atomically(path, (json.dumps(plan, indent=1, sort_keys=True) + "\n").encode())
        except BaseException:
            shutil.rmtree(self.partial, ignore_errors=True)  # a full disk: without its plan it is of no use
            raise

    def keep(self, names: frozenset[str]) -> None:
        """Remove from DIR.partial all but the plan and ``names``: what a resumed run makes again, and strangers."""
        for path in sorted(self.partial.iterdir()):
            if path.name != PLAN_FILE and path.name not in names:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    @contextmanager
    def unless_done(self) -> Iterator[None]:
        """Remove DIR.partial where the work inside fails, for work that cannot be resumed."""
        try:
            yield
        except BaseException as error:
            if short_of_memory(error):  # removing takes some, and what the frames of the error hold may be all there is
                traceback.clear_frames(error.__traceback__)
            shutil.rmtree(self.partial, ignore_errors=True)
            if self.partial.exists():
                error.add_note(f"{self.partial} could not be removed: delete it, then the same command starts anew")
            self.release()
            raise

    def finish(self) -> None:
        """Remove what only the run needed and rename DIR.partial to DIR. An old DIR is deleted last, and comes back
        where the new one cannot take its name."""
        shutil.rmtree(self.blocks, ignore_errors=True)
        for path in sorted(self.partial.iterdir()):
            if path.name.startswith(".tmp") or path.name.endswith(".tmp"):
                path.unlink()  # of a run that was killed while it wrote; safetensors has names of its own for these
                continue
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(self.partial)
        if self.single:
            self._finish_file()
            self.release()
            return
        here = _current()
        with disk_errors(self.target):
            if self.target.exists():
                if self.replaced.exists():
                    shutil.rmtree(self.replaced)
                self.target.rename(self.replaced)
            try:
                self.partial.rename(self.target)
            except OSError:
                if self.replaced.exists() and not self.target.exists():
                    self.replaced.rename(self.target)
                raise
            sync_folder(self.target.parent)
            if here is not None and here.is_relative_to(self.target) and here.is_dir():
                os.chdir(here)  # `--out .`: the folder that was current is the one that is deleted now
            if self.replaced.exists():
                shutil.rmtree(self.replaced)
        self.release()

    def _finish_file(self) -> None:
        """The file takes its name last, when all else is in place."""
        for name in BESIDE:
            beside = self.target.with_suffix(f".{name}")
            if (self.partial / name).is_file():
                (self.partial / name).replace(beside)
            elif self.target.exists():
                beside.unlink(missing_ok=True)  # it told of the file that is replaced
        (self.partial / SINGLE_FILE).replace(self.target)
        sync_folder(self.target.parent)
        shutil.rmtree(self.partial)

    def follow(self) -> None:
        """This process shares a run that another one writes: see `interrupted`."""
        global _followed
        _followed = self.target

    def release(self) -> None:
        """Let other processes write to DIR again."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


_followed: Path | None = None


def interrupted() -> Path | None:
    """The DIR.partial of the run that this process was writing or sharing, and that can be resumed; None where there
    is none."""
    targets = sorted(locked_targets(), key=lambda path: len(path.parts))  # the runs of a study lie inside its own
    targets += [_followed] if _followed is not None else []
    partials = [target.with_name(f"{target.name}.partial") for target in targets]
    return next((partial for partial in partials if (partial / PLAN_FILE).exists()), None)


def _current() -> Path | None:
    """The current folder, None where it was deleted."""
    try:
        return Path.cwd()
    except OSError:
        return None


def _differences(field: str, new: Any, old: Any) -> Iterator[tuple[str, Any, Any]]:
    """Leaves that differ between two JSON values: (path such as ``recipe.passes.0.grid``, new value, old value)."""
    if isinstance(new, dict) and isinstance(old, dict):
        pairs = [(key, new.get(key, _MISSING), old.get(key, _MISSING)) for key in dict.fromkeys([*new, *old])]
    elif isinstance(new, list) and isinstance(old, list) and len(new) == len(old):
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(new, old, strict=True))]
    else:
        if new != old:
            yield field, new, old
        return
    for key, a, b in pairs:
        yield from _differences(f"{field}.{key}" if field else key, a, b)
