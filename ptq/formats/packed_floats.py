"""FP4 inside compressed-tensors: ``nvfp4-pack-quantized`` and ``mxfp4-pack-quantized``.

Per linear ``W [out, in]``: ``weight_packed`` uint8 ``[out, in/2]``, the even column in the low half of a byte, a code
being the sign (bit 3) and the index in 0, 0.5, 1, 1.5, 2, 3, 4, 6. NVFP4: ``weight_scale`` float8_e4m3fn
``[out, in/16]`` and ``weight_global_scale`` float32 ``[1]``, by which scales are divided. MXFP4: ``weight_scale`` uint8
``[out, in/32]``, exponent + 127. Inputs in NVFP4 have ``input_global_scale`` float32 ``[1]``, by which the E4M3 steps
of their groups are divided; those in MXFP4 have nothing. Source: compressed-tensors 0.20, ``compressors/nvfp4`` and
``compressors/mxfp4``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from calibration.errors import Problem
from ptq.activations import BLOCK_FLOATS, ActivationQuant, take_activations
from ptq.float_formats import E4M3FN
from ptq.formats import checks
from ptq.formats.narrow_scales import decode_scale, encode_scale
from ptq.linears import ModelLayout
from ptq.quantized import INPUT_GRID, QuantizedTensor
from ptq.scheme import FLOAT_PRESETS, QuantScheme, TensorQuant

FORMATS: dict[str, str] = {"nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized"}
INPUT_SCALE = "input_global_scale"
SUFFIXES = frozenset({"weight_packed", "weight_scale", "weight_global_scale", INPUT_SCALE})

INPUT_STEP = INPUT_GRID[0]

_ARGS: dict[str, dict[str, Any]] = {
    "nvfp4": {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"},
    "mxfp4": {"strategy": "group", "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"},
}


def preset_of(weights: TensorQuant) -> str | None:
    """``nvfp4`` or ``mxfp4``, or None for any other grid."""
    return next((name for name in FORMATS if FLOAT_PRESETS[name] == weights), None)


def problems(layout: ModelLayout, format_name: str) -> list[Problem]:
    """Grids of floats that are neither of the two nor E4M3 (for which see `plain_codes`), and experts, which
    transformers fuses."""
    other = checks.matching(
        layout,
        lambda n: n.scheme.weights.float_format not in (None, E4M3FN) and preset_of(n.scheme.weights) is None,  # type: ignore[union-attr]
    )
    schemes = ", ".join(dict.fromkeys(str(linear.scheme) for linear in other))
    reason = f"'{format_name}' has no place for {schemes}: of floats it holds nvfp4, mxfp4, mxfp8 and fp8"
    experts = checks.matching(layout, lambda n: n.expert is not None and preset_of(n.scheme.weights) is not None)  # type: ignore[union-attr]
    inputs = checks.matching(
        layout,
        lambda n: (
            n.scheme.inputs is not None  # type: ignore[union-attr]
            and n.scheme.inputs.kind != preset_of(n.scheme.weights)  # type: ignore[union-attr]
            and n.scheme.inputs.kind in ("fp4-e2m1", *FORMATS)  # type: ignore[union-attr]
        ),
    )
    return [
        *checks.refuse(
            inputs,
            f"has 4-bit float inputs, which '{format_name}' knows only as those of its weights",
            f"use nvfp4-anvfp4 or mxfp4-amxfp4, or {checks.NATIVE}",
        ),
        *checks.refuse(other, reason, f"use --scheme nvfp4 or mxfp4, or {checks.NATIVE}"),
        *checks.refuse(experts, f"experts in FP4 are not written to '{format_name}'", checks.NATIVE),
    ]


def encode(q: QuantizedTensor) -> dict[str, torch.Tensor]:
    """Tensors of one linear."""
    tensors = {
        "weight_packed": q.codes[:, 0::2] | (q.codes[:, 1::2] << 4),
        "weight_scale": encode_scale(q.scale, q.scheme.weights.scale_format),
    }
    if q.global_scale is not None:
        tensors["weight_global_scale"] = q.global_scale.clone()  # linears of one input share it
    if q.scheme.inputs is not None and q.scheme.inputs.kind == "nvfp4":
        tensors[INPUT_SCALE] = 1 / q.parts[INPUT_STEP].float().view(1)
    return tensors


def decode(tensors: Mapping[str, torch.Tensor], scheme: QuantScheme, shape: tuple[int, int]) -> QuantizedTensor:
    """The inverse of `encode`, bit for bit (a negative zero of another tool stays one)."""
    packed = tensors["weight_packed"]
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).view(shape)
    scale = decode_scale(tensors["weight_scale"])
    parts = {INPUT_STEP: 1 / tensors[INPUT_SCALE].float().view(1)} if INPUT_SCALE in tensors else {}
    return QuantizedTensor(codes, scale, None, scheme, parts=parts, global_scale=tensors.get("weight_global_scale"))


def weight_arguments(preset: str) -> dict[str, Any]:
    """The ``weights`` entry of a group in config.json."""
    size = FLOAT_PRESETS[preset].grouping.size
    plain = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False, "group_size": size}
    return {**plain, **_ARGS[preset]}


def input_arguments(inputs: ActivationQuant) -> dict[str, Any]:
    """``input_activations`` of a group in config.json whose inputs are FP4."""
    return {**weight_arguments(inputs.kind), "dynamic": True if inputs.dynamic else "local"}


def read_inputs(arguments: Mapping[str, Any]) -> ActivationQuant | None:
    """The inverse of `input_arguments`, or None where they are no FP4."""
    if arguments.get("type") != "float" or arguments.get("num_bits") != 4 or not arguments.get("symmetric", True):
        return None
    for kind in FORMATS:
        width, live = BLOCK_FLOATS[kind]
        told = arguments.get("dynamic"), arguments.get("group_size"), arguments.get("strategy")
        if told == (True if live else "local", width, _ARGS[kind]["strategy"]):
            return take_activations(f"{kind}-a{kind}")[1]
    return None


def scheme_of(label: str | None, arguments: Mapping[str, Any]) -> QuantScheme | None:
    """The scheme of a group of config.json, or None where it is not FP4; of its weights alone."""
    if arguments.get("type") != "float" or arguments.get("num_bits") != 4:
        return None
    preset = next((name for name, known in FORMATS.items() if known == label), None)
    if preset is None or arguments.get("group_size") != FLOAT_PRESETS[preset].grouping.size:
        return None
    return QuantScheme(FLOAT_PRESETS[preset])
