"""GGUF: one file that llama.cpp and what is built on it read. Our codes go into its blocks as they are.

==============================  ==========================================
scheme                          type
==============================  ==========================================
w4a16, groups of a multiple of  Q4_0 (symmetric), Q4_1
32, or one step per row
w5a16, likewise                 Q5_0 (symmetric), Q5_1
w8a16, likewise, symmetric      Q8_0
mxfp4                           MXFP4
q2_k, q3_k, q4_k, q5_k, q6_k    Q2_K to Q6_K
==============================  ==========================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from calibration.errors import Problem, ToolkitError
from calibration.model.checkpoint import TensorInfo
from ptq.formats import checks
from ptq.formats.gguf_blocks import BLOCK, type_of
from ptq.formats.gguf_file import blocks_of, from_blocks
from ptq.formats.gguf_model import model_problems
from ptq.formats.readers import quote
from ptq.linears import ModelLayout
from ptq.quantized import QuantizedTensor
from ptq.scheme import QuantScheme

SUFFIX = ".gguf"


@dataclass(frozen=True)
class Gguf:
    """One GGUF file; see `ptq.formats.gguf_file` for what writes it."""

    name: ClassVar[str] = "gguf"
    suffixes: ClassVar[frozenset[str]] = frozenset({"blocks"})

    def check(self, layout: ModelLayout) -> list[Problem]:
        """Why the format cannot hold this model."""
        untyped = checks.matching(layout, lambda linear: type_of(linear.scheme) is None)  # type: ignore[arg-type]
        schemes = ", ".join(dict.fromkeys(str(linear.scheme) for linear in untyped))
        fix = f"use q4_0, q5_0, q8_0, q4_1, q5_1, q2_k to q6_k or mxfp4, or {checks.NATIVE}"
        whole = [n for n in layout.quantized if n.shape[1] % BLOCK and n not in untyped]
        reason = f"has rows that are no multiple of {BLOCK}, the block of GGUF"
        return [
            *model_problems(layout),
            *checks.refuse(untyped, f"{schemes} has no type in 'gguf'", fix),
            *checks.refuse(whole, reason, f'give it a rule scheme = "float", or {checks.NATIVE}'),
            *checks.group_problems(layout),
            *checks.order_problems(layout, self.name),
            *checks.part_problems(layout, self.name),
            *checks.activation_problems(layout, self.name),
            *checks.conv1d_problems(layout, self.name),
            *checks.expert_problems(layout, self.name),
        ]

    def for_grid(self, symmetric: bool) -> Gguf:
        """Any zero point can be stored."""
        return self

    def encode(self, q: QuantizedTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """``blocks``: uint8 ``[out, bytes of a row]``, rows in the order of the checkpoint."""
        return {"blocks": blocks_of(q)}

    def decode(
        self, tensors: Mapping[str, torch.Tensor], scheme: QuantScheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        """The inverse of `encode`, bit for bit."""
        return from_blocks(tensors["blocks"], scheme, shape)

    def config(self, layout: ModelLayout) -> dict[str, Any]:
        """GGUF has no config.json."""
        return {}

    def schemes(
        self, config: Mapping[str, Any], infos: Mapping[str, TensorInfo], read: Callable[[str], torch.Tensor]
    ) -> dict[str, tuple[QuantScheme, tuple[int, int]]]:
        """GGUF files are read as the float weights that they stand for, see `calibration.model.gguf`."""
        return {}

    def loads_in(self, layout: ModelLayout) -> dict[str, str]:
        """Who opens the file."""
        return {
            "transformers": "yes, dequantized: from_pretrained(FOLDER, gguf_file=FILE), with the package gguf",
            "vLLM": "not known: it reads GGUF through transformers' config, not run here",
            "llama.cpp": quote("llama.cpp", "gguf", layout) or "yes (these types together were not run)",
        }


def check_target(out: str | Path, format_name: str) -> None:
    """GGUF is one file, every other format a folder.

    Raises:
        ToolkitError: ``out`` is named like the other.
    """
    if (format_name == Gguf.name) != (Path(out).suffix.lower() == SUFFIX):
        if format_name == Gguf.name:
            raise ToolkitError(f"--out {out}: gguf is one file", f"name a file, {Path(out).name}{SUFFIX}")
        raise ToolkitError(f"--out {out}: format {format_name} is a folder", "name a folder, or use --format gguf")
