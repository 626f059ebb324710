"""Two codes per byte with a scale and an offset per group: torch's int4 products on CPU and CUDA.

Both ops compute with ``weight = (q - 8) * scale + offset``, q in [0, 15], groups of 32, 64, 128 or 256 columns, and
``scale_zero [in / group, out, 2]`` holding (scale, offset) in the dtype of the activations:

* CPU: ``_convert_weight_to_int4pack_for_cpu(q int32 [out, in], 1)`` gives uint8 ``[out, in / 2]`` in an order that
  depends on the instruction set; ``_weight_int4pack_mm_for_cpu``. out must be a multiple of 16. Weights are formed
  and summed in float32, so only the output is rounded.
* CUDA: ``_convert_weight_to_int4pack(uint8 [out, in / 2], inner_k_tiles)``, the even column in the high half of its
  byte, gives int32 ``[out / 8, in / (16 inner_k_tiles), 32, inner_k_tiles / 2]``; ``_weight_int4pack_mm``. It needs
  compute capability 8.0; weights are formed in bfloat16.

Our weight is ``(code - z) * s``. Wherever ``code + 8 - z`` lies in [0, 15] for all codes it is stored as q with offset
0, which is exact: all symmetric grids of 2 to 4 bits, and all asymmetric ones of 2 and 3 bits. An asymmetric 4-bit
grid keeps q = code and needs the offset ``(8 - z) * s``: up to 11 significant bits where bfloat16 has 8. Its rounding
adds to every weight of a group the same error of at most ``2^-8 |8 - z| s <= 7/256 s``, a tenth of the rms rounding
error of the grid itself, ``s / sqrt(12)``; there is none where |8 - z| is 0, 1, 2, 4 or 8. On random layers the rms
error of an output against float64 (0.017 to 0.026 of the quantization error) is no more than 3 % above that of the
same layer with bfloat16 weights, and mostly below it: the op forms its products in float32.
"""

from __future__ import annotations

import torch

from ptq.quantized import QuantizedTensor
from ptq.runtime.kernels.kernel import Kernel, KernelQuery, Packed

OP_GROUPS = (256, 128, 64, 32)


def _op_group(group_width: int) -> int | None:
    """The widest group of the op that divides ours; a wider group repeats its scale."""
    return next((size for size in OP_GROUPS if group_width % size == 0), None)


def _supports(query: KernelQuery) -> str | None:
    if query.binary:
        return "it knows no one-bit weights with salient columns"
    if query.superblocks:
        return "it has one scale per group, not integer scales under those of super-blocks"
    if query.float_format is not None:
        return f"it multiplies integers, not {query.float_format} floats"
    if query.device_type not in ("cpu", "cuda"):
        return f"it runs on CPU and CUDA, not on {query.device_type}"
    if query.axis == "out":
        return "its groups run along the inputs of a row, not along the outputs of a column"
    if query.bits > 4:
        return f"it holds codes of at most 4 bits, not {query.bits}"
    if query.dtype != torch.bfloat16:
        name = str(query.dtype).removeprefix("torch.")
        return f"it is fast with bfloat16 activations only; with {name} a dequantized product is faster"
    if _op_group(query.group_width) is None:
        return f"groups of {query.group_width} columns are no multiple of 32"
    if query.out_features % 16:
        return f"{query.out_features} output features are no multiple of 16"
    if query.device_type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "it needs a GPU of compute capability 8.0 or later"
    return None


def _pack(q: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """codes in the op's layout, scale_zero ``[in / op group, out, 2]`` in ``dtype``; with an activation order also
    order int32 ``[in]``, the columns sorted by group, by which inputs are gathered on every call."""
    bits, width = q.scheme.weights.bits, q.scheme.weights.grouping.width(q.shape[1])
    group = _op_group(width)
    assert group is not None, "supports() refuses this width"
    packed: dict[str, torch.Tensor] = {}
    codes, scale = q.codes, q.scale
    if q.group_index is not None and width != q.shape[1]:
        order = torch.argsort(q.group_index, stable=True)
        expected = torch.arange(scale.shape[1], device=order.device).repeat_interleave(width)
        assert torch.equal(q.group_index[order].long(), expected), "every group has the same number of columns"
        codes = codes[:, order]
        packed["order"] = order.to(device=device, dtype=torch.int32)
    if q.zero is None:
        shifted, offset = codes + (8 - 2 ** (bits - 1)), torch.zeros_like(scale)
    elif bits < 4:
        per_column = q.zero.repeat_interleave(width, dim=1)
        shifted, offset = codes + (8 - per_column), torch.zeros_like(scale)  # z <= 7: no wrap-around in uint8
    else:
        shifted, offset = codes, (8 - q.zero.float()) * scale
    pairs = torch.stack((scale, offset), dim=-1).repeat_interleave(width // group, dim=1)  # [out, in / group, 2]
    packed["scale_zero"] = pairs.transpose(0, 1).to(device=device, dtype=dtype).contiguous()
    packed["codes"] = _layout(shifted.to(device))
    return packed


def _layout(codes: torch.Tensor) -> torch.Tensor:
    """uint8 ``[out, in]`` in [0, 15] to the layout of the device it lies on."""
    if codes.device.type == "cpu":
        return torch._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    inner_k_tiles = next(tiles for tiles in (8, 4, 2) if codes.shape[1] % (16 * tiles) == 0)
    return torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], inner_k_tiles)


def _run(x: torch.Tensor, packed: Packed, query: KernelQuery) -> torch.Tensor:
    scale_zero, order, bias = packed["scale_zero"], packed.get("order"), packed.get("bias")
    if order is not None:
        x = x.index_select(1, order)
    group = query.in_features // scale_zero.shape[0]
    product = torch._weight_int4pack_mm_for_cpu if query.device_type == "cpu" else torch._weight_int4pack_mm
    y = product(x, packed["codes"], group, scale_zero)
    return y if bias is None else y.add_(bias)


INT4 = Kernel("int4", _supports, _pack, _run)
