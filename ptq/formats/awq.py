"""AWQ, "GEMM" layout: 4 bits, eight output columns per word in an interleaved order.

Per quantized linear ``W [out, in]`` with G groups: ``qweight`` int32 ``[in, out/8]``, ``qzeros`` int32
``[G, out/8]``, ``scales`` float16 ``[G, out]``; ``w[k, n] = (q[k, n] - z[k div g, n]) * s[k div g, n]`` with W
transposed. Bits 4i..4i+3 of word c hold output column 8c + (0 2 4 6 1 3 5 7)[i]. Zero points carry no offset;
symmetric files store 8 everywhere and say ``zero_point: false``. Source: AutoAWQ 0.2.9, ``awq/utils/packing_utils.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from calibration.errors import Problem, ToolkitError
from calibration.model.headers import TensorInfo
from ptq.formats import checks
from ptq.formats.readers import quote
from ptq.formats.vllm import vllm_answer
from ptq.linears import ModelLayout
from ptq.numerics.bitstream import pack, unpack
from ptq.quantized import QuantizedTensor
from ptq.scheme import Grouping, QuantScheme, TensorQuant, integer_quantizer

BITS = 4
# Readers of these families wrap an activation in one with scales of its own, which they expect in the file.
SCALED_ACTIVATIONS = ("bloom", "falcon", "gpt_bigcode", "gpt_neox", "gptj", "mpt", "RefinedWebModel", "starcoder2")


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 ``[rows, n]``, n a multiple of 8, to int32 ``[rows, n/8]``."""
    return pack(codes.unflatten(1, (-1, 4, 2)).transpose(-1, -2).flatten(1), BITS)  # evens first


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """int32 ``[rows, n/8]`` to uint8 ``[rows, n]``."""
    return unpack(words, BITS, 8 * words.shape[1]).unflatten(1, (-1, 2, 4)).transpose(-1, -2).flatten(1)


@dataclass(frozen=True)
class Awq:
    """AutoAWQ's 4-bit layout."""

    name: ClassVar[str] = "awq"
    suffixes: ClassVar[frozenset[str]] = frozenset({"qweight", "qzeros", "scales"})

    def check(self, layout: ModelLayout) -> list[Problem]:
        """Why the format cannot hold this model."""
        problems = [
            *checks.bits_problems(layout, (BITS,), self.name),
            *checks.mixed_problems(layout, self.name),
            *checks.super_problems(layout, self.name),
            *checks.group_problems(layout),
            *checks.float_problems(layout, self.name),
            *checks.axis_problems(layout, self.name),
            *checks.zero_problems(layout, self.name),
            *checks.divisor_problems(layout, 8, 1, self.name),
            *checks.order_problems(layout, self.name),
            *checks.part_problems(layout, self.name),
            *checks.activation_problems(layout, self.name),
            *checks.conv1d_problems(layout, self.name),
            *checks.expert_problems(layout, self.name),
        ]
        family = layout.config.get("model_type")
        if family in SCALED_ACTIVATIONS:
            reason = f"readers of 'awq' expect scaled activations in {family} models, which rounding does not make"
            problems.append(Problem(f"model_type {family}", reason, checks.NATIVE))
        # modules_to_not_convert holds fragments: one that occurs in the name of a quantized linear would undo it
        for fragment in self._left(layout):
            hit = checks.matching(layout, lambda linear, fragment=fragment: fragment in linear.name)  # type: ignore[misc]
            reason = f"contains '{fragment}', a linear left in float, and 'awq' names those by fragments"
            problems += checks.refuse(hit, reason, f"treat both alike, or {checks.NATIVE}")
        return problems

    @staticmethod
    def _left(layout: ModelLayout) -> list[str]:
        return [linear.name for linear in layout.left] + list(layout.other_linears)

    def for_grid(self, symmetric: bool) -> Awq:
        """Any zero point can be stored."""
        return self

    def encode(self, q: QuantizedTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Tensors of one linear. ``dtype`` is not used: the format wants float16 scales."""
        zero = torch.full_like(q.scale, 2 ** (BITS - 1), dtype=torch.uint8) if q.zero is None else q.zero
        return {
            "qweight": _pack(q.codes.T),
            "qzeros": _pack(zero.T),
            "scales": checks.stored_scale(q.scale, torch.float16).T.contiguous(),
        }

    def decode(
        self, tensors: Mapping[str, torch.Tensor], scheme: QuantScheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        """The inverse of `encode`, bit for bit.

        Raises:
            ToolkitError: the file calls itself symmetric and has other zero points than 8.
        """
        zero: torch.Tensor | None = _unpack(tensors["qzeros"]).T.contiguous()
        if scheme.weights.symmetric:
            if not bool((zero == 2 ** (BITS - 1)).all()):
                raise ToolkitError(
                    "AWQ file with zero_point false and zero points other than 8",
                    "set zero_point to true in quantization_config of config.json",
                )
            zero = None
        codes, scale = _unpack(tensors["qweight"]).T.contiguous(), tensors["scales"].float().T.contiguous()
        assert codes.shape == shape
        return QuantizedTensor(codes, scale, zero, scheme)

    def config(self, layout: ModelLayout) -> dict[str, Any]:
        """``quantization_config`` of config.json."""
        scheme = layout.quantized[0].scheme
        assert scheme is not None
        config: dict[str, Any] = {
            "quant_method": "awq",
            "version": "gemm",
            "bits": BITS,
            "group_size": scheme.weights.grouping.size or -1,
            "zero_point": not scheme.weights.symmetric,
            "modules_to_not_convert": self._left(layout),
        }
        if layout.left:  # gptqmodel's own loader knows no modules_to_not_convert
            config["dynamic"] = {rf"-:{re.escape(linear.name)}$": {} for linear in layout.left}
        return config

    def schemes(
        self, config: Mapping[str, Any], infos: Mapping[str, TensorInfo], read: Callable[[str], torch.Tensor]
    ) -> dict[str, tuple[QuantScheme, tuple[int, int]]]:
        """Scheme and shape of every quantized linear, by full name; the older key names are read too.

        Raises:
            ToolkitError: another layout than GEMM, other widths than 4 bits, or shapes that do not fit together.
        """
        data = config["quantization_config"]
        version = str(data.get("version") or data.get("format") or "gemm").lower()
        bits = int(data.get("bits") or data.get("w_bit") or BITS)
        if version != "gemm" or bits != BITS:
            raise ToolkitError(
                f"config.json: AWQ layout '{version}' with {bits} bits", "only 4-bit 'gemm' is read: convert it first"
            )
        size = int(data.get("group_size") or data.get("q_group_size") or -1)
        grouping = Grouping("group", size) if size > 0 else Grouping("channel")
        symmetric = not data.get("zero_point", not data.get("sym", False))  # AutoRound says sym
        scheme = QuantScheme(TensorQuant(BITS, grouping, integer_quantizer(BITS, "sym" if symmetric else "asym")))
        found = {}
        for key in infos:
            name, _, suffix = key.rpartition(".")
            if suffix != "qweight":
                continue
            columns, out = infos[key].shape[0], 8 * infos[key].shape[1]
            width = grouping.width(columns)
            if columns % width or infos[f"{name}.scales"].shape != (columns // width, out):
                raise ToolkitError(
                    f"{name}.scales: shape {infos[f'{name}.scales'].shape} does not fit {out} x {columns} weights in "
                    f"groups of {width}",
                    "config.json and the safetensors files do not belong together: fetch both again",
                )
            found[name] = (scheme, (out, columns))
        return found

    def loads_in(self, layout: ModelLayout) -> dict[str, str]:
        """Who opens the checkpoint."""
        sizes = {linear.scheme.weights.grouping.size for linear in layout.quantized if linear.scheme is not None}
        usual = sizes <= {32, 64, 128}
        return {
            "transformers": "yes, with the packages gptqmodel and accelerate"
            + ("" if usual else "; one group per row has no fast kernel"),
            "vLLM": vllm_answer(layout, self.name),
            "GPTQModel": quote("GPTQModel", self.name, layout) or "not known: no such file was run",
            "llama.cpp": "no: it reads GGUF files only",
        }
