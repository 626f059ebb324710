"""Compile the C++ kernels on first use and keep the library in the user's cache.

One source, one library per instruction set: the name of the cached file is a hash of sources, flags and compiler, so a
home directory shared between machines never runs another machine's code, and an edited source is compiled again.
OpenMP comes from torch's own libgomp, which is in the process already: one pool of threads for both.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from calibration.errors import ToolkitError

SOURCES = ("gemv.cpp", "int4.cpp")
HEADERS = ("simd.h", "kept.h", "gemv.h", "int4.h")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp")
LEVELS: dict[str, tuple[str, ...]] = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
    "DEFAULT": (),
}
"""torch's name of an instruction set -> flags."""


def cpu_level() -> str:
    """The best of `LEVELS` that this machine runs, as torch found out; plain C++ on other processors."""
    found = torch.backends.cpu.get_cpu_capability()
    return found if found in LEVELS else "DEFAULT"


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/ptq/kernels``, by default in ``~/.cache``. A relative path there is not honoured, as the
    specification of base directories asks: code would be loaded from wherever the process happens to stand."""
    named = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (named if named.is_absolute() else Path.home() / ".cache") / "ptq" / "kernels"


def find_compiler() -> str:
    """Path of the C++ compiler: ``$CXX`` or the first of `COMPILERS`.

    Raises:
        ToolkitError: there is none.
    """
    names = [name for name in (os.environ.get("CXX"), *COMPILERS) if name]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise ToolkitError(
            f"C++ kernels: no compiler ({', '.join(names)}) on the PATH",
            "install g++ or clang++ (Debian: `apt install g++`), or run with the 'reference' kernel",
        )
    return found


@functools.cache
def library(level: str | None = None) -> ctypes.CDLL:
    """The kernels of this folder for one of `LEVELS`; None takes `cpu_level`. As `compiled`."""
    folder = Path(__file__).parent
    return compiled("sparse", [folder / name for name in SOURCES], [folder / name for name in HEADERS], level)


def compiled(name: str, sources: Sequence[Path], headers: Sequence[Path], level: str | None = None) -> ctypes.CDLL:
    """A library from C++ sources, for one of `LEVELS`; None takes `cpu_level`. Compiles for seconds if not cached.

    Args:
        name: that its file in the cache begins with.
        headers: what the sources include, found in the folders of both.

    Raises:
        ToolkitError: no compiler, or it failed; a cache that cannot be used, or that others can write to.
    """
    compiler = find_compiler()
    flags = (*FLAGS, *LEVELS[level or cpu_level()])
    content = b"".join(path.read_bytes() for path in (*sources, *headers))
    key = hashlib.sha256(content + repr((compiler, flags)).encode()).hexdigest()[:16]
    try:
        target = cache_folder() / f"{name}-{key}.so"
        if not _sound(target):
            _compile(compiler, (*flags, *(f"-I{path.parent}" for path in headers)), sources, target)
        return ctypes.CDLL(str(target))
    except (OSError, RuntimeError) as error:  # no home folder, a full disk, a folder that others own
        raise ToolkitError(
            f"C++ kernels: the cache cannot be used ({error})", "set XDG_CACHE_HOME to a folder of your own"
        ) from error


def _sound(target: Path) -> bool:
    """Whether a library in the cache is the one that was compiled here: its digest stands beside it (loading half a
    file kills the process), and nobody else can have written it.

    Raises:
        PermissionError: the folder or the library belongs to another user, or others may write there.
    """
    if os.name == "posix":
        for path in (target.parent, target):
            if path.exists() and (path.stat().st_uid != os.geteuid() or path.stat().st_mode & 0o022):
                raise PermissionError(f"{path} belongs to another user, or others may write to it")
    digest = target.with_suffix(".sha256")
    try:
        return digest.read_text(encoding="ascii") == hashlib.sha256(target.read_bytes()).hexdigest()
    except (FileNotFoundError, ValueError):
        return False


def _compile(compiler: str, flags: tuple[str, ...], sources: Sequence[Path], target: Path) -> None:
    """Under a name of its own, then renamed: two processes may compile at once, and neither sees half a file."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".partial")
    os.close(handle)
    command = [compiler, *flags, *map(str, sources), "-o", temporary]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        Path(temporary).unlink()
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise ToolkitError(
            f"C++ kernels: {compiler} failed: {errors[0] if errors else f'exit status {done.returncode}'}",
            "install a compiler with C++17 and OpenMP, or run with the 'reference' kernel",
        )
    digest = target.with_suffix(f".{os.getpid()}.tmp")
    digest.write_text(hashlib.sha256(Path(temporary).read_bytes()).hexdigest(), encoding="ascii")
    Path(temporary).replace(target)
    digest.replace(target.with_suffix(".sha256"))
