"""compressed-tensors with one code per byte, and its words for quantized inputs and KV caches.

``int-quantized``: ``weight`` int8 ``[out, in]`` holds our codes minus 128, ``weight_scale`` ``[out, 1]`` is in the
model's dtype, and ``weight_zero_point`` int8 ``[out, 1]`` (zero minus 128) is there for asymmetric grids.
``float-quantized``: ``weight`` float8_e4m3fn ``[out, in]``, whose bits are our codes, and a scale per row, or per block
of 128 x 128, ``[ceil(out/128), in/128]`` (FP8_BLOCK). ``mxfp8-quantized``: the same codes, and ``weight_scale`` uint8
``[out, in/32]``, exponent + 127. A static input has its step in ``input_scale`` ``[1]``. Inputs are quantized by token
(dynamic), by tensor, or by group; the cache by token and head. Source: compressed-tensors 0.20,
``compressors/naive_quantized``, ``compressors/mxfp8`` and ``quantization/quant_args``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from calibration.errors import Problem, ToolkitError
from ptq.activations import BLOCK_FLOATS, ActivationQuant, CacheQuant, Granularity, take_activations
from ptq.float_formats import E4M3FN
from ptq.formats import checks
from ptq.formats.narrow_scales import decode_scale, encode_scale
from ptq.linears import ModelLayout
from ptq.numerics.groups import for_every_row, once_per_block
from ptq.quantized import INPUT_GRID, QuantizedTensor
from ptq.scheme import BLOCK, FLOAT_PRESETS, Grouping, Kind, QuantScheme, TensorQuant, integer_quantizer

INT, FLOAT, MX = "int-quantized", "float-quantized", "mxfp8-quantized"
STORED = (torch.int8, torch.float8_e4m3fn)
"""Dtypes of ``weight``."""
MXFP8 = FLOAT_PRESETS["mxfp8"]
_MX_ARGUMENTS = {"strategy": "group", "group_size": MXFP8.grouping.size, "scale_dtype": "torch.uint8"}
SUFFIXES = frozenset({"weight", INPUT_GRID[0]})
INPUT_STEP = INPUT_GRID[0]


def layout_of(scheme: QuantScheme) -> str | None:
    """``int-quantized``, ``float-quantized``, ``mxfp8-quantized``, or None where codes are packed."""
    if scheme.weights == MXFP8:
        return MX
    if scheme.weights.float_format == E4M3FN:
        return FLOAT
    integers = scheme.weights.float_format is None and scheme.weights.bits == 8
    return INT if integers and scheme.inputs is not None and scheme.weights.grouping.size is None else None


def problems(layout: ModelLayout, format_name: str) -> list[Problem]:
    """Inputs and caches that the format, or its reader in transformers, does not know."""
    found: list[Problem] = []

    def refuse(condition: Any, reason: str, fix: str) -> None:
        linears = checks.matching(layout, lambda linear: bool(condition(linear.scheme)))
        found.extend(checks.refuse(linears, f"{reason}, which '{format_name}' does not know", fix))

    native = checks.NATIVE
    refuse(lambda s: s.inputs and s.inputs.smooth, "inputs are smoothed at run time", native)
    refuse(lambda s: s.inputs and not s.inputs.symmetric, "inputs have zero points", f"leave azp out, or {native}")
    refuse(
        lambda s: s.inputs and s.inputs.granularity == "channel",
        "inputs have a step per channel",
        f"use -astatic or -atoken, or {native}",
    )
    refuse(
        lambda s: layout_of(s) and s.inputs and (s.inputs.kind == "int") != (layout_of(s) == INT),
        "weights and inputs of 8 bits are integers on one side and floats on the other",
        f"use w8a8 or fp8, or {native}",
    )
    refuse(
        lambda s: layout_of(s) == FLOAT and s.weights.grouping.kind == "group",
        "floats of 8 bits have a scale per group",
        f"use gchannel, gblock or mxfp8, or {native}",
    )
    refuse(
        lambda s: s.inputs and s.weights.float_format not in (None, E4M3FN) and s.inputs.kind not in BLOCK_FLOATS,
        "weights of 4-bit floats have inputs of another kind",
        f"leave the inputs at a16, use nvfp4-anvfp4 or mxfp4-amxfp4, or {native}",
    )
    refuse(
        lambda s: s.inputs and (s.inputs.kind == "mxfp8") != (layout_of(s) == MX),
        "weights or inputs alone are in MXFP8",
        f"use mxfp8-amxfp8, or mxfp8 for weights alone, or {native}",
    )
    blocks = checks.matching(layout, lambda n: n.expert is not None and _in_blocks(n.scheme))
    found += checks.refuse(blocks, "is part of an expert, and experts in such floats were not run", native)
    experts = [n for n in layout.quantized if n.expert is not None and n.scheme is not None and n.scheme.inputs]
    reason = "is part of an expert, and transformers quantizes no inputs of experts"
    found += checks.refuse(experts, reason, f"use a scheme with a16 for experts, or {native}")
    return found


def _in_blocks(scheme: QuantScheme | None) -> bool:
    """MXFP8 or FP8 in blocks."""
    return scheme is not None and (layout_of(scheme) == MX or scheme.weights.grouping.kind == "block")


def encode(q: QuantizedTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of a linear that `layout_of` gives one code per byte."""
    if layout_of(q.scheme) == MX:
        return {"weight": q.codes.view(torch.float8_e4m3fn).clone(), "weight_scale": encode_scale(q.scale, "e8m0")}
    tensors = {"weight_scale": checks.stored_scale(once_per_block(q.scale, q.scheme.weights.grouping), dtype)}
    if layout_of(q.scheme) == FLOAT:
        return {"weight": q.codes.view(torch.float8_e4m3fn).clone(), **tensors}
    if q.zero is not None:
        tensors["weight_zero_point"] = _signed(q.zero)
    return {"weight": _signed(q.codes), **tensors}


def _signed(codes: torch.Tensor) -> torch.Tensor:
    return (codes.to(torch.int16) - 128).to(torch.int8)


def decode(tensors: Mapping[str, torch.Tensor], scheme: QuantScheme) -> QuantizedTensor:
    """The inverse of `encode`, bit for bit."""
    scale, weight, zero = decode_scale(tensors["weight_scale"]), tensors["weight"], tensors.get("weight_zero_point")
    scale = for_every_row(scale, scheme.weights.grouping, weight.shape[0])
    if scheme.weights.grouping.size is None:  # one for the whole tensor in other's files
        scale = scale.reshape(-1, 1).expand(weight.shape[0], 1).contiguous()
    if weight.dtype == torch.float8_e4m3fn:
        return QuantizedTensor(weight.view(torch.uint8), scale, None, scheme)
    if scheme.weights.symmetric:
        zero = None
    half = 2 ** (scheme.weights.bits - 1)  # 4-bit codes lie so in llm-compressor's W4AFP8
    unsigned = [None if t is None else (t.to(torch.int16) + half).to(torch.uint8) for t in (weight, zero)]
    assert unsigned[0] is not None
    return QuantizedTensor(unsigned[0], scale, unsigned[1], scheme)


def input_step(q: QuantizedTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """``input_scale`` where the inputs are static."""
    step = q.parts.get(INPUT_STEP)
    return {} if step is None else {INPUT_STEP: checks.stored_scale(step, dtype)}


def with_input_step(q: QuantizedTensor, tensors: Mapping[str, torch.Tensor]) -> QuantizedTensor:
    """The linear with its calibrated step as a part."""
    step = tensors.get(INPUT_STEP)
    return (
        q
        if step is None
        else QuantizedTensor(q.codes, q.scale, q.zero, q.scheme, q.group_index, {INPUT_STEP: step.float().view(-1)})
    )


def weight_arguments(scheme: QuantScheme) -> dict[str, Any]:
    """``weights`` of a config group with one code per byte."""
    w = scheme.weights
    kind = "int" if w.float_format is None else "float"
    shared: dict[str, Any] = {"strategy": "channel"}
    if w.grouping.kind == "block":
        shared = {"strategy": "block", "block_structure": [BLOCK, BLOCK]}
    if w == MXFP8:
        shared = _MX_ARGUMENTS
    return {"num_bits": 8, "type": kind, "symmetric": w.symmetric, "dynamic": False, **shared}


def input_arguments(inputs: ActivationQuant | None) -> dict[str, Any] | None:
    """``input_activations`` of a config group."""
    if inputs is None:
        return None
    arguments = {
        "num_bits": inputs.bits,
        "type": "int" if inputs.kind == "int" else "float",
        "symmetric": inputs.symmetric,
        "strategy": inputs.granularity,
        "dynamic": inputs.dynamic,
    }
    if inputs.kind == "mxfp8":
        return {**arguments, **_MX_ARGUMENTS}
    return arguments if inputs.group_size is None else {**arguments, "group_size": inputs.group_size}


def cache_arguments(cache: CacheQuant | None, head_width: int) -> dict[str, Any] | None:
    """``kv_cache_scheme``: dynamic, so that no scale is stored. "token" would mean a step per head for all tokens of a
    call, so a token and head is said as the one group of ``head_width`` channels that it is."""
    if cache is None:
        return None
    if cache.static:
        return input_arguments(cache.grid)
    return input_arguments(replace(cache.grid, granularity="group", group_size=head_width))


def head_width(config: Mapping[str, Any]) -> int:
    """Channels of a key, from config.json."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def read_weights(weights: Mapping[str, Any], strategy: str) -> TensorQuant | None:
    """The weights of a group with one code of 8 bits per byte; None where scales belong to other parts of a weight."""
    if weights.get("dynamic"):
        return None
    if weights.get("type") == "float":
        if strategy == "block" and weights.get("block_structure") == [BLOCK, BLOCK]:
            return TensorQuant.of_floats(E4M3FN, Grouping("block", BLOCK))
        if strategy == "group" and _is_mx(weights):
            return MXFP8
        return TensorQuant.of_floats(E4M3FN, Grouping("channel")) if strategy in ("tensor", "channel") else None
    kind: Kind = "sym" if weights.get("symmetric", True) else "asym"
    grid = TensorQuant(8, Grouping("channel"), integer_quantizer(8, kind))
    return grid if strategy in ("tensor", "channel") else None


def _is_mx(arguments: Mapping[str, Any]) -> bool:
    """Whether a group says MXFP8 for weights or inputs."""
    mx = all(arguments.get(key) == value for key, value in _MX_ARGUMENTS.items())
    return mx and arguments.get("type") == "float" and arguments.get("num_bits") == MXFP8.bits


def read_inputs(arguments: Mapping[str, Any] | None, where: str) -> ActivationQuant | None:
    """The inverse of `input_arguments`.

    Raises:
        ToolkitError: inputs that are not run here.
    """
    if not arguments:
        return None
    bits, kind, strategy = arguments["num_bits"], arguments.get("type", "int"), arguments.get("strategy", "tensor")
    dynamic = arguments.get("dynamic", False)
    known = strategy in ("token", "tensor", "group") and isinstance(dynamic, bool) and arguments.get("symmetric", True)
    if not known or (strategy != "tensor" and not dynamic) or (kind == "float" and bits != 8):
        raise ToolkitError(
            f"{where}: quantized activations of {bits}-bit {kind} per {strategy}, dynamic {dynamic}",
            "read here are symmetric ones per token, tensor or group, of integers or FP8",
        )
    if _is_mx(arguments):
        return take_activations("mxfp8-amxfp8")[1]
    granularity: Granularity = strategy
    size = arguments.get("group_size") if strategy == "group" else None
    return ActivationQuant(bits, "fp8-e4m3" if kind == "float" else "int", granularity, dynamic, True, size)


def read_cache(arguments: Mapping[str, Any] | None, width: int) -> CacheQuant | None:
    """The inverse of `cache_arguments`, for keys of ``width`` channels.

    Raises:
        ToolkitError: another grid.
    """
    if not arguments:
        return None
    static = arguments.get("dynamic") is False
    cache = CacheQuant(arguments["num_bits"], "fp8-e4m3" if arguments.get("type") == "float" else "int", static)
    expected = cache_arguments(cache, width)
    assert expected is not None
    if any(arguments.get(key) != value for key, value in expected.items()):
        raise ToolkitError(
            f"config.json: kv_cache_scheme {dict(arguments)} is not read here",
            "read are dynamic ones with a group per head, asymmetric integers or symmetric floats, and static "
            "symmetric ones with a step per tensor",
        )
    return cache
