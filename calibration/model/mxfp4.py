"""Experts stored as MXFP4 (gpt-oss) as the float tensors they stand for.

``<name>_blocks`` uint8 ``[experts, out, in/32, 16]`` holds two E2M1 codes per byte, the lower four bits first;
``<name>_scales`` uint8 ``[experts, out, in/32]`` the exponents of powers of two, plus 127. The model's own tensor is
``[experts, in, out]``. Source: OCP Microscaling Formats v1.0, section 5.2, and gpt-oss's checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from calibration.errors import ToolkitError
from calibration.model.headers import TensorInfo

METHOD = "mxfp4"  # of quantization_config
CODES, SCALES = "_blocks", "_scales"
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # E2M1, sign last bit


def with_blocks(infos: Mapping[str, TensorInfo], dtype: torch.dtype) -> dict[str, TensorInfo]:
    """Headers as seen by a reader of float weights: pairs of codes and scales count as one tensor of ``dtype``.

    Raises:
        ToolkitError: codes without scales, or shapes that do not fit.
    """
    found = dict(infos)
    for name, info in infos.items():
        if not name.endswith(CODES) or info.dtype != torch.uint8:
            continue
        stem = name.removesuffix(CODES)
        scales = infos.get(stem + SCALES)
        if scales is None or len(info.shape) != 4 or scales.shape != info.shape[:3] or scales.dtype != torch.uint8:
            raise ToolkitError(
                f"{name}: MXFP4 codes {info.shape}, and no {stem}{SCALES} of one byte per group beside them",
                "fetch the checkpoint again; its shards may belong to different models",
            )
        experts, out, groups, width = info.shape
        shape = (experts, groups * width * 2, out)
        found[stem] = replace(info, dtype=dtype, shape=shape, codes=torch.uint8, scale=scales)
        del found[name], found[stem + SCALES]
    return found


def dequantized(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes and scales as stored, as ``[experts, in, out]`` in float32."""
    table = torch.tensor(VALUES)
    pairs = torch.stack([table[(codes & 15).int()], table[(codes >> 4).int()]], dim=-1)
    values = torch.ldexp(pairs.flatten(-2), scales.int()[..., None] - 127)
    return values.flatten(2).transpose(1, 2).contiguous()
