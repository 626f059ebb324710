"""Every kernel against the dequantized weight, and the dispatcher's reasons."""

import pytest
import torch
from runtime_layers import BF16, FP32, inputs, quantized

from calibration.errors import ToolkitError
from ptq.runtime.kernels.dispatch import KERNELS, refusals, select
from ptq.runtime.kernels.kernel import KernelQuery
from ptq.runtime.linear import QuantLinear
from ptq.scheme import parse_scheme


def assert_bf16_close(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, slack: torch.Tensor | float = 0.0):
    """Within one bfloat16 rounding of the output, plus float32 summation noise and ``slack [tokens, out]``."""
    exact = x.double() @ weight.double().T
    noise = 1e-5 * (x.double().abs() @ weight.double().abs().T)
    limit = exact.abs() * 2.0**-8 + noise + slack
    worst = ((y.double() - exact).abs() / limit).max()
    assert worst <= 1.0, f"{worst:.2f} times the limit"


EXACT_INT4 = ["w4a16-g32-sym", "w4a16-g64-sym", "w4a16-g128-sym", "w4a16-gchannel-sym", "w3a16-g32-sym", "w3a16-g128"]
EXACT_INT4 += ["w2a16-g64-sym", "w2a16-g128-sym", "w3a16-g32-asym", "w3a16-gchannel-asym", "w2a16-g64-asym"]


@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("scheme", EXACT_INT4)
@pytest.mark.parametrize(("out", "width"), [(16, 128), (48, 256), (80, 640), (272, 384)])
def test_int4_is_exact_but_for_the_output(scheme, tokens, out, width):
    q = quantized(scheme, out, width)
    layer = QuantLinear(q, kernel="int4")
    x = inputs(tokens, width)
    assert_bf16_close(layer(x), x, q.dequantize(torch.float64))


@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("group", ["g32", "g64", "g128", "gchannel"])
def test_int4_offsets_of_asymmetric_4_bits_round_within_the_stated_bound(group, tokens):
    q = quantized(f"w4a16-{group}-asym", 96, 512)
    layer = QuantLinear(q, kernel="int4")
    x = inputs(tokens, 512)
    offset = (8 - q.zero.double()) * q.scale.double()
    error = (offset - offset.to(BF16).double()).abs()
    assert (error <= q.scale.double() * 7 / 256).all() and (error <= offset.abs() * 2.0**-8).all()
    assert error.max() > 0, "the case this test is about"
    assert (error[torch.isin(q.zero, torch.tensor([0, 4, 6, 7, 8, 9, 10, 12], dtype=torch.uint8))] == 0).all()
    sums = x.double().view(tokens, q.scale.shape[1], -1).sum(-1).abs()
    assert_bf16_close(layer(x), x, q.dequantize(), slack=sums @ error.T)


@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("kind", ["8 sym", "6 sym", "5 asym", "3 asym"])
@pytest.mark.parametrize(("out", "width"), [(16, 128), (7, 48), (131, 272)])
def test_int8_is_exact_but_for_the_output(kind, tokens, out, width):
    q = quantized("w{}a16-gchannel-{}".format(*kind.split()), out, width)
    x = inputs(tokens, width)
    assert_bf16_close(QuantLinear(q, kernel="int8")(x), x, q.dequantize(torch.float64))


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("rest", ["g32-sym", "g64-asym", "g128-sym", "gchannel-asym"])
def test_reference_equals_a_float_linear_bit_for_bit(bits, rest, tokens, dtype):
    for ordered in (False, True):
        q = quantized(f"w{bits}a16-{rest}", 37, 384, ordered=ordered)
        bias, x = inputs(37, dtype=dtype), inputs(tokens, 384, dtype=dtype)
        layer = QuantLinear(q, bias, dtype, kernel="reference")
        assert torch.equal(layer(x), torch.nn.functional.linear(x, q.dequantize(dtype), bias))


@pytest.mark.parametrize("seed", range(12))
def test_the_selected_kernel_is_right_on_random_layers(seed):
    generator = torch.Generator().manual_seed(1000 + seed)

    def draw(choices: list):
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    bits, group, kind = draw([2, 3, 4, 5, 6, 8]), draw(["g32", "g64", "g128", "gchannel"]), draw(["sym", "asym"])
    width = draw([33, 48, 96, 100, 288]) if group == "gchannel" else int(group[1:]) * draw([1, 2, 3, 5])
    q = quantized(f"w{bits}a16-{group}-{kind}", draw([1, 5, 16, 31, 64, 112]), width, seed, ordered=draw([True, False]))
    dtype = draw([BF16, BF16, FP32])
    layer, x = QuantLinear(q, dtype=dtype), inputs(draw([1, 3, 17]), width, dtype=dtype)
    exact = x.double() @ q.dequantize(torch.float64).T
    size = x.double().abs() @ q.dequantize(torch.float64).abs().T
    assert ((layer(x).double() - exact).abs() <= size * (1e-2 if dtype == BF16 else 1e-5)).all(), layer


@pytest.mark.parametrize("scheme", ["w4a16-g32-sym", "w3a16-g64-asym", "w4a16-gchannel-sym"])
def test_int4_gathers_inputs_for_an_activation_order(scheme):
    q = quantized(scheme, 64, 256, ordered=True)
    x = inputs(3, 256)
    assert_bf16_close(QuantLinear(q, kernel="int4")(x), x, q.dequantize(torch.float64))


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("ordered", [False, True])
def test_reference_weights_have_the_same_bits_in_blocks_of_rows(ordered, dtype, monkeypatch):
    q = quantized("w3a16-g32-asym", 71, 96, ordered=ordered)
    layer, x = QuantLinear(q, inputs(71, dtype=dtype), dtype, kernel="reference"), torch.eye(96, dtype=dtype)
    monkeypatch.setattr("ptq.runtime.kernels.reference.BLOCK_ELEMENTS", 96 * 20)
    assert torch.equal(layer(x), (q.dequantize(dtype).float().T + inputs(71, dtype=dtype).float()).to(dtype))


# --- the dispatcher ---------------------------------------------------------------------------------------------


def query(scheme: str = "w4a16-g128-sym", out: int = 256, width: int = 256, dtype=BF16, device="cpu") -> KernelQuery:
    weights = parse_scheme(scheme).weights
    group = weights.grouping.width(width)
    return KernelQuery(weights.bits, group, weights.symmetric, out, width, device, dtype)


@pytest.mark.parametrize(
    ("case", "kernel", "reasons"),
    [
        (query(), "int4", {}),
        (query("w3a16-g32-asym"), "int4", {}),
        (query("w8a16-gchannel-sym"), "int8", {"int4": "at most 4 bits, not 8"}),
        (query("w4a16-gchannel-sym", width=112), "int8", {"int4": "no multiple of 32"}),
        (query("w8a16-gchannel-sym", width=100), "reference", {"int4": "at most 4", "int8": "100 input features"}),
        (query("w4a16-gchannel-sym", out=100), "int8", {"int4": "100 output features"}),
        (query(out=100), "reference", {"int4": "multiple of 16", "int8": "not groups of 128"}),
        (query("w8a16-gchannel-asym"), "reference", {"int4": "at most 4", "int8": "do not fit a signed byte"}),
        (query(dtype=FP32), "reference", {"int4": "with float32", "int8": "with float32"}),
        (query(dtype=torch.float16), "reference", {"int4": "with float16", "int8": "with float16"}),
        (query("w8a16-gchannel-sym", device="cuda"), "reference", {"int4": "at most 4", "int8": "not on cuda"}),
        (query(device="mps"), "reference", {"int4": "not on mps", "int8": "not on mps"}),
    ],
)
def test_the_first_kernel_that_can_is_taken_and_the_others_say_why_not(case, kernel, reasons):
    chosen = select(case)
    assert chosen.name == kernel
    found = refusals(case, chosen)
    assert found.keys() == reasons.keys()
    for name, part in reasons.items():
        assert part in found[name]


def test_a_kernel_asked_for_by_name_that_cannot_run_is_an_error_with_a_fix_that_works():
    with pytest.raises(ToolkitError, match=r"'int4' cannot run this layer: .* at most 4 bits") as error:
        select(query("w8a16-gchannel-sym"), "int4")
    for name in error.value.fix.removeprefix("use one of: ").split(", "):
        assert select(query("w8a16-gchannel-sym"), name).name == name


def test_an_unknown_kernel_is_an_error_with_the_nearest_name():
    with pytest.raises(ToolkitError, match="unknown value 'referense'") as error:
        select(query(), "referense")
    assert "did you mean 'reference'?" in error.value.fix


def test_the_last_kernel_supports_everything_and_names_are_unique():
    assert KERNELS[-1].supports(query(dtype=torch.float64, device="xpu")) is None
    assert len({kernel.name for kernel in KERNELS}) == len(KERNELS)


def test_asking_for_a_slower_kernel_is_recorded():
    assert "asked for" in QuantLinear(quantized("w4a16-g32-sym", 16, 64), kernel="reference").reasons["int4"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [1, 3, 17, 100])
@pytest.mark.parametrize("scheme", ["w4a16-g32-sym", "w4a16-g128-asym", "w3a16-g64-asym", "w2a16-gchannel-sym"])
@pytest.mark.parametrize("width", [256, 384, 1024])
def test_int4_on_a_gpu(scheme, tokens, width):
    q = quantized(scheme, 96, width)
    layer, x = QuantLinear(q, inputs(96), device="cuda"), inputs(tokens, width)
    assert layer.kernel == "int4"
    exact = x.double() @ q.dequantize(torch.float64).T + inputs(96).double()
    # weights are rounded to bfloat16 on the way, the offset and the sum with the bias once more
    size = x.double().abs() @ (q.dequantize(torch.float64).abs() + 8 * q.scale.double().max()).T + 4
    assert ((layer(x.cuda()).cpu().double() - exact).abs() <= size * 2.0**-7).all()
    reference = QuantLinear(q, inputs(96), kernel="reference").to("cuda")
    assert ((reference(x.cuda()).cpu().double() - exact).abs() <= size * 2.0**-7).all()
