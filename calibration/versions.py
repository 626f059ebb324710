"""Of this toolkit, what it stands on, and Python."""

from __future__ import annotations

import importlib.metadata
import platform

LIBRARIES = ("ptq", "torch", "transformers", "safetensors", "compressed-tensors", "numpy")


def versions() -> dict[str, str]:
    """Of this toolkit, what it stands on, and Python."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {**found, "python": platform.python_version()}
