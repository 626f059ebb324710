"""The output of a run: work happens in ``DIR.partial``, and DIR (or the one file of GGUF) appears whole or not at all.

``plan.json`` says which run a folder belongs to. It stays in DIR: were it removed before the rename, a run killed
between the two could not be resumed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.errors import ToolkitError
from calibration.model.checkpoint import disk_errors, sync_folder, write_atomically

PLAN_FILE = "plan.json"
BLOCKS = "blocks"
SINGLE_SUFFIX = ".gguf"
SINGLE_FILE = "model.gguf"
"""The name of that file inside DIR.partial."""
BESIDE = ("report.json", "report.html")
"""What goes beside a result of one file, under its name: ``FILE.report.json``."""
_MISSING = "nothing"


@dataclass(frozen=True)
class Session:
    """One run's folders.

    Attributes:
        out: DIR, as the user named it.
    """

    out: Path

    @property
    def target(self) -> Path:
        """DIR without ``.``, ``..`` and links, so that it can be renamed and has neighbours."""
        return self.out.resolve()

    @property
    def single(self) -> bool:
        """The result is one file (GGUF), not a folder."""
        return self.out.suffix == SINGLE_SUFFIX

    @property
    def partial(self) -> Path:
        return self.target.with_name(self.target.name + ".partial")

    @property
    def replaced(self) -> Path:
        """Where an old DIR waits while the new one takes its name."""
        return self.target.with_name(f".{self.target.name}.ptq-replaced")

    @property
    def blocks(self) -> Path:
        """Committed blocks, removed at the end."""
        return self.partial / BLOCKS

    def check(self, overwrite: bool, resume: bool, source: Path | None = None, resumable: bool = True) -> None:
        """Refuse folders that hold something, before any work.

        Args:
            source: the model's folder, which must outlive the run.
            resumable: whether the command has a ``--resume``.

        Raises:
            ToolkitError: DIR is not empty, DIR.partial is there without ``resume``, or is not there with it; DIR is
                or holds ``source``.
        """
        if not self.target.name:
            raise ToolkitError(f"--out {self.out}: cannot be replaced", "name a folder below it")
        for folder in (*([] if self.single else [self.target]), *self.target.parents):
            if folder.exists():
                if not folder.is_dir():
                    raise ToolkitError(f"--out {self.out}: {folder} is a file", "name a folder")
                break
        if source is not None and source.resolve().is_relative_to(self.target):
            raise ToolkitError(
                f"--out {self.out}: the model that is read ({source}) is there", "choose another output folder"
            )
        if self.single and self.target.is_file() and not overwrite:
            raise ToolkitError(f"--out {self.out}: is there already", "choose another file, or pass --overwrite")
        if self.target.is_dir() and any(self.target.iterdir()) and not overwrite:
            raise ToolkitError(
                f"--out {self.out}: the folder is not empty", "choose another folder, or pass --overwrite to replace it"
            )
        if self.partial.exists() and not (resume or overwrite):
            restart = "--overwrite to start again"
            raise ToolkitError(
                f"{self.partial}: an interrupted run is here",
                f"pass --resume to continue it, or {restart}" if resumable else f"pass {restart}",
            )
        if resume and not (self.partial / PLAN_FILE).exists():
            raise ToolkitError(f"--resume: {self.partial} holds no interrupted run", "leave --resume out to start one")

    def begin(self, identity: Mapping[str, Any], resume: bool) -> None:
        """Create DIR.partial for this run, or make sure that the one there is of the same run.

        Raises:
            ToolkitError: it is of another run; names the field that differs.
        """
        path = self.partial / PLAN_FILE
        if resume:
            before = json.loads(path.read_text(encoding="utf-8"))
            for field, new, old in _differences("", json.loads(json.dumps(identity)), before):
                raise ToolkitError(
                    f"--resume: '{field}' differs from the interrupted run: {new!r}, was {old!r}",
                    "repeat the command of the interrupted run, or pass --overwrite without --resume to start again",
                )
            return
        with disk_errors(self.partial):
            if self.partial.exists():
                shutil.rmtree(self.partial)
            self.partial.mkdir(parents=True)
        write_atomically(path, (json.dumps(identity, indent=1, sort_keys=True) + "\n").encode())

    @contextmanager
    def unless_done(self) -> Iterator[None]:
        """Remove DIR.partial where the work inside fails, for work that cannot be resumed."""
        try:
            yield
        except BaseException:
            shutil.rmtree(self.partial, ignore_errors=True)
            raise

    def finish(self) -> None:
        """Remove what only the run needed and rename DIR.partial to DIR; an old DIR is deleted last."""
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
            return
        if self.target.exists():
            if self.replaced.exists():
                shutil.rmtree(self.replaced)
            self.target.rename(self.replaced)
        self.partial.rename(self.target)
        sync_folder(self.target.parent)
        if self.replaced.exists():
            shutil.rmtree(self.replaced)

    def _finish_file(self) -> None:
        """The file takes its name last, when all else is in place."""
        for name in BESIDE:
            if (self.partial / name).is_file():
                (self.partial / name).replace(self.target.with_suffix(f".{name}"))
        (self.partial / SINGLE_FILE).replace(self.target)
        sync_folder(self.target.parent)
        shutil.rmtree(self.partial)


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
