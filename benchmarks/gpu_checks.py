"""Every kernel for GPUs against a reference, for `benchmarks/gpu.py`: on a GPU, or in Triton's interpreter.

References are sums in float64, and for GPTQ the loop in torch. An error is that of the whole result, relative to its
size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch

from ptq.methods.rtn import round_to_nearest
from ptq.numerics import column_loop
from ptq.numerics.activations import fake_quantize_inputs
from ptq.numerics.gptq import Rounded, gptq_round
from ptq.runtime.kernels.smoothed_triton import smoothed_product
from ptq.runtime.kernels.triton_smooth import pack_outputs
from ptq.runtime.linear import QuantLinear
from ptq.scheme import parse_scheme
from sparsity.kernels.gpu import TRITON
from sparsity.kernels.int4 import Int4Rows
from sparsity.kernels.kernel import Mask, Weight
from sparsity.kernels.reference import kept_values

LOOP_SCHEMES = ("w4a16-g32-sym", "w3a16-g32-asym", "w4a16-gchannel-sym")
LINEAR_SCHEMES = ("w4a16-g32-sym", "w4a16-g32-asym", "w8a16-gchannel-sym", "w8a8", "w4a4-rs32", "fp8")
STORED = ("float32", "bfloat16", "int4")
FLOAT32, BFLOAT16 = 1e-5, 1e-2  # largest errors; bfloat16 rounds a result by up to 0.4 %


@dataclass(frozen=True)
class Check:
    """Attributes:
    name: of kernel and case; error: as above; limit: the largest error that counts as equal.
    """

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # not-a-number is not


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def randn(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


def every_check(device: torch.device, out: int, width: int) -> list[partial[list[Check]]]:
    """Checks on weights ``[out, width]``. One that breaks leaves the others."""
    shape = device, out, width
    return [
        *(partial(loops, *shape, scheme) for scheme in LOOP_SCHEMES),
        partial(smoothed, *shape),
        *(partial(sparse_products, *shape, stored) for stored in STORED),
        *(partial(linears, *shape, scheme) for scheme in LINEAR_SCHEMES),
    ]


def rounded_by(program: bool, *args: object, **settings: object) -> Rounded:
    """`gptq_round` by the Triton program or by the loop in torch, on any device."""
    with mock.patch.object(column_loop, "_runs_triton", lambda device: program):
        return gptq_round(*args, **settings)  # type: ignore[arg-type]


def loops(device: torch.device, out: int, width: int, scheme: str) -> list[Check]:
    """Where the last digits of float32 decide, codes differ, and with them the rest of a row; the loss hardly does."""
    w, x = randn(out, width, device=device), randn(4 * width, width, device=device)
    x = x + x.roll(1, 1)
    settings = {"static_groups": True, "order": "activation", "block_size": min(128, 3 * width // 4)}
    quant = parse_scheme(scheme).weights
    found, expected = (rounded_by(way, w, x.T @ x, quant, **settings) for way in (True, False))
    differing = float((found.codes != expected.codes).float().mean())
    return [
        Check(f"gptq loop, {scheme}: codes that differ", differing, 0.02),
        Check(f"gptq loop, {scheme}: loss", abs(found.loss / expected.loss - 1), 1e-3),
    ]


def smoothed(device: torch.device, out: int, width: int) -> list[Check]:
    tokens, group = 17, 32
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (tokens, width), generator=generator, dtype=torch.int8).to(device)
    weight = torch.randint(-8, 8, (out, width), generator=generator, dtype=torch.int8).to(device)
    order = torch.randperm(width, generator=generator).to(device)
    groups = -(-width // group)
    scales, steps, scale = (randn(n, device=device).abs() + 0.1 for n in (groups, tokens, out))
    found = smoothed_product(codes, pack_outputs(weight), order, scales, steps, scale, group)
    by_column = scales.double().repeat_interleave(group)[:width]
    expected = (codes.double() * by_column) @ weight[:, order].double().T * steps.double()[:, None] * scale.double()
    return [Check("smoothed product of 4-bit codes", off(found, expected), FLOAT32)]


def sparse_products(device: torch.device, out: int, width: int, stored: str) -> list[Check]:
    dtype, limit = (torch.float32, FLOAT32) if stored == "float32" else (torch.bfloat16, BFLOAT16)
    by_output: Weight = randn(out, width, device=device, dtype=dtype)
    by_input: Weight = by_output.T.contiguous()
    dense = by_output.double()
    if stored == "int4":
        q = round_to_nearest(randn(out, width, device=device), parse_scheme("w4a16-g32-asym"))
        by_input, by_output = (Int4Rows.pack(q.codes, q.scale, q.zero, mode) for mode in ("input", "output"))
        dense = q.dequantize(torch.float32).double()
    checks = []
    for tokens in (1, 3):
        x, gate = (randn(tokens, n, device=device, dtype=dtype) for n in (width, out))
        mask, bias = Mask(torch.full((1,), 0.7, device=device)), randn(out, device=device)
        found = TRITON.input_product(x, by_input, mask, bias)
        expected = kept_values(x, mask).double() @ dense.T + bias
        checks.append(Check(f"sparse input product, {stored}, {tokens} tokens", off(found, expected), limit))
        found = TRITON.output_product(x, by_output, gate, mask, bias)
        expected = kept_values(gate, mask).double() * (x.double() @ dense.T + bias)
        checks.append(Check(f"sparse output product, {stored}, {tokens} tokens", off(found, expected), limit))
    return checks


def linears(device: torch.device, out: int, width: int, text: str) -> list[Check]:
    """Whatever kernel a `QuantLinear` takes on this device."""
    w, bias, scheme = randn(out, width, device=device) * 0.02, randn(out, device=device), parse_scheme(text)
    q = round_to_nearest(w, scheme)
    layer = QuantLinear(q, bias, torch.bfloat16, device)
    x = randn(17, width, device=device, dtype=torch.bfloat16)
    seen = x if scheme.inputs is None else fake_quantize_inputs(x.float(), scheme.inputs)
    expected = seen.double() @ q.dequantize(torch.float32).double().T + bias
    return [Check(f"linear {text}, kernel {layer.kernel}", off(layer(x), expected), BFLOAT16)]
