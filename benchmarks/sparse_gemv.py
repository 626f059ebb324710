"""Sparse products of one token beside the dense ones of torch: time, bandwidth, ratio, by density, shape and dtype.

    python benchmarks/sparse_gemv.py [--threads N] [--dtypes bfloat16 float32 int4] [--tokens 1] [--repeats 25]

Weights rotate through 300 MB, so that none is in a cache. The fastest of the repeats counts. "dense torch" is the
fastest of torch's own ways (the weight as it is and transposed; for int4 ``_weight_int4pack_mm_for_cpu`` in bfloat16),
"x dense" the ratio to it. Bandwidth is bytes of used rows over time, as a share of the measured read bandwidth.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch.nn.functional import linear

from ptq.runtime.generate import read_bandwidth
from sparsity.kernels.dispatch import select
from sparsity.kernels.int4 import Int4Rows
from sparsity.kernels.kernel import Mask, SparseQuery, Weight

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336)]  # out, in
DENSITIES = (1.0, 0.7, 0.5, 0.3, 0.1)
ROTATION = 300e6
GROUP = 128


def fastest(run: Callable[[int], object], repeats: int) -> float:
    """Seconds; ``run`` gets the number of the repeat."""
    best = float("inf")
    for i in range(-2, repeats):
        start = time.perf_counter()
        run(max(i, 0))
        if i >= 0:
            best = min(best, time.perf_counter() - start)
    return best


Dense = Callable[[torch.Tensor], object]


def weights(dtype: str, n_out: int, n_in: int) -> tuple[list[Weight], list[Weight], list[Dense]]:
    """Copies by rows of Wᵀ and of W, and torch's dense products with them."""
    if dtype != "int4":
        kind = getattr(torch, dtype)
        copies = max(1, int(ROTATION / (n_out * n_in * kind.itemsize)))
        w = [torch.randn(n_out, n_in).to(kind) for _ in range(copies)]
        wt = [x.T.contiguous() for x in w]
        plain = [lambda x, i=i: linear(x, w[i % copies]) for i in range(copies)]
        turned = [lambda x, i=i: linear(x, wt[i % copies].T) for i in range(copies)]
        x = torch.randn(1, n_in).to(kind)
        dense = min((plain, turned), key=lambda ways: fastest(lambda i: ways[i % copies](x), 5))
        return list(wt), list(w), dense
    copies = max(1, int(ROTATION / (n_out * n_in / 2)))
    codes = torch.randint(0, 16, (n_out, n_in), dtype=torch.uint8)
    scale = torch.rand(n_out, n_in // GROUP).to(torch.bfloat16)
    rows = [[Int4Rows.pack(codes, scale, None, mode) for _ in range(copies)] for mode in ("input", "output")]
    packed = [torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1) for _ in range(copies)]
    pairs = torch.stack((scale, torch.zeros_like(scale)), dim=-1).transpose(0, 1).contiguous()
    dense = [lambda x, p=p: torch._weight_int4pack_mm_for_cpu(x, p, GROUP, pairs) for p in packed]
    return rows[0], rows[1], dense


def mask_of(values: torch.Tensor, density: float) -> Mask:
    return Mask(values.float().abs().quantile(1 - density)[None])


def measure(dtype: str, n_out: int, n_in: int, tokens: int, repeats: int, peak: float) -> None:
    by_input, by_output, dense = weights(dtype, n_out, n_in)
    kind = torch.bfloat16 if dtype == "int4" else getattr(torch, dtype)
    x, gate = torch.randn(tokens, n_in).to(kind), torch.randn(tokens, n_out).to(kind)
    stored = "int4" if dtype == "int4" else "float"
    kernel = select(SparseQuery("input", stored, kind, "cpu"))  # type: ignore[arg-type]
    baseline = fastest(lambda i: dense[i % len(dense)](x), repeats)
    size = by_input[0].nbytes
    print(f"| {dtype} {n_out} x {n_in} | dense torch | {_cell(baseline, size, peak, baseline)} |")
    for name, copies in (("input", by_input), ("output", by_output)):
        cells = []
        for density in DENSITIES:
            mask = mask_of(x if name == "input" else gate, density)

            def product(i: int, copies: list[Weight] = copies, mask: Mask = mask, name: str = name) -> object:
                weight = copies[i % len(copies)]
                if name == "input":
                    return kernel.input_product(x, weight, mask, None)
                return kernel.output_product(x, weight, gate, mask, None)

            seconds = fastest(product, repeats)
            read = size * (1 - (1 - density) ** tokens if density < 1 else 1)
            cells.append(_cell(seconds, read, peak, baseline))
        print(f"| {dtype} {n_out} x {n_in} | {name} | {' | '.join(cells)} |", flush=True)


def _cell(seconds: float, size: float, peak: float, baseline: float) -> str:
    return f"{seconds * 1e3:.2f} ms, {size / seconds / peak:.0%}, {baseline / seconds:.2f} x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32", "int4"])
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=25)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    peak = read_bandwidth(2**29)
    print(f"{args.threads} threads, read bandwidth {peak / 1e9:.1f} GB/s, {args.tokens} tokens\n")
    print("| weight | product | " + " | ".join(f"density {d:g}" for d in DENSITIES) + " |")
    print("| --- | --- |" + " ---: |" * len(DENSITIES))
    for dtype in args.dtypes:
        for n_out, n_in in SHAPES:
            measure(dtype, n_out, n_in, args.tokens, args.repeats, peak)


if __name__ == "__main__":
    main()
