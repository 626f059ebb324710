"""GPTQ checkpoints, versions 1 and 2, which differ in one thing: v1 stores zero points minus one.

Per quantized linear ``W [out, in]`` with G groups and b bits: ``qweight`` int32 ``[in*b/32, out]``, codes packed down
the input axis; ``qzeros`` int32 ``[G, out*b/32]``, packed along the outputs; ``scales`` float16 ``[G, out]``;
``g_idx`` int32 ``[in]``, the group of each input. ``w[k, n] = (q[k, n] - z[g_idx[k], n]) * s[g_idx[k], n]``.
Readers trust ``checkpoint_format`` in config.json alone, so label and tensors come from the one field ``version``.
Sources: AutoGPTQ 0.7.1 ``qlinear_cuda_old.py``, gptqmodel 7.7 ``utils/model.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from calibration.errors import Problem, ToolkitError
from calibration.model.headers import TensorInfo
from ptq.formats import checks
from ptq.formats.readers import quote
from ptq.formats.vllm import vllm_answer
from ptq.linears import ModelLayout, PlannedLinear
from ptq.numerics.bitstream import pack, unpack
from ptq.quantized import QuantizedTensor
from ptq.scheme import Grouping, QuantScheme, TensorQuant, integer_quantizer

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Gptq:
    """GPTQ files of one version.

    Attributes:
        version: 1 (label ``gptq``, zero points stored minus one) or 2 (label ``gptq_v2``, stored as they are).
    """

    version: Literal[1, 2]
    suffixes: ClassVar[frozenset[str]] = frozenset({"qweight", "qzeros", "scales", "g_idx"})

    @property
    def name(self) -> str:
        """The label in ``checkpoint_format``, and ours."""
        return "gptq" if self.version == 1 else "gptq_v2"

    def for_grid(self, symmetric: bool) -> Gptq:
        """Version 2 for zero points: version 1 has no place for 0, and gptqmodel reads asymmetric files of version 1
        only from itself."""
        return self if symmetric else Gptq(2)

    def check(self, layout: ModelLayout) -> list[Problem]:
        """Why the format cannot hold this model."""
        problems = [
            *checks.bits_problems(layout, BITS, self.name),
            *checks.mixed_problems(layout, self.name),
            *checks.super_problems(layout, self.name),
            *checks.group_problems(layout),
            *checks.float_problems(layout, self.name),
            *checks.axis_problems(layout, self.name),
            *checks.zero_problems(layout, self.name),
            *checks.divisor_problems(layout, 32, 32, self.name),
            *checks.part_problems(layout, self.name),
            *checks.activation_problems(layout, self.name),
            *checks.conv1d_problems(layout, self.name),
            *checks.expert_problems(layout, self.name),
        ]
        # modules_in_block_to_quantize holds for all blocks, and its entries are compared with the ends of names
        kept = tuple(dict.fromkeys(self._in_block(layout, linear) for linear in layout.quantized))
        undone = [linear for linear in layout.left if self._in_block(layout, linear).endswith(kept)]
        reason = f"is left in float and shares its name inside a block with quantized ones; '{self.name}' cannot tell"
        return problems + checks.refuse(undone, reason, f"treat the linears of all blocks alike, or {checks.NATIVE}")

    @staticmethod
    def _in_block(layout: ModelLayout, linear: PlannedLinear) -> str:
        return linear.name.removeprefix(f"{layout.blocks}.{linear.block}.")

    def encode(self, q: QuantizedTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Tensors of one linear. ``dtype`` is not used: the format wants float16 scales."""
        (_, columns), w = q.shape, q.scheme.weights
        zero = torch.full_like(q.scale, 2 ** (w.bits - 1), dtype=torch.uint8) if q.zero is None else q.zero
        if self.version == 1:
            assert int(zero.min()) >= 1, "v1 cannot store a zero point of 0: ask `for_grid` first"
            zero = zero - 1
        index = q.group_index
        if index is None:
            index = torch.arange(columns, device=q.codes.device) // w.grouping.width(columns)
        return {
            "qweight": pack(q.codes, w.bits).T.contiguous(),
            "qzeros": pack(zero.T, w.bits),
            "scales": checks.stored_scale(q.scale, torch.float16).T.contiguous(),
            "g_idx": index.to(torch.int32),
        }

    def decode(
        self, tensors: Mapping[str, torch.Tensor], scheme: QuantScheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        """The inverse of `encode`, bit for bit; ``g_idx`` may be missing.

        Raises:
            ToolkitError: the file calls itself symmetric and its zero points are not 2^(bits-1).
        """
        (out, columns), w = shape, scheme.weights
        codes = unpack(tensors["qweight"].T.contiguous(), w.bits, columns)
        zero: torch.Tensor | None = self._zeros(tensors["qzeros"], w.bits, out)
        if w.symmetric:
            if not bool((zero == 2 ** (w.bits - 1)).all()):
                raise ToolkitError(
                    f"GPTQ file labelled '{self.name}' and sym, with zero points other than {2 ** (w.bits - 1)}",
                    "checkpoint_format or sym in quantization_config of config.json is wrong: correct it",
                )
            zero = None
        index = tensors.get("g_idx")
        plain = torch.arange(columns, device=codes.device) // w.grouping.width(columns)
        index = None if index is None or torch.equal(index.long(), plain) else index.to(torch.int32)
        return QuantizedTensor(codes, tensors["scales"].float().T.contiguous(), zero, scheme, index)

    def _zeros(self, words: torch.Tensor, bits: int, out: int) -> torch.Tensor:
        """int32 ``[G, out*bits/32]`` to uint8 ``[out, G]``.

        gptqmodel makes v1 from v2 by subtracting 1 from every field with word arithmetic, where a zero point of 0
        borrows from the next field; adding the same word gives every field back. At 3 bits it wraps fields singly.
        """
        if self.version == 1 and bits != 3:
            words = words + pack(torch.ones(1, out, dtype=torch.uint8, device=words.device), bits)
        zero = unpack(words, bits, out)
        if self.version == 1 and bits == 3:
            zero = (zero + 1) & (2**bits - 1)
        return zero.T.contiguous()

    def config(self, layout: ModelLayout) -> dict[str, Any]:
        """``quantization_config`` of config.json."""
        scheme = layout.quantized[0].scheme
        assert scheme is not None
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": scheme.weights.bits,
            "group_size": scheme.weights.grouping.size or -1,
            "sym": scheme.weights.symmetric,
            "desc_act": layout.reordered,
            "checkpoint_format": self.name,
            "lm_head": False,
            "pack_dtype": "int32",
            "meta": {"quantizer": ["ptq"]},
        }
        if layout.left:  # otherwise transformers replaces every Linear of the blocks and reads what is not there
            names = dict.fromkeys(self._in_block(layout, linear) for linear in layout.quantized)
            config["modules_in_block_to_quantize"] = [[name] for name in names]
            left = dict.fromkeys(self._in_block(layout, linear) for linear in layout.left)  # what gptqmodel looks at
            config["dynamic"] = {rf"-:.*\.{re.escape(name)}$": {} for name in left}
        return config

    def schemes(
        self, config: Mapping[str, Any], infos: Mapping[str, TensorInfo], read: Callable[[str], torch.Tensor]
    ) -> dict[str, tuple[QuantScheme, tuple[int, int]]]:
        """Scheme and shape of every quantized linear, by full name.

        Bits and groups are taken from the shapes where ``g_idx`` gives the number of inputs, since gptqmodel may
        override both for single linears.

        Raises:
            ToolkitError: widths this format does not have, or shapes that do not fit together.
        """
        data = config["quantization_config"]
        size = int(data.get("group_size") or -1)
        found = {}
        for key in infos:
            name, _, suffix = key.rpartition(".")
            if suffix != "qweight":
                continue
            (words, out), scales = infos[key].shape, infos[f"{name}.scales"].shape
            index = infos.get(f"{name}.g_idx")
            if index is None and data.get("desc_act"):
                fix = "fetch the file again: without it every weight gets the step of another group"
                raise ToolkitError(f"{name}: no g_idx, though desc_act says that columns are in another order", fix)
            columns = 32 * words // int(data["bits"]) if index is None else index.shape[0]
            bits, groups = 32 * words // max(columns, 1), max(scales[0], 1)
            if (
                0 in (columns, scales[0])
                or bits not in BITS
                or 32 * words != bits * columns
                or columns % groups
                or scales[1] != out
            ):
                raise ToolkitError(
                    f"{name}: qweight {infos[key].shape} and scales {scales} do not fit {columns} inputs",
                    f"only {', '.join(map(str, BITS))} bits in whole groups are read: fetch or quantize it again",
                )
            width = columns // groups
            per_row = groups == 1 and size != width
            grouping = Grouping("channel") if per_row else Grouping("group", width)
            quantizer = integer_quantizer(bits, "sym" if data.get("sym", True) else "asym")
            found[name] = (QuantScheme(TensorQuant(bits, grouping, quantizer)), (out, columns))
        return found

    def loads_in(self, layout: ModelLayout) -> dict[str, str]:
        """Who opens the checkpoint, in the version in which it is written."""
        weights = [linear.scheme.weights for linear in layout.quantized if linear.scheme is not None]
        per_row = any(w.bits == 4 and w.grouping.size is None for w in weights)
        second = self.version == 2 or not all(w.symmetric for w in weights)
        return {
            "transformers": "yes, with the packages optimum >= 1.24 and gptqmodel >= 1.4.3"
            + ("; not on CPU, whose 4-bit kernel wants groups of 32, 64, 128 or 256" if per_row else "")
            + (
                "; written as gptq_v2, asymmetric files of version 1 are refused"
                if second and self.version == 1
                else ""
            ),
            "vLLM": vllm_answer(layout, "gptq"),
            "GPTQModel": quote("GPTQModel", "gptq", layout) or "not known: no such file was run",
            "llama.cpp": "no: it reads GGUF files only",
        }
