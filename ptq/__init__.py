"""Post-training quantization of large language models.

.. code-block:: python

    import ptq

    ptq.quantize("demo", method="awq", out="demo-awq")
    print(ptq.evaluate("demo-awq", reference="demo").perplexity)
"""

from __future__ import annotations

from typing import Any

from ptq.transformers_hook import install

__version__ = "0.1.0"
_API = {
    "quantize": "ptq.run.pipeline",
    "evaluate": "ptq.evaluation",
    "prepare_checkpoint": "ptq.preparation",
    "export_model": "ptq.conversion",  # `export` is the package of formats
    "load_model": "ptq.runtime.load",
    "generate": "ptq.runtime.generate",
}
__all__ = sorted(_API)


def __getattr__(name: str) -> Any:
    """The public functions, imported on first use: ``import ptq`` itself loads no torch."""
    if name in _API:
        import importlib

        return getattr(importlib.import_module(_API[name]), name)
    raise AttributeError(f"module 'ptq' has no attribute '{name}'")


install()
