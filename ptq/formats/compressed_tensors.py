"""compressed-tensors: integer weights of any width, described per group of linears.

Codes of one byte with quantized inputs, and FP8, lie as `plain_codes` says. All others are ``pack-quantized``, per
linear ``W [out, in]`` with G groups and b bits: ``weight_packed`` int32 ``[out, ceil(in*b/32)]``, dense stream of
unsigned codes; ``weight_scale`` ``[out, G]`` (``[out, 1]`` per row) in the model's dtype; ``weight_shape`` int64
``[2]``; for asymmetric grids ``weight_zero_point`` int32 ``[ceil(out*b/32), G]``, packed down the outputs. The library
calls codes and zero points signed and stores both plus 2^(b-1), which are our unsigned values.

Until June 2026 the library put 32 // b values in a word and left the top bits empty, which differs at 3, 5 and 6
bits; such files are read too. The width of ``weight_packed`` tells them apart for rows of at least 160 inputs or whole
multiples of 32. Source: compressed-tensors 0.20, ``compressors/pack_quantized``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from calibration.errors import Problem, ToolkitError
from calibration.model.headers import TensorInfo
from ptq.formats import checks, packed_floats, plain_codes, static_cache
from ptq.formats.config_groups import describe, kind_of, scheme_of
from ptq.formats.readers import quote
from ptq.formats.vllm import vllm_answer
from ptq.linears import ModelLayout
from ptq.numerics.bitstream import pack, unpack, words_per_row
from ptq.quantized import CACHE_STEPS, INPUT_GRID, QuantizedTensor
from ptq.scheme import BITS, QuantScheme

OWN_LINEAR = ("falcon",)  # families whose class of linears reads `weight` itself, which a packed one does not have


def _unpack(words: torch.Tensor, bits: int, n: int, padded: bool) -> torch.Tensor:
    """int32 ``[rows, words]`` to uint8 ``[rows, n]``, dense or with 32 // bits values in each word."""
    words = words.contiguous()
    if not padded:
        return unpack(words, bits, n)
    shifts = torch.arange(32 // bits, device=words.device) * bits
    fields = (words.unsqueeze(-1).long() >> shifts) & (2**bits - 1)
    return fields.flatten(1)[:, :n].to(torch.uint8).contiguous()


@dataclass(frozen=True)
class CompressedTensors:
    """The default format: what vLLM and transformers read without a package of the rounding method."""

    name: ClassVar[str] = "compressed-tensors"
    suffixes: ClassVar[frozenset[str]] = frozenset(
        {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"}
        | packed_floats.SUFFIXES
        | plain_codes.SUFFIXES
    )

    def check(self, layout: ModelLayout) -> list[Problem]:
        """Why the format cannot hold this model."""
        return [
            *checks.bits_problems(layout, BITS, self.name),
            *checks.super_problems(layout, self.name),
            *checks.group_problems(layout),
            *packed_floats.problems(layout, self.name),
            *checks.axis_problems(layout, self.name),
            *checks.zero_problems(layout, self.name),
            *checks.order_problems(layout, self.name),
            *checks.part_problems(layout, self.name, held=(*INPUT_GRID, *CACHE_STEPS)),
            *plain_codes.problems(layout, self.name),
            *self._cache_problems(layout),
            *checks.conv1d_problems(layout, self.name),
            *self._expert_problems(layout),
        ]

    def _expert_problems(self, layout: ModelLayout) -> list[Problem]:
        """transformers fuses all experts of a block in one tensor, with one scheme for all blocks."""
        experts = [linear for linear in layout.linears if linear.expert is not None]
        quantized = [linear for linear in experts if linear.scheme is not None]
        left = [linear for linear in experts if linear.scheme is None]
        if not experts or not layout.quantized:
            return []
        fix = f"give all experts the same symmetric scheme, or {checks.NATIVE}"
        problems = checks.refuse(left, "stays in float; beside float experts transformers loads nothing quantized", fix)
        asymmetric = [linear for linear in quantized if not kind_of(linear).symmetric]
        problems += checks.refuse(asymmetric, "asymmetric experts do not load in transformers", fix)
        if len({kind_of(linear) for linear in quantized}) > 1:
            problems += checks.refuse(quantized, "experts have more than one scheme, and a reader takes one", fix)
        return problems

    def _cache_problems(self, layout: ModelLayout) -> list[Problem]:
        """The format describes one KV cache for all layers."""
        makers = [linear for linear in layout.quantized if linear.scheme is not None and linear.scheme.cache]
        caches = {linear.scheme.cache for linear in layout.quantized if linear.scheme is not None}
        reason = f"has a KV cache that other linears have not, and '{self.name}' describes one for all layers"
        fix = f"give every rule the same kv, or {checks.NATIVE}"
        if len(caches) > 1:
            return checks.refuse(makers, reason, fix)
        unnamed = static_cache.without_place(makers)
        reason = (
            f"has a static KV cache, whose steps '{self.name}' keeps beside quantized linears that make keys or values"
        )
        return checks.refuse(unnamed, reason, f"quantize those too, leave kvstatic out, or {checks.NATIVE}")

    def for_grid(self, symmetric: bool) -> CompressedTensors:
        """Any zero point can be stored."""
        return self

    def encode(self, q: QuantizedTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Tensors of one linear; the scale has the model's ``dtype``."""
        steps = static_cache.encode(q.parts)
        if plain_codes.layout_of(q.scheme) is not None:
            return {**plain_codes.encode(q, dtype), **plain_codes.input_step(q, dtype), **steps}
        bits = q.scheme.weights.bits
        if packed_floats.preset_of(q.scheme.weights) is not None:
            return {**packed_floats.encode(q), **steps}
        assert q.group_index is None, "a linear with a group index was not refused"
        tensors = {
            "weight_packed": pack(q.codes, bits),
            "weight_scale": checks.stored_scale(q.scale, dtype),
            "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
        }
        if q.zero is not None:
            tensors["weight_zero_point"] = pack(q.zero.T, bits).T.contiguous()
        return {**tensors, **plain_codes.input_step(q, dtype), **steps}

    def decode(
        self, tensors: Mapping[str, torch.Tensor], scheme: QuantScheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        """The inverse of `encode`, bit for bit; reads padded words, unpacked zero points and group indices too.

        Raises:
            ToolkitError: ``weight_packed`` has the width of neither packing.
        """
        q = self._decode(tensors, scheme, shape)
        steps = static_cache.decode(tensors)
        return replace(q, parts={**q.parts, **steps}) if steps else q

    def _decode(
        self, tensors: Mapping[str, torch.Tensor], scheme: QuantScheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        """What lies under the linear's own name."""
        if "weight" in tensors:
            return plain_codes.with_input_step(plain_codes.decode(tensors, scheme), tensors)
        if packed_floats.preset_of(scheme.weights) is not None:
            return packed_floats.decode(tensors, scheme, shape)
        (out, columns), bits = shape, scheme.weights.bits
        words = tensors["weight_packed"]
        per_word = 32 // bits
        padded = words.shape[1] != words_per_row(columns, bits)
        if padded and words.shape[1] != -(-columns // per_word):
            raise ToolkitError(
                f"weight_packed has {words.shape[1]} words per row, which is no packing of {columns} {bits}-bit codes",
                "config.json and the safetensors files do not belong together: fetch both again",
            )
        zero = None
        if not scheme.weights.symmetric:
            stored = tensors["weight_zero_point"]
            if stored.dtype == torch.int8:  # signed and one per byte, in files of before 2025
                zero = (stored.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
            else:
                zero = _unpack(stored.T, bits, out, padded).T.contiguous()
        index = tensors.get("weight_g_idx")
        scale = tensors["weight_scale"].float()
        codes = _unpack(words, bits, columns, padded)
        q = QuantizedTensor(codes, scale, zero, scheme, None if index is None else index.to(torch.int32))
        return plain_codes.with_input_step(q, tensors)

    def config(self, layout: ModelLayout) -> dict[str, Any]:
        """``quantization_config`` of config.json."""
        return describe(layout)

    def schemes(
        self, config: Mapping[str, Any], infos: Mapping[str, TensorInfo], read: Callable[[str], torch.Tensor]
    ) -> dict[str, tuple[QuantScheme, tuple[int, int]]]:
        """Scheme and shape of every quantized linear, by full name.

        Headers do not tell the number of inputs where one step serves a row: ``read`` fetches ``weight_shape`` then.

        Raises:
            ToolkitError: the file rotates online, or has weights, inputs or a cache of a kind that is not run here.
        """
        data = config["quantization_config"]
        for key in ("transform_config", "sparsity_config"):
            content = data.get(key)
            if content and content.get("format") != "dense":
                raise ToolkitError(f"config.json: {key} is in use", "only integer weights without it are read")
        found = {}
        stored = data.get("kv_cache_scheme")
        cache = plain_codes.read_cache(stored, plain_codes.head_width(config)) if stored else None
        for key, info in infos.items():
            name, _, suffix = key.rpartition(".")
            plain = suffix == "weight" and info.dtype in plain_codes.STORED
            if suffix != "weight_packed" and not plain:
                continue
            scheme = replace(scheme_of(data, name, plain), cache=cache)
            if plain:
                found[name] = (scheme, (info.shape[0], info.shape[1]))
                continue
            size = scheme.weights.grouping.size
            if size is None:
                out, columns = (int(v) for v in read(f"{name}.weight_shape"))
            else:
                out, columns = info.shape[0], size * infos[f"{name}.weight_scale"].shape[1]
            found[name] = (scheme, (out, columns))
        return found

    def loads_in(self, layout: ModelLayout) -> dict[str, str]:
        """Who opens the checkpoint."""
        kinds = {kind_of(linear) for linear in layout.quantized}
        asymmetric = any(not kind.symmetric and kind.plain is None for kind in kinds)
        mixed = len(kinds) > 1
        family = layout.config.get("model_type")
        transformers = "yes, with the package compressed-tensors"
        if any(kind.bits in (3, 5, 6) for kind in kinds):
            transformers += " >= 0.20 (older ones pack 3, 5 and 6 bits in another way)"
        needing = [f"{family}'s own class of linears"] * (family in OWN_LINEAR) + ["asymmetric weights"] * asymmetric
        reason = " and ".join(needing) + (" need" if needing else "")
        if needing and mixed:
            transformers = f"no: {reason} dequantize=True in transformers 5.23, which is wrong for mixed schemes"
        elif needing:
            transformers += f"; {reason} quantization_config=CompressedTensorsConfig(dequantize=True)"
        elif mixed:
            transformers += "; not with dequantize=True, which takes one scheme for all linears"
        if any(kind.preset is not None for kind in kinds):
            transformers += "; FP4 weights decompress to bfloat16: load with dtype bfloat16"
        if any(kind.inputs is not None and kind.inputs.kind == "int" and kind.inputs.dynamic for kind in kinds):
            transformers += (
                "; steps of dynamic integer inputs are max / (2^(b-1) - 0.5) there, max / (2^(b-1) - 1) here"
            )
        seen = quote("transformers", "compressed-tensors", layout)
        return {
            "transformers": transformers
            + (f"; {seen.removeprefix('yes ')}" if seen and transformers.startswith("yes") else ""),
            "vLLM": vllm_answer(layout, "compressed-tensors"),
            "llama.cpp": "no: it reads GGUF files only",
        }
