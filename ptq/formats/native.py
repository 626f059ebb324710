"""Our own checkpoint: codes, scales, zero points and column groups as they are, for every layout.

Per quantized linear ``W [out, in]`` with G groups per line and b bits, where lines are the rows, or the columns for
groups along the outputs:

===============  =========  ==========================  ====================================================
suffix           dtype      shape                       content
===============  =========  ==========================  ====================================================
``codes``        int32      ``[out, ceil(in*b/32)]``    dense stream along each row; b = 8: uint8 ``[out, in]``
``scale``        bfloat16   ``[lines, G]``              the step (float16 where only that is exact); of blocks one
                                                        line for all rows of a block
                 uint8                                  powers of two (MX formats): exponent + 127
                 float8     (E4M3)                      two-level formats (NVFP4): step times global scale
                 int8                                   integers of groups in super-blocks (K-quants)
``global_scale`` float32    ``[1]``                     only in two-level formats
``super_scale``  float16    ``[out, in/256]``           only with super-blocks: what their integers are multiplied by
``super_min``    float16    ``[out, in/256]``           the same for minima, whose integers (uint8) are then ``zero``
``zero``         int32      ``[ceil(lines*G*b/32)]``    one dense stream, line after line; b = 8: uint8
                                                        ``[lines, G]``; absent for symmetric grids
                 float16    ``[lines, G]``              for ``asym_float``
``group_index``  int32      ``[in]``                    only where groups follow an activation order
``salient_codes`` int32    ``[out, ceil(k*4/32)]``     one-bit weights: codes of the k salient columns; ``codes``
                                                        are then those of the others, ``zero`` has 4 bits
names of PARTS   their own  see `ptq.quantized.PARTS`   only where a pass made one
===============  =========  ==========================  ====================================================

``config.json``: ``{"quant_method": "ptq", "version": 1, "layers": {name: {bits, group_size, axis, quantizer,
shape}}}``, and ``float_format`` and ``scale_format`` where codes stand for floats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from calibration.errors import Problem, ToolkitError
from calibration.model.headers import TensorInfo
from ptq.formats.checks import group_problems, stored_scale
from ptq.formats.narrow_scales import decode_scale, encode_scale
from ptq.linears import ModelLayout
from ptq.numerics.binary import SALIENT_BITS, unpack_mask
from ptq.numerics.bitstream import pack, unpack, words_per_row
from ptq.numerics.groups import for_every_row, once_per_block
from ptq.quantized import PARTS, QuantizedTensor
from ptq.scheme import NARROW_SCALES, QuantScheme

VERSION = 1
ORDER = (
    *("codes", "salient_codes", "scale", "super_scale", "global_scale", "zero", "super_min", "group_index"),
    *sorted(PARTS),
)
"""Suffixes of a linear's tensors in the order in which files have them."""
WEIGHTS_KEY = "transformers_weights"
WEIGHTS_FILE = "load it with ptq.load_model, or import ptq before from_pretrained.safetensors"
"""What ``transformers_weights`` in config.json names. Plain transformers skips a quantization that it does not know and
would go on with random weights: it looks for this file instead, and its error says what to do."""


@dataclass(frozen=True)
class Native:
    """Format-free checkpoint, read by this toolkit only."""

    name: ClassVar[str] = "native"
    suffixes: ClassVar[frozenset[str]] = frozenset(ORDER)

    def check(self, layout: ModelLayout) -> list[Problem]:
        """Only groups that do not divide a row; no file can hold those."""
        return group_problems(layout)

    def for_grid(self, symmetric: bool) -> Native:
        """Any zero point can be stored."""
        return self

    def encode(self, q: QuantizedTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Tensors of one linear. ``dtype`` is not used: bfloat16 holds our scales exactly."""
        bits, kind = q.scheme.weights.bits, q.scheme.weights.scale_format
        if q.scheme.weights.salient_percent is not None:
            mask, bits = unpack_mask(q.parts["salient"], q.shape[1]), SALIENT_BITS
            tensors = {"codes": pack(q.codes[:, ~mask], 1), "salient_codes": pack(q.codes[:, mask], bits)}
        else:
            tensors = {"codes": q.codes.clone() if bits == 8 else pack(q.codes, bits)}
        if q.super_scale is not None:
            tensors |= _super_tensors(q)
        elif kind in NARROW_SCALES:
            tensors["scale"] = encode_scale(q.scale, kind)
        else:
            exact = torch.equal(q.scale.to(torch.bfloat16).float(), q.scale)
            stored = once_per_block(q.scale, q.scheme.weights.grouping)
            tensors["scale"] = stored_scale(stored, torch.bfloat16 if exact else torch.float16)
        if q.global_scale is not None:
            tensors["global_scale"] = q.global_scale.clone()  # linears of one input share it
        if q.zero is not None and q.scheme.weights.float_zeros:
            tensors["zero"] = stored_scale(q.zero, torch.float16)
        elif q.zero is not None and q.super_scale is None:
            # one stream for the whole tensor: rows of few groups would leave most of their last word empty
            tensors["zero"] = q.zero.clone() if bits == 8 else pack(q.zero.reshape(1, -1), bits)[0]
        if q.group_index is not None:
            tensors["group_index"] = q.group_index.to(torch.int32)
        return {**tensors, **q.parts}

    def decode(
        self, tensors: Mapping[str, torch.Tensor], scheme: QuantScheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        """The inverse of `encode`, bit for bit."""
        bits = scheme.weights.bits
        scale = for_every_row(decode_scale(tensors["scale"]), scheme.weights.grouping, shape[0])
        codes, zero = tensors["codes"], tensors.get("zero")
        if scheme.weights.salient_percent is not None:
            codes, bits = _mixed_codes(tensors, shape), SALIENT_BITS
        elif bits < 8:
            codes = unpack(codes, bits, shape[1])
        if scheme.weights.superblocks:
            over = (tensors["super_scale"].float(), None if zero is None else tensors["super_min"].float())
            return QuantizedTensor(codes, scale, zero, scheme, None, _parts(tensors), None, *over)
        if scheme.weights.float_zeros:
            zero = None if zero is None else zero.float()
        elif bits < 8:
            zero = None if zero is None else unpack(zero[None], bits, scale.numel()).view_as(scale)
        index = tensors.get("group_index")
        return QuantizedTensor(codes, scale, zero, scheme, index, _parts(tensors), tensors.get("global_scale"))

    def config(self, layout: ModelLayout) -> dict[str, Any]:
        """``quantization_config`` of config.json."""
        layers = {}
        for linear in (*layout.quantized, *layout.outside):
            assert linear.scheme is not None
            layers[linear.name] = {**linear.scheme.to_json(), "shape": list(linear.shape)}
        return {"quant_method": "ptq", "version": VERSION, "layers": layers}

    def schemes(
        self, config: Mapping[str, Any], infos: Mapping[str, TensorInfo], read: Callable[[str], torch.Tensor]
    ) -> dict[str, tuple[QuantScheme, tuple[int, int]]]:
        """Scheme and shape of every quantized linear, by full name.

        Raises:
            ToolkitError: a newer version of the layout, or codes that are missing or of another size.
        """
        data = config["quantization_config"]
        if data.get("version") != VERSION:
            raise ToolkitError(
                f"config.json: native layout version {data.get('version')}, this toolkit reads {VERSION}",
                "read it with the version of ptq that wrote it",
            )
        found = {}
        for name, entry in data["layers"].items():
            scheme, (out, columns) = QuantScheme.from_json(entry), entry["shape"]
            bits = scheme.weights.bits
            columns -= scheme.weights.salient_count(columns)
            expected = (out, columns if bits == 8 else words_per_row(columns, bits))
            info = infos.get(f"{name}.codes")
            if info is None or info.shape != expected:
                raise ToolkitError(
                    f"{name}.codes: {'missing' if info is None else info.shape}, config.json tells of {expected}",
                    "config.json and the safetensors files are of different runs: export again",
                )
            found[name] = (scheme, (out, entry["shape"][1]))
        return found

    def loads_in(self, layout: ModelLayout) -> dict[str, str]:
        """Who opens the checkpoint."""
        only = "no: only this toolkit reads it; `ptq export` turns it into another format"
        inside = "yes, after `import ptq`, which then runs it" if not _experts(layout) else only
        return {"transformers": inside, "vLLM": only, "llama.cpp": only}


def _experts(layout: ModelLayout) -> bool:
    """transformers keeps the experts of a layer in one module, where no `QuantLinear` finds a place."""
    return any(linear.expert is not None for linear in layout.quantized)


def _parts(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name in PARTS}


def _super_tensors(q: QuantizedTensor) -> dict[str, torch.Tensor]:
    """Scales and minima of super-blocks, and the integers of their groups."""
    assert q.super_scale is not None
    tensors = {"scale": q.scale.to(torch.int8), "super_scale": q.super_scale.to(torch.float16)}
    if q.zero is not None and q.super_min is not None:
        tensors |= {"zero": q.zero.clone(), "super_min": q.super_min.to(torch.float16)}
    return tensors


def _mixed_codes(tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
    """Codes uint8 ``[out, in]`` of one-bit weights with salient columns."""
    mask = unpack_mask(tensors["salient"], shape[1])
    codes = torch.empty(shape, dtype=torch.uint8, device=mask.device)
    salient = int(mask.sum())
    codes[:, mask] = unpack(tensors["salient_codes"], SALIENT_BITS, salient)
    codes[:, ~mask] = unpack(tensors["codes"], 1, shape[1] - salient)
    return codes
