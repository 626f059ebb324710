"""Post-training quantization and activation sparsity of large language models.

.. code-block:: python

    import ptq

    ptq.quantize("demo", method="awq", out="demo-awq")
    print(ptq.evaluate("demo-awq", reference="demo").perplexity)

Functions take plain values and return one dataclass each; bad input raises `ToolkitError`, which names the thing and
the fix. ``help(ptq.quantize)`` has the arguments. The command line calls these functions and prints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibration.errors import PlanError, ToolkitError
    from ptq.api.converting import export, prepare
    from ptq.api.measuring import compare, evaluate, evaluate_tasks, generate, inspect, load_model
    from ptq.api.planning import plan_analyze, plan_fit, plan_sparsify, plan_time
    from ptq.api.running import fit, plan, quantize, sparsify
    from ptq.api.studying import analyze, predict, study_calibration, study_sensitivity
    from ptq.publishing import upload

from ptq.transformers_hook import install

__version__ = "0.1.0"

_HOMES = {
    "calibration.errors": ("PlanError", "ToolkitError"),
    "ptq.api.converting": ("export", "prepare"),
    "ptq.api.measuring": ("compare", "evaluate", "evaluate_tasks", "generate", "inspect", "load_model"),
    "ptq.api.planning": ("plan_analyze", "plan_fit", "plan_sparsify", "plan_time"),
    "ptq.api.running": ("fit", "plan", "quantize", "sparsify"),
    "ptq.api.studying": ("analyze", "predict", "study_calibration", "study_sensitivity"),
    "ptq.publishing": ("upload",),
}
__all__ = [
    "PlanError",
    "ToolkitError",
    "analyze",
    "compare",
    "evaluate",
    "evaluate_tasks",
    "export",
    "fit",
    "generate",
    "inspect",
    "load_model",
    "plan",
    "plan_analyze",
    "plan_fit",
    "plan_sparsify",
    "plan_time",
    "predict",
    "prepare",
    "quantize",
    "sparsify",
    "study_calibration",
    "study_sensitivity",
    "upload",
]


def __getattr__(name: str) -> Any:
    """The public functions, imported on first use: ``import ptq`` itself loads no torch."""
    for module, names in _HOMES.items():
        if name in names:
            import importlib

            found = getattr(importlib.import_module(module), name)
            globals()[name] = found
            return found
    raise AttributeError(f"module 'ptq' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


install()
