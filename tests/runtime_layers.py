"""Random quantized layers and inputs for the tests of the runtime."""

import torch

from ptq.numerics.integers import grid_parameters, quantize
from ptq.quantized import QuantizedTensor
from ptq.scheme import parse_scheme

BF16, FP32 = torch.bfloat16, torch.float32


def quantized(scheme: str, out: int, width: int, seed: int = 0, ordered: bool = False) -> QuantizedTensor:
    """Round-to-nearest codes of a random weight whose groups differ in size and mean."""
    generator = torch.Generator().manual_seed(seed)
    parsed = parse_scheme(scheme)
    group = parsed.weights.grouping.width(width)
    w = torch.randn(out, width // group, group, generator=generator) * 0.05
    w += 0.05 * torch.randn(out, width // group, 1, generator=generator)
    scale, zero = grid_parameters(w, parsed.weights)
    codes = quantize(w, scale.unsqueeze(-1), None if zero is None else zero.unsqueeze(-1), parsed.weights)
    index = None
    codes = codes.view(out, width).to(torch.uint8)
    if ordered:
        permutation = torch.randperm(width, generator=generator)
        index = (permutation // group).to(torch.int32)
        codes = codes[:, permutation]
    return QuantizedTensor(codes, scale, None if zero is None else zero.to(torch.uint8), parsed, index)


def inputs(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    # a mean away from zero, as activations have: an offset that is wrong for a whole group then shows
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(7)) + 0.3).to(dtype)
