"""The output folder of a run: work happens in ``DIR.partial``, and DIR appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.checkpoint import disk_errors, sync_folder, write_atomically
from calibration.errors import ToolkitError

PLAN_FILE = "plan.json"
BLOCKS = "blocks"


@dataclass(frozen=True)
class Session:
    """One run's folders."""

    out: Path

    @property
    def partial(self) -> Path:
        return self.out.with_name(self.out.name + ".partial")

    @property
    def blocks(self) -> Path:
        """Committed blocks, removed at the end."""
        return self.partial / BLOCKS

    def check(self, overwrite: bool, resume: bool) -> None:
        """Refuse folders that hold something, before any work.

        Raises:
            ToolkitError: DIR is not empty, DIR.partial is there without ``resume``, or is not there with it.
        """
        if self.out.exists() and not self.out.is_dir():
            raise ToolkitError(f"--out {self.out}: is a file", "name a folder")
        if self.out.is_dir() and any(self.out.iterdir()) and not overwrite:
            raise ToolkitError(
                f"--out {self.out}: the folder is not empty", "choose another folder, or pass --overwrite to replace it"
            )
        if self.partial.exists() and not (resume or overwrite):
            raise ToolkitError(
                f"{self.partial}: an interrupted run is here",
                "pass --resume to continue it, or --overwrite to start again",
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
            for key in dict.fromkeys([*before, *identity]):
                old, new = before.get(key), json.loads(json.dumps(identity.get(key)))
                if old != new:
                    raise ToolkitError(
                        f"--resume: '{key}' differs from the interrupted run: {new!r}, was {old!r}",
                        "repeat the command of the interrupted run, or pass --overwrite to start again",
                    )
            return
        with disk_errors(self.partial):
            if self.partial.exists():
                shutil.rmtree(self.partial)
            self.partial.mkdir(parents=True)
        write_atomically(path, (json.dumps(identity, indent=1, sort_keys=True) + "\n").encode())

    def finish(self) -> None:
        """Remove what only the run needed and rename DIR.partial to DIR; an old DIR is deleted last."""
        shutil.rmtree(self.blocks, ignore_errors=True)
        (self.partial / PLAN_FILE).unlink()
        for path in sorted(self.partial.iterdir()):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(self.partial)
        replaced = None
        if self.out.exists():
            replaced = self.out.with_name(self.out.name + ".replaced")
            self.out.rename(replaced)
        self.partial.rename(self.out)
        sync_folder(self.out.parent)
        if replaced is not None:
            shutil.rmtree(replaced)
