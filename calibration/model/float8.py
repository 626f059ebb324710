"""Float8 checkpoints as the float weights they stand for, and every other dtype that is not understood by name.

DeepSeek-V3, Kimi K2 and MiniMax-M2 are published only so: E4M3 codes with a scale for every block of 128 x 128
(``weight_scale_inv``: what to multiply by, in spite of its name). llm-compressor's FP8_BLOCK is the same under other
names. Others have a scale per row or per tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from calibration.errors import ToolkitError
from calibration.model.headers import TensorInfo

CODES = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = ("_scale_inv", "_scale")
BESIDE = ("input_scale", "activation_scale", "input_scale_ub", "weight_scale_inv", "weight_scale")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
METHODS = ("fp8", "fbgemm_fp8")  # of quantization_config, beside the blocks of compressed-tensors
BLOCK = 128


def is_float8(settings: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` describes such a checkpoint: one of `METHODS`, or compressed-tensors all of
    whose weights are float8 in blocks (llm-compressor's FP8_BLOCK)."""
    groups = settings.get("config_groups")
    if settings.get("quant_method") != "compressed-tensors" or not isinstance(groups, dict) or not groups:
        return settings.get("quant_method") in METHODS
    weights = [group.get("weights") if isinstance(group, dict) else None for group in groups.values()]
    blocks = [isinstance(w, dict) and w.get("strategy") == "block" and w.get("type") == "float" for w in weights]
    return not settings.get("kv_cache_scheme") and all(blocks)


def has_whole_blocks(settings: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> bool:
    """Whether a ``quantization_config`` that `is_float8` is of compressed-tensors, and its blocks divide the inputs of
    all float8 weights. (Groups of inputs that do not are run by nobody.)"""
    if settings.get("quant_method") != "compressed-tensors":
        return False
    shapes = [info.shape for info in infos.values() if info.dtype in CODES]
    square = all(
        group["weights"].get("block_structure") == [BLOCK, BLOCK] for group in settings["config_groups"].values()
    )
    return square and all(len(shape) == 2 and shape[1] % BLOCK == 0 for shape in shapes)


def with_scales(infos: Mapping[str, TensorInfo], dtype: torch.dtype) -> dict[str, TensorInfo]:
    """Headers as seen by a reader of float weights: float8 codes that have scales beside them count as ``dtype``.

    The scales themselves, and those of inputs, are left out.

    Raises:
        ToolkitError: float8 codes without scales, or with scales of a shape that does not fit.
    """
    found = dict(infos)
    for name, info in infos.items():
        if info.dtype not in CODES:
            continue
        partner = next((name + suffix for suffix in SCALES if name + suffix in infos), None)
        if partner is None:
            raise ToolkitError(
                f"{name}: float8 codes, and no {name}_scale_inv or {name}_scale beside them: their scales are lost",
                "start from the original checkpoint, with its scales, or from one in 16 bits",
            )
        _blocks(name, info.shape, infos[partner].shape)
        found[name] = replace(info, dtype=dtype, codes=info.dtype, scale=infos[partner])
        stem = name.removesuffix("weight")
        for other in (partner, *(stem + leaf for leaf in BESIDE)):
            found.pop(other, None)
    return found


def _blocks(name: str, shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...]:
    """How many values along every axis share a scale."""
    if all(n == 1 for n in scale):
        return shape
    if len(scale) == 1 and scale[0] == shape[0]:
        scale = (*scale, *(1 for _ in shape[1:]))
    if len(scale) == len(shape):
        widths = tuple(n if count == 1 else 1 if count == n else BLOCK for n, count in zip(shape, scale, strict=True))
        if all(-(-n // width) == count for n, width, count in zip(shape, widths, scale, strict=True)):
            return widths
    raise ToolkitError(
        f"{name}: float8 codes {shape} with scales {scale}: neither one per tensor, per row nor per block of {BLOCK}",
        "start from a checkpoint in 16 bits",
    )


def dequantized(name: str, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``codes * scale`` in float32, in the shape of the codes. Scales may be stored as powers of two (E8M0)."""
    widths = _blocks(name, tuple(codes.shape), tuple(scale.shape))
    wide = scale.float()
    if wide.numel() == 1:
        return codes.float() * wide.view(())
    wide = wide.view(*wide.shape, *(1 for _ in codes.shape[wide.ndim :]))
    for axis, width in enumerate(widths):
        if width > 1:
            wide = wide.repeat_interleave(width, dim=axis).narrow(axis, 0, codes.shape[axis])
    return codes.float() * wide


def check_dtypes(infos: Mapping[str, TensorInfo], blocks: str) -> None:
    """Refuse weights whose values are not what they stand for: codes of integers or floats, and complex numbers.

    Args:
        blocks: path of the decoder blocks. Outside of them integers may be indices; inside, masks of older classes.

    Raises:
        ToolkitError: names the first such weight, its dtype and how many there are.
    """
    wrong = [n for n, i in infos.items() if i.dtype not in FLOATS and (i.dtype.is_floating_point or i.dtype.is_complex)]
    wrong += [
        n
        for n, i in infos.items()
        if not (i.dtype.is_floating_point or i.dtype.is_complex)
        and (n.endswith("weight") or (len(i.shape) in (2, 3) and n.startswith(blocks + ".")))
    ]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        dtype = str(infos[wrong[0]].dtype).removeprefix("torch.")
        raise ToolkitError(
            f"{wrong[0]}{more}: stored as {dtype}, which is no float weight",
            "start from a checkpoint in 16 or 32 bits; a quantized one needs the quantization_config it came with",
        )
