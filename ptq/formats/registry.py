"""What a file format is, and the list of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from calibration.errors import Problem, ToolkitError
from calibration.model.headers import TensorInfo
from ptq.formats import static_cache
from ptq.formats.awq import Awq
from ptq.formats.compressed_tensors import CompressedTensors
from ptq.formats.gguf import Gguf
from ptq.formats.gptq import Gptq
from ptq.formats.native import Native
from ptq.linears import ModelLayout
from ptq.quantized import QuantizedTensor
from ptq.scheme import QuantScheme


def stored_names(fmt: Format, linear: str) -> dict[str, str]:
    """Suffix -> full name of every tensor that a quantized linear may have in this format."""
    names = {suffix: f"{linear}.{suffix}" for suffix in sorted(fmt.suffixes)}
    if fmt.name == "compressed-tensors":
        names |= static_cache.names(linear)
        if static_cache.older(linear):
            names[static_cache.OLDER] = f"{linear}.{static_cache.OLDER}"
    return names


class Format(Protocol):
    """How quantized linears are laid out in safetensors files and described in config.json.

    Formats never round: ``decode(encode(q, dtype), q.scheme, q.shape)`` is q, bit for bit.
    """

    @property
    def name(self) -> str:
        """As in ``--format`` and in `FORMATS`."""
        ...

    @property
    def suffixes(self) -> frozenset[str]:
        """The last parts of names that belong to a quantized linear, e.g. ``weight_packed``."""
        ...

    def check(self, layout: ModelLayout) -> list[Problem]:
        """Every reason why the format cannot hold this model, each with a fix that works; none means it can."""
        ...

    def for_grid(self, symmetric: bool) -> Format:
        """The format as it is written for models whose grids are all symmetric, or not.

        Ask once per checkpoint, before the first `encode`, and use the answer for tensors and config alike.
        """
        ...

    def encode(self, q: QuantizedTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The tensors of one linear by suffix; ``dtype`` is the model's, for scales where the format wants it.

        Raises:
            ToolkitError: a scale (of a file by another tool) is not exact in the dtype of the format.
        """
        ...

    def decode(
        self, tensors: Mapping[str, torch.Tensor], scheme: QuantScheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        """The linear ``[out, in]`` from its tensors by suffix."""
        ...

    def config(self, layout: ModelLayout) -> dict[str, Any]:
        """``quantization_config`` of config.json, for a layout that `check` accepts."""
        ...

    def schemes(
        self, config: Mapping[str, Any], infos: Mapping[str, TensorInfo], read: Callable[[str], torch.Tensor]
    ) -> dict[str, tuple[QuantScheme, tuple[int, int]]]:
        """Scheme and shape ``(out, in)`` of every quantized linear, from config.json and safetensors headers.

        ``read`` returns one small tensor by name, where a header does not tell the shape. Files of other tools name
        no quantizer: they come back as what ``-sym`` and ``-asym`` stand for.

        Raises:
            ToolkitError: the file uses a part of the format that is not read here.
        """
        ...

    def loads_in(self, layout: ModelLayout) -> dict[str, str]:
        """``{"transformers": ..., "vLLM": ..., "llama.cpp": ...}``: "yes...", "no: why", or what is expected."""
        ...


FORMATS: dict[str, Format] = {
    "compressed-tensors": CompressedTensors(),
    "awq": Awq(),
    "gptq": Gptq(1),
    "gptq_v2": Gptq(2),
    "gguf": Gguf(),
    "native": Native(),
}

PREFERRED = "compressed-tensors"


def choose(layout: ModelLayout) -> tuple[Format, str]:
    """The format for a model whose user named none, and a sentence why."""
    preferred = FORMATS[PREFERRED]
    problems = preferred.check(layout)
    if not problems:
        return preferred, "compressed-tensors holds this model, and transformers and vLLM have readers for it."
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    reason = f"compressed-tensors cannot hold this model: {problems[0].subject}: {problems[0].reason}{more}."
    return FORMATS["native"], reason


def format_of(config: Mapping[str, Any]) -> Format | None:
    """The format that a config.json describes, or None for a float checkpoint.

    Raises:
        ToolkitError: it describes a format that is not ours, named in the message.
    """
    data = config.get("quantization_config")
    if not data:
        return None
    if not isinstance(data, dict):
        raise ToolkitError(f"config.json: quantization_config is a {type(data).__name__}", "fetch config.json again")
    method = str(data.get("quant_method", "missing"))
    label = str(data.get("checkpoint_format") or data.get("format") or "gptq") if method == "gptq" else ""
    if data.get("is_marlin_format"):
        label = "marlin"
    if method in ("auto-round", "intel/auto-round"):
        method, label = "auto-round", str(data.get("packing_format", "auto_round:auto_gptq"))
    found = {
        ("compressed-tensors", ""): "compressed-tensors",
        ("awq", ""): "awq",
        ("gptq", "gptq"): "gptq",
        ("gptq", "gptq_v2"): "gptq_v2",
        ("auto-round", "auto_round:auto_gptq"): "gptq",  # AutoRound's folders hold one of the two layouts
        ("auto-round", "auto_round:auto_awq"): "awq",
        ("ptq", ""): "native",
    }.get((method, label))
    if found is None:
        what = f"quant_method '{method}'" + (f" in layout '{label}'" if label else "")
        raise ToolkitError(
            f"config.json: {what} is not read here",
            f"quantize the float checkpoint instead, or name a checkpoint in one of: {', '.join(FORMATS)}",
        )
    return FORMATS[found]
