"""Quantized linears of a checkpoint that may come from anywhere: one place where what is stored is held against what
its scheme says, before anything is computed from it.

A table per format gives dtype and shape of every tensor; what was decoded is then checked once more, alike for all
formats: finite steps, zero points within the bits, group indices within the groups. Without these a wrong file is
decoded to wrong weights, and reading it back compares like with like.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from calibration.errors import ToolkitError, foreign
from calibration.model.checkpoint import CheckpointReader
from calibration.model.headers import TensorInfo
from ptq.formats.registry import Format, format_of, stored_names
from ptq.formats.static_cache import OLDER, older
from ptq.numerics.bitstream import words_per_row
from ptq.quantized import PARTS, QuantizedTensor
from ptq.scheme import BITS, BLOCK, SUPER_WIDTH, QuantScheme

Shape = tuple[int, ...]
Schemes = Mapping[str, tuple[QuantScheme, tuple[int, int]]]
"""Scheme and shape ``(out, in)`` of linears, by full name."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
BYTES = (torch.uint8, torch.float8_e8m0fnu, torch.float8_e4m3fn)
WORDS = (torch.int32,)
AT_ONCE = 1 << 22  # values that are looked at in float32 at a time
INDEX = (torch.int32, torch.int64)
FIX = "config.json and the safetensors files do not belong together, or are damaged: fetch or write them again"


@dataclass(frozen=True)
class Stored:
    """What a tensor may be: its dtypes, and its possible shapes (writers differ)."""

    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[Shape, ...]


def quantized_linears(reader: CheckpointReader) -> tuple[Format, dict[str, tuple[QuantScheme, tuple[int, int]]]] | None:
    """The format of a quantized checkpoint, and scheme and shape of every quantized linear by full name; None for a
    float one.

    Raises:
        ToolkitError: a format that is not read here, or a description that makes no sense.
    """
    with foreign(f"{reader.folder}/config.json: quantization_config is not readable", FIX):
        fmt = format_of(reader.config)
        if fmt is None:
            return None
        found = fmt.schemes(reader.config, reader.infos, reader.tensor)
        for name, (scheme, shape) in found.items():
            _check_scheme(name, scheme, shape)
    _check_strangers(reader, fmt, found)
    return fmt, found


def _check_strangers(reader: CheckpointReader, fmt: Format, linears: Schemes) -> None:
    """Refuse what the format has no use for beside the tensors of a linear: a name with a slip in it would be missed
    without a word, and carried along as if it were a tensor of the model."""
    for name in reader.infos:
        linear, _, suffix = name.rpartition(".")
        if linear not in linears or name in stored_names(fmt, linear).values():
            continue
        if suffix not in {"bias", *fmt.suffixes, *table(fmt.name, *linears[linear])}:
            raise ToolkitError(f"{name}: no tensor of a linear in '{fmt.name}' files", FIX)


def _check_scheme(name: str, scheme: QuantScheme, shape: tuple[int, int]) -> None:
    w = scheme.weights
    if not all(type(n) is int and n > 0 for n in shape):
        raise ToolkitError(f"{name}: a weight of shape {shape}", FIX)
    if w.float_format is None and w.salient_percent is None and w.bits not in BITS:
        raise ToolkitError(f"{name}: {w.bits}-bit integer weights", f"read are {', '.join(map(str, BITS))} bits")
    size, length = w.grouping.size, w.grouping.length(shape)
    if size is not None and (size < 1 or length % size):
        raise ToolkitError(f"{name}: groups of {size} in lines of {length} weights", FIX)


def read_linear(
    reader: CheckpointReader, fmt: Format, name: str, scheme: QuantScheme, shape: tuple[int, int]
) -> QuantizedTensor:
    """One quantized linear of a checkpoint, by its full name.

    Raises:
        ToolkitError: a tensor that is missing, has another dtype or shape than the scheme says, or values that no
            writer of the format makes.
    """
    stored = {s: full for s, full in stored_names(fmt, name).items() if full in reader.infos}
    step = older(name)
    if step is not None and OLDER in stored:
        stored.setdefault(step, stored.pop(OLDER))
    _check_stored(name, fmt.name, scheme, shape, {s: reader.infos[full] for s, full in stored.items()})
    with foreign(f"{name}: cannot be decoded as '{fmt.name}'", FIX):
        q = fmt.decode({s: reader.tensor(full) for s, full in stored.items()}, scheme, shape)
    check_values(name, q, shape)
    return q


def _check_stored(
    name: str, fmt: str, scheme: QuantScheme, shape: tuple[int, int], infos: Mapping[str, TensorInfo]
) -> None:
    for suffix, stored in table(fmt, scheme, shape).items():
        info = infos.get(suffix)
        if info is None:
            continue  # what a linear cannot do without is missed by `decode`
        if info.dtype not in stored.dtypes or info.shape not in stored.shapes:
            wanted = " or ".join(map(str, stored.shapes))
            kinds = " or ".join(str(d).removeprefix("torch.") for d in stored.dtypes)
            raise ToolkitError(
                f"{name}.{suffix}: {str(info.dtype).removeprefix('torch.')} {info.shape}, a weight {shape} of scheme "
                f"{scheme} has {kinds} {wanted}",
                FIX,
            )


def table(fmt: str, scheme: QuantScheme, shape: tuple[int, int]) -> dict[str, Stored]:
    """Suffix -> what the format stores there for a weight ``[out, in]`` of this scheme."""
    (out, columns), bits = shape, scheme.weights.bits
    scales = scheme.weights.grouping.scales(shape)
    groups = scales[1]
    index = Stored(INDEX, ((columns,),))
    if fmt == "awq":
        packed = Stored(WORDS, ((groups, out // 8),))
        return {
            "qweight": Stored(WORDS, ((columns, out // 8),)),
            "qzeros": packed,
            "scales": Stored(FLOATS, ((groups, out),)),
        }
    if fmt in ("gptq", "gptq_v2"):
        return {
            "qweight": Stored(WORDS, ((columns * bits // 32, out),)),
            "qzeros": Stored(WORDS, ((groups, words_per_row(out, bits)),)),
            "scales": Stored(FLOATS, ((groups, out),)),
            "g_idx": index,
        }
    if fmt == "native":
        return _native(scheme, shape, scales) | {"group_index": index}
    one = Stored(FLOATS, ((), (1,), (1, 1)))
    padded = -(-columns // (32 // bits)) if bits <= 8 else 0
    halves = (torch.uint8,) if scheme.weights.float_format is not None else WORDS
    widths = ((out, columns // 2),) if scheme.weights.float_format is not None else None
    rows = (scales, (out,), (1,), ()) if groups == 1 else (scales,)
    if scheme.weights.grouping.kind == "block":
        rows = ((-(-out // BLOCK), groups),)
    zeros = Stored((*WORDS, torch.int8), (*rows, (words_per_row(out, bits), groups), (-(-out // (32 // bits)), groups)))
    return {
        "weight": Stored((torch.int8, torch.float8_e4m3fn), (shape,)),
        "weight_packed": Stored(halves, widths or ((out, words_per_row(columns, bits)), (out, padded))),
        "weight_scale": Stored((*FLOATS, *BYTES), rows),
        "weight_zero_point": zeros,
        "weight_shape": Stored(INDEX, ((2,),)),
        "weight_g_idx": index,
        "weight_global_scale": one,
        "input_scale": one,
        "input_global_scale": one,
        "k_scale": one,
        "v_scale": one,
        "input_zero_point": Stored((torch.int8, torch.int32, torch.float8_e4m3fn), ((), (1,), (1, 1))),
    }


def _native(scheme: QuantScheme, shape: tuple[int, int], scales: tuple[int, int]) -> dict[str, Stored]:
    (out, columns), w = shape, scheme.weights
    stored = (-(-out // BLOCK), scales[1]) if w.grouping.kind == "block" else scales
    scale = Stored((*FLOATS, *BYTES), (stored,))
    if w.salient_percent is not None:
        salient = w.salient_count(columns)
        return {
            "codes": Stored(WORDS, ((out, words_per_row(columns - salient, 1)),)),
            "salient_codes": Stored(WORDS, ((out, words_per_row(salient, 4)),)),
            "scale": scale,
        }
    codes = Stored((torch.uint8,), (shape,)) if w.bits == 8 else Stored(WORDS, ((out, words_per_row(columns, w.bits)),))
    if w.superblocks:
        over = Stored((torch.float16,), ((out, columns // SUPER_WIDTH),))
        integers = {"scale": Stored((torch.int8, torch.uint8), (scales,)), "zero": Stored((torch.uint8,), (scales,))}
        return {"codes": codes, **integers, "super_scale": over, "super_min": over}
    numel = scales[0] * scales[1]
    if w.float_zeros:
        zero = Stored((torch.float16,), (scales,))
    elif w.bits == 8:
        zero = Stored((torch.uint8,), (scales,))
    else:
        zero = Stored(WORDS, ((words_per_row(numel, w.bits),),))
    return {"codes": codes, "scale": scale, "zero": zero, "global_scale": Stored((torch.float32,), ((1,),))}


def check_values(name: str, q: QuantizedTensor, shape: tuple[int, int]) -> None:
    """What holds for a linear of any format.

    Raises:
        ToolkitError: codes of another shape, steps that are not finite, zero points or group indices out of range.
    """
    w = q.scheme.weights
    scales = w.grouping.scales(shape) if w.salient_percent is None else q.scale.shape
    if q.shape != shape or q.scale.shape != scales or (q.zero is not None and q.zero.shape != q.scale.shape):
        raise ToolkitError(f"{name}: codes {q.shape} with scales {tuple(q.scale.shape)} for a weight {shape}", FIX)
    if not bool(torch.isfinite(q.scale).all()):
        raise ToolkitError(f"{name}: scales that are NaN or Inf", FIX)
    if q.global_scale is not None and not bool((torch.isfinite(q.global_scale) & (q.global_scale > 0)).all()):
        raise ToolkitError(f"{name}: a scale of the whole tensor of {float(q.global_scale)}", FIX)
    for over in (q.super_scale, q.super_min):
        if over is not None and not bool(torch.isfinite(over).all()):
            raise ToolkitError(f"{name}: scales of super-blocks that are NaN or Inf", FIX)
    if q.zero is not None and w.salient_percent is None and not w.superblocks:
        outside = q.zero[~((q.zero >= 0) & (q.zero <= w.levels))]  # NaN is outside
        if outside.numel() and (not w.float_zeros or not bool(torch.isfinite(outside).all())):
            raise ToolkitError(f"{name}: a zero point of {float(outside[0]):g} in {w.bits} bits", FIX)
    index = q.group_index
    if index is not None and not bool(((index >= 0) & (index < q.scale.shape[1])).all()):
        raise ToolkitError(f"{name}: group indices outside 0..{q.scale.shape[1] - 1}", FIX)
    for part, tensor in q.parts.items():
        if part not in PARTS or (tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all())):
            raise ToolkitError(f"{name}.{part}: NaN or Inf", FIX)


def check_finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor beside the quantized linears, unless it holds NaN or Inf.

    Raises:
        ToolkitError: names it.
    """
    pieces = tensor.flatten().split(AT_ONCE) if tensor.is_floating_point() else ()  # float8 has no isfinite
    if not all(bool(torch.isfinite(piece.float()).all()) for piece in pieces):
        raise ToolkitError(f"{name}: NaN or Inf", FIX)
    return tensor
