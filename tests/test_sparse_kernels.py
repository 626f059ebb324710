"""Sparse kernels against a float64 product with the masked vector: shapes, densities, dtypes, threads, processors."""

from __future__ import annotations

import copy
import itertools
import mmap

import pytest
import torch

from calibration.errors import ToolkitError
from sparsity.kernels import build, native
from sparsity.kernels.build import cpu_level, library
from sparsity.kernels.dispatch import KERNELS, refusals, select
from sparsity.kernels.kernel import Mask, SparseQuery
from sparsity.kernels.native import NATIVE
from sparsity.kernels.pages import HUGE, on_huge_pages
from sparsity.kernels.reference import REFERENCE, bag_sums, kept_values
from sparsity.sites import small

BF16, FP32 = torch.bfloat16, torch.float32
CPU_FLOAT = SparseQuery("input", "float", FP32, "cpu")
SHAPES = [(1, 1), (7, 5), (33, 63), (64, 64), (65, 200), (130, 2177), (300, 257)]
DENSITIES = [0.0, 0.02, 0.3, 0.5, 0.9, 1.0]

needs_native = pytest.mark.skipif(NATIVE.supports(CPU_FLOAT) is not None, reason="needs a C++ compiler")
kernels = pytest.mark.parametrize("kernel", [REFERENCE, pytest.param(NATIVE, marks=needs_native)], ids=lambda k: k.name)


def draw(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask_for(values: torch.Tensor, density: float) -> Mask:
    """A threshold that keeps this share of the values: all of them at 1, none at 0."""
    sizes = values.float().abs().flatten().sort().values
    count = round((1 - density) * len(sizes))
    return Mask(torch.tensor([0.0]) if count == 0 else sizes[count - 1 : count].clone())


def assert_close(
    y: torch.Tensor, exact: torch.Tensor, sizes: torch.Tensor, rounded: torch.Tensor | None = None
) -> None:
    """Within 1e-5 of the summed sizes; in bfloat16 also a rounding of the result, and of what is ``rounded`` (default:
    every factor)."""
    rounding = 0.0 if y.dtype == FP32 else 2.0**-8 * (exact.abs() + (sizes if rounded is None else rounded))
    assert ((y.double() - exact).abs() <= 1e-5 * sizes + rounding + 1e-30).all()


def masked(x: torch.Tensor, mask: Mask | None) -> torch.Tensor:
    """The oracle's own mask, in float64 on exact copies."""
    wide = x.double()
    if mask is None:
        return wide
    shifted = x.float() - (0 if mask.center is None else mask.center)
    return torch.where(shifted.abs() <= mask.threshold, torch.zeros_like(wide), shifted.double())


def check_input(kernel, n_in: int, n_out: int, tokens: int, mask_of, dtype: torch.dtype, bias: bool) -> None:
    x, wt = draw(tokens, n_in, dtype=dtype), draw(n_in, n_out, dtype=dtype, seed=1)
    b = draw(n_out, seed=2) if bias else None
    mask = mask_of(x)
    z = masked(x, mask)
    exact = z @ wt.double() + (0 if b is None else b.double())
    sizes = z.abs() @ wt.double().abs() + (0 if b is None else b.double().abs())
    assert_close(kernel.input_product(x, wt, mask, b), exact, sizes)


def check_output(kernel, n_in: int, n_out: int, tokens: int, mask_of, dtype: torch.dtype, bias: bool) -> None:
    x, w, gate = draw(tokens, n_in, dtype=dtype), draw(n_out, n_in, dtype=dtype, seed=1), draw(tokens, n_out, seed=3)
    gate, b = gate.to(dtype), draw(n_out, seed=2) if bias else None
    mask = mask_of(gate)
    g = masked(gate, mask)
    dots = x.double() @ w.double().T + (0 if b is None else b.double())
    sizes = (x.double().abs() @ w.double().abs().T + (0 if b is None else b.double().abs())) * g.abs()
    h = kernel.output_product(x, w, gate, mask, b)
    if dtype == BF16:  # the reference rounds the dot product before it multiplies
        sizes = sizes * 2
    assert_close(h, g * dots, sizes)
    assert (h[g == 0] == 0).all(), "exact zeros elsewhere"


@kernels
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize(("n_in", "n_out"), SHAPES)
def test_products_equal_the_dense_one_with_the_masked_vector(kernel, n_in, n_out, dtype):
    for check, density, tokens in itertools.product((check_input, check_output), DENSITIES, (1, 2, 3, 8)):
        check(kernel, n_in, n_out, tokens, lambda v, d=density: mask_for(v, d), dtype, bias=tokens == 2)


@kernels
@pytest.mark.parametrize("seed", range(8))
def test_products_on_random_shapes(kernel, seed):
    g = torch.Generator().manual_seed(seed)
    n_in, n_out, tokens = (int(torch.randint(1, top, (1,), generator=g)) for top in (400, 3000, 9))
    density = float(torch.rand(1, generator=g))
    for check in (check_input, check_output):
        check(kernel, n_in, n_out, tokens, lambda v: mask_for(v, density), [BF16, FP32][seed % 2], bias=bool(seed & 2))


@kernels
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_thresholds_and_centers_per_channel(kernel, dtype):
    threshold = draw(200, seed=5).abs()
    for center in (None, torch.tensor([0.3]), draw(200, seed=6)):
        check_input(kernel, 200, 130, 3, lambda _, c=center: Mask(threshold, c), dtype, bias=True)
    check_input(kernel, 200, 130, 3, lambda _: Mask(torch.tensor([0.5]), draw(200, seed=6)), dtype, bias=False)
    check_output(kernel, 130, 200, 3, lambda _: Mask(threshold), dtype, bias=True)


@kernels
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_no_kept_value_gives_the_bias_or_exact_zeros(kernel, dtype):
    x, wt, bias = draw(1, 70, dtype=dtype), draw(70, 40, dtype=dtype), draw(40)
    everything = Mask(torch.tensor([1e9]))
    assert torch.equal(kernel.input_product(x, wt, everything, None), torch.zeros(1, 40, dtype=dtype))
    assert torch.equal(kernel.input_product(x, wt, everything, bias), bias[None].to(dtype))
    gate = draw(1, 40, dtype=dtype)
    h = kernel.output_product(x, wt.T.contiguous(), gate, everything, bias)
    assert torch.equal(h, torch.zeros(1, 40, dtype=dtype))


@kernels
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_zero_percent_is_bit_identical_to_no_mask(kernel, dtype):
    x, wt, gate = draw(2, 300, dtype=dtype), draw(300, 129, dtype=dtype), draw(2, 129, dtype=dtype)
    nothing = Mask(torch.tensor([0.0]))
    assert torch.equal(kernel.input_product(x, wt, nothing, None), kernel.input_product(x, wt, None, None))
    w = wt.T.contiguous()
    assert torch.equal(kernel.output_product(x, w, gate, nothing, None), kernel.output_product(x, w, gate, None, None))


def test_the_reference_is_bit_identical_to_dense_where_nothing_is_masked():
    x, wt = draw(1, 300), draw(300, 129)
    dense = torch.nn.functional.linear(x, wt.T)
    assert torch.equal(REFERENCE.input_product(x, wt, Mask(torch.tensor([0.0])), None), dense)
    gate = draw(1, 129)
    w = wt.T.contiguous()
    assert torch.equal(REFERENCE.output_product(x, w, gate, None, None), torch.nn.functional.linear(x, w) * gate)


@kernels
def test_not_a_number_is_kept_and_shows(kernel):
    x, wt = draw(1, 40), draw(40, 33)
    x[0, 7] = float("nan")
    assert kernel.input_product(x, wt, Mask(torch.tensor([100.0])), None).isnan().all()


@needs_native
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_the_number_of_threads_changes_no_bit(dtype):
    x, wt, gate = draw(2, 200, dtype=dtype), draw(200, 5000, dtype=dtype), draw(2, 5000, dtype=dtype)
    w, mask = wt.T.contiguous(), Mask(torch.tensor([0.7]))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((NATIVE.input_product(x, wt, mask, None), NATIVE.output_product(x, w, gate, mask, None)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@needs_native
@pytest.mark.parametrize("level", ["AVX2", "DEFAULT"])
def test_every_instruction_set_computes_the_same(level, monkeypatch):
    if level == "AVX2" and cpu_level() == "DEFAULT":
        pytest.skip("this processor has no AVX2")
    monkeypatch.setattr(native, "library", lambda: library(level))
    for (n_in, n_out), dtype, check in itertools.product(SHAPES, (BF16, FP32), (check_input, check_output)):
        check(NATIVE, n_in, n_out, 1, lambda v: mask_for(v, 0.5), dtype, bias=True)
        check(NATIVE, n_in, n_out, 5, lambda v: mask_for(v, 0.5), dtype, bias=False)


# --- oracles of the method notes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bags", [2, 3, 7, 64])
def test_bags_summed_equal_one_bag(bags):
    values, weight = draw(500) * (draw(500, seed=4) > 0), draw(500, 96, seed=1)
    one, split = bag_sums(values, weight, 1), bag_sums(values, weight, bags)
    assert ((one - split).abs() <= 1e-6 * (values.abs() @ weight.abs())).all()
    assert torch.equal(bag_sums(torch.zeros(500), weight, bags), torch.zeros(96)), "an empty bag"


def test_flags_and_index_lists_are_the_same_product():
    x, wt, mask = draw(1, 300), draw(300, 70), Mask(torch.tensor([0.6]))
    flags = ~small(x, mask.threshold)
    by_flags = (x * flags).double() @ wt.double()
    index = flags[0].nonzero().squeeze(1)
    by_index = x[:, index].double() @ wt[index].double()
    assert torch.allclose(by_flags, by_index, rtol=0, atol=1e-12)
    for kernel in (k for k in KERNELS if k.supports(CPU_FLOAT) is None):
        assert torch.allclose(kernel.input_product(x, wt, mask, None).double(), by_index, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
def test_the_union_of_independent_masks_has_density_one_minus_s_to_the_tokens(tokens):
    n, s = 200_000, 0.5
    kept = kept_values(draw(tokens, n), Mask(torch.tensor([0.67449]))).any(0).double().mean()
    assert abs(kept - (1 - s**tokens)) < 4 * (0.25 / n) ** 0.5


def test_a_transposed_copy_serves_dense_products_without_a_second_one():
    wt = draw(40, 30).T.contiguous()
    assert wt.T.stride() == (1, 40)
    assert torch.allclose(torch.nn.functional.linear(draw(5, 30), wt.T), draw(5, 30) @ wt, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 5), (1200, 1001)])
def test_copies_on_huge_pages_are_copies(shape):
    x = draw(*shape).T
    made = on_huge_pages(x)
    assert torch.equal(made, x) and made.is_contiguous()
    if x.nbytes >= HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        assert made.data_ptr() % HUGE == 0
    made += 1
    assert not torch.equal(made, x)


def test_small_tensors_share_huge_pages_and_nothing_else():
    """Each has a storage of its own, so that copying or writing one does not take the others along."""
    first, second = on_huge_pages(draw(40, 100)), on_huge_pages(torch.arange(3000))
    assert first.untyped_storage().nbytes() == 16000 and second.untyped_storage().nbytes() == 24000
    assert all(t.data_ptr() % 64 == 0 for t in (first, second)) and torch.equal(second, torch.arange(3000))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert 0 < second.data_ptr() - first.data_ptr() < HUGE
    expected = first.clone()
    second.fill_(-1)
    copied = copy.deepcopy(first)
    del second
    assert torch.equal(first, expected) and torch.equal(copied, expected)


# --- the dispatcher and bad input ---------------------------------------------------------------------------------


@needs_native
def test_native_is_taken_where_it_can_run_and_says_why_not_elsewhere():
    assert select(CPU_FLOAT) is NATIVE
    assert "not on cuda" in refusals(SparseQuery("input", "float", BF16, "cuda"))["native"]
    half = SparseQuery("output", "float", torch.float16, "cpu")
    assert select(half) is REFERENCE and "not float16" in refusals(half)["native"]
    with pytest.raises(ToolkitError, match="not float16") as error:
        select(half, "native")
    assert select(half, error.value.fix.removeprefix("use ")) is REFERENCE


def test_an_unknown_kernel_is_an_error_with_the_nearest_name():
    with pytest.raises(ToolkitError, match="unknown value 'natiev'") as error:
        select(CPU_FLOAT, "natiev")
    assert "did you mean 'native'?" in error.value.fix


@needs_native
@pytest.mark.parametrize("tokens", [0, 9])
def test_numbers_of_tokens_that_the_kernel_does_not_take_are_refused(tokens):
    with pytest.raises(ToolkitError, match=f"{tokens} tokens at once, it takes 1 to 8"):
        NATIVE.input_product(draw(tokens, 8), draw(8, 8), None, None)


def test_without_a_compiler_the_reference_runs_and_the_reason_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "find_compiler", _no_compiler(build.find_compiler, monkeypatch))
    build.library.cache_clear()
    try:
        assert select(CPU_FLOAT) is REFERENCE
        assert "no compiler" in refusals(CPU_FLOAT)["native"]
    finally:
        build.library.cache_clear()


def _no_compiler(find, monkeypatch):
    def search() -> str:
        with monkeypatch.context() as patch:
            patch.setenv("PATH", "")
            patch.delenv("CXX", raising=False)
            return find()

    return search


@needs_native
def test_a_compiler_that_fails_is_reported_with_its_error(monkeypatch, tmp_path):
    (tmp_path / "broken.cpp").write_text("int broken( {\n")
    with pytest.raises(ToolkitError, match=r"failed: .*error") as error:
        build._compile(build.find_compiler(), build.FLAGS, [tmp_path / "broken.cpp"], tmp_path / "x.so")
    assert "reference" in error.value.fix and list(tmp_path.iterdir()) == [tmp_path / "broken.cpp"]
