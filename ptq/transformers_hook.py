"""``import ptq`` teaches transformers the native format: at once where transformers is loaded, else when it is.

Importing transformers takes seconds and ``import ptq`` none, so a finder waits for the module with the list of
quantizers and adds ours to it behind its own code.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

MODULE = "transformers.quantizers.auto"
METHOD = "ptq"  # quant_method of config.json


class _Loader(importlib.abc.Loader):
    """The module's own loader, and our entries afterwards."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        register(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def register(module: Any) -> None:
    """Add our config and quantizer to the lists in transformers' module, once."""
    from ptq.runtime.hf_quantizer import NativeConfig, NativeQuantizer

    module.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, NativeConfig)
    module.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, NativeQuantizer)


def install() -> None:
    """Register now or as soon as transformers is imported."""
    if MODULE in sys.modules:
        register(sys.modules[MODULE])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
