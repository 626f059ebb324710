"""The parts of `benchmarks/gpu.py`, which says what they are."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_checks import every_check, rounded_by
from random_llama import llama, write

import ptq
from calibration.record import read_timings
from calibration.walk.statistics import Gram
from ptq.methods.rtn import round_to_nearest
from ptq.numerics.gptq_triton import round_block
from ptq.runtime.linear import QuantLinear
from ptq.scheme import parse_scheme
from ptq.sparse.decoding import int4_layers
from sparsity.decode import DecodeLinear, Phase

BLOCKS = 32
MEDIAN = 0.6745  # of the size of a normal number: half of the inputs are pruned
DIFFERS = "DIFFERS"
Rows = list[tuple[str, float, str]]
"""(what, number, unit)"""


@dataclass(frozen=True)
class Shapes:
    """Of the block and of the amounts of work."""

    hidden: int = 4096
    mlp: int = 14336
    heads: int = 32
    kv_heads: int = 8
    samples: int = 128
    length: int = 2048
    group: int = 128
    check: tuple[int, int] = (1040, 1056)  # the last tile of rows, and the last block of columns, are not full
    buffer: int = 2**31
    repeats: int = 20
    copies: int = 4  # of a block that is decoded, so that nothing stays in the GPU's cache

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """``(out, in)``"""
        h, m, kv = self.hidden, self.mlp, self.hidden // self.heads * self.kv_heads
        return {"q": (h, h), "k": (kv, h), "v": (kv, h), "o": (h, h), "gate": (m, h), "up": (m, h), "down": (h, m)}

    @property
    def weights(self) -> int:
        return sum(out * width for out, width in self.linears.values())


TINY = Shapes(64, 96, 4, 2, 2, 32, 32, (48, 96), 2**16, 1, 1)


@dataclass(frozen=True)
class Bench:
    device: torch.device
    shapes: Shapes

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], repeats: int | None = None) -> float:
        """Of one call behind a first one, the mean of several that the GPU carries out without a pause."""
        run()
        self.wait()
        start, count = time.perf_counter(), repeats or self.shapes.repeats
        for _ in range(count):
            run()
        self.wait()
        return (time.perf_counter() - start) / count

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def bandwidth(self) -> float:
        """Bytes per second of a sum that reads every byte once."""
        buffer = torch.ones(self.shapes.buffer // 4, device=self.device)
        return buffer.nbytes / self.seconds(buffer.sum)


def check(bench: Bench) -> Rows:
    rows: Rows = []
    for run in every_check(bench.device, *bench.shapes.check):
        try:
            rows += [(c.name, c.error, "off" if c.passed else f"{DIFFERS} (at most {c.limit:g})") for c in run()]
        except Exception as error:  # noqa: BLE001 - the other kernels still have something to say
            case = " ".join(map(str, (run.func.__name__, *run.args[1:])))
            rows.append((f"{case}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", 1.0, DIFFERS))
    return rows


def gram(bench: Bench) -> Rows:
    rows: Rows = []
    for width in (bench.shapes.hidden, bench.shapes.mlp):
        x, statistic = bench.randn(4 * bench.shapes.length, width), Gram(width, bench.device)
        seconds = bench.seconds(lambda s=statistic, x=x: s.update(x))
        rows.append((f"{len(x)} x {width}, bfloat16", 2e-12 * len(x) * width**2 / seconds, "TFLOP/s"))
    return rows


def loop(bench: Bench) -> Rows:
    h, m, group = bench.shapes.hidden, bench.shapes.mlp, bench.shapes.group
    rows: Rows = []
    quant = parse_scheme(f"w4a16-g{group}-sym").weights
    for name, out, width in (("gate and up", 2 * m, h), ("down", h, m)):
        w = bench.randn(out, width, dtype=torch.float32)
        hessian = torch.eye(width, device=bench.device).mul_(width) + 1.0
        for way, program in (("Triton", True), ("torch", False)):

            def run(w: torch.Tensor = w, hessian: torch.Tensor = hessian, program: bool = program) -> object:
                return rounded_by(program, w, hessian, quant, static_groups=True)

            rows.append((f"{name} {out} x {width}, {way}", bench.seconds(run, 1), "s"))
    columns, out = group, h // 2
    w = bench.randn(columns, out, dtype=torch.float32)
    u, step = torch.eye(columns, device=bench.device), torch.full_like(w, 0.1)
    seconds = bench.seconds(lambda: round_block(w, u, None, step, None, quant))
    return [*rows, (f"a block of {columns} columns of {out} rows", seconds, "s")]


def quantize(bench: Bench) -> Rows:
    s, rows = bench.shapes, []
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        config = llama(s.hidden, s.mlp, s.heads, s.kv_heads, 1, 32000 if bench.gpu else 512)
        write(model, config, torch.Generator().manual_seed(0))
        for method in ("gptq", "awq", "awq+gptq"):
            if bench.gpu:
                torch.cuda.reset_peak_memory_stats()
            out = Path(place) / method
            ptq.quantize(
                model, out=out, method=method, scheme=f"w4a16-g{s.group}-sym", dataset="random", samples=s.samples,
                seq_len=s.length, device=str(bench.device), dtype="bfloat16",
            )  # fmt: skip
            timings = read_timings(out)
            assert timings is not None
            rows += [(f"{method}, stage {stage}", seconds, "s") for stage, seconds in timings.stages.items()]
            if bench.gpu:
                rows.append((f"{method}, peak memory", torch.cuda.max_memory_allocated() / 1e9, "GB"))
    return rows


def variants(bench: Bench) -> dict[str, tuple[Callable[[str, torch.Tensor], torch.nn.Module], float]]:
    """How a linear is decoded, and the share of its rows that is read."""
    group, dtype, device = bench.shapes.group, torch.bfloat16, bench.device
    scheme = parse_scheme(f"w4a16-g{group}-sym")
    threshold = torch.full((1,), MEDIAN, device=device)

    def dense(name: str, w: torch.Tensor) -> torch.nn.Module:
        layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
        layer.weight = torch.nn.Parameter(w, requires_grad=False)
        return layer

    def masked(layer: torch.nn.Module | None) -> DecodeLinear:
        assert isinstance(layer, DecodeLinear)
        layer.set_mask(threshold, None, None)
        return layer

    def sparse(name: str, w: torch.Tensor) -> torch.nn.Module:
        return masked(DecodeLinear(w.T.contiguous(), "input", None, dtype, Phase(decoding=True)))

    def int4(name: str, w: torch.Tensor) -> torch.nn.Module:
        return QuantLinear(round_to_nearest(w.float(), scheme), None, dtype, device)

    def int4_sparse(name: str, w: torch.Tensor) -> torch.nn.Module:
        build = int4_layers({name: "input"}, Phase(decoding=True), dtype, device, None)
        return masked(build(name, round_to_nearest(w.float(), scheme), None))

    return {
        "bfloat16": (dense, 1.0),
        "bfloat16, half of the inputs pruned": (sparse, 0.5),
        "int4": (int4, 1.0),
        "int4, half of the inputs pruned": (int4_sparse, 0.5),
    }


def kernel_of(layer: torch.nn.Module) -> str:
    kernel = getattr(layer, "kernel", "torch")
    return str(getattr(kernel, "name", kernel))


def decoded(bench: Bench, wrap: Callable[[Callable[[], None]], Callable[[], None]]) -> Rows:
    peak, copies = bench.bandwidth(), bench.shapes.copies
    rows: Rows = [("read bandwidth", peak / 1e9, "GB/s")]
    for name, (build, share) in variants(bench).items():
        calls: list[tuple[torch.nn.Module, torch.Tensor]] = []
        size = 0.0
        for linear, (out, width) in [*bench.shapes.linears.items()] * copies:
            layer = build(linear, bench.randn(out, width) * 0.02)
            calls.append((layer, bench.randn(1, width)))
            size += share * getattr(layer, "weight_bytes", 2 * out * width)

        def step(calls: list[tuple[torch.nn.Module, torch.Tensor]] = calls) -> None:
            for layer, x in calls:
                layer(x)

        with torch.inference_mode():
            seconds = bench.seconds(wrap(step))
        kernels = ", ".join(sorted({kernel_of(layer) for layer, _ in calls}))
        rows.append((f"{name} ({kernels})", copies / (BLOCKS * seconds), "tokens/s"))
        rows.append((f"{name}, of bandwidth", 100 * size / seconds / peak, "%"))
    return rows


def decode(bench: Bench) -> Rows:
    return decoded(bench, lambda step: step)


def graph(bench: Bench) -> Rows:
    def captured(step: Callable[[], None]) -> Callable[[], None]:
        if not bench.gpu:
            return step
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            step()
        return recorded.replay

    return decoded(bench, captured)


def load(bench: Bench) -> Rows:
    """What a block costs on its way to the GPU, and how much of that hides behind products if its memory is pinned."""
    block = torch.zeros(bench.shapes.weights, dtype=torch.bfloat16)
    pinned, target = block.pin_memory() if bench.gpu else block, torch.empty_like(block, device=bench.device)
    x = bench.randn(4 * bench.shapes.length, bench.shapes.hidden)
    stream = torch.cuda.Stream() if bench.gpu else None

    def work() -> None:
        for _ in range(20):
            x.T @ x

    def both() -> None:
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            target.copy_(pinned, non_blocking=True)
        work()

    plain, fast = (bench.seconds(lambda t=t: target.copy_(t, non_blocking=True), 3) for t in (block, pinned))
    alone, together = bench.seconds(work, 3), bench.seconds(both, 3)
    rows = [("a block, ordinary memory", plain, "s"), ("a block, pinned memory", fast, "s")]
    return [*rows, ("products alone", alone, "s"), ("products while a pinned block is copied", together, "s")]


PARTS: dict[str, Callable[[Bench], Rows]] = {
    "check": check, "gram": gram, "loop": loop, "quantize": quantize, "decode": decode, "graph": graph, "load": load,
}  # fmt: skip
