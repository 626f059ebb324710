"""Every layout by hand-computed words, by round trips, by a second reader, and by the refusals and their fixes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme

from calibration.errors import ToolkitError
from calibration.model.headers import TensorInfo
from ptq.formats.gptq import Gptq
from ptq.formats.readback import compare
from ptq.formats.registry import FORMATS, format_of
from ptq.linears import ModelLayout, PlannedLinear
from ptq.numerics.bitstream import pack
from ptq.numerics.integers import round_scale
from ptq.quantized import QuantizedTensor
from ptq.scheme import BITS, QuantScheme, parse_scheme

NAME = "model.layers.0.mlp.down_proj"


def random_tensor(scheme: QuantScheme, shape: tuple[int, int], lowest_zero: int = 0) -> QuantizedTensor:
    """Codes and zero points that use their whole range, and scales from subnormal float16 to large."""
    w, (out, columns) = scheme.weights, shape
    generator = torch.Generator().manual_seed(w.bits * 1000 + out)
    groups = (out, w.grouping.count(columns))
    codes = torch.randint(0, 2**w.bits, shape, generator=generator).to(torch.uint8)
    scale = round_scale(torch.exp2(torch.rand(groups, generator=generator) * 30 - 22))
    zero = torch.randint(lowest_zero, 2**w.bits, groups, generator=generator).to(torch.uint8)
    zero[0, 0], zero[-1, -1] = lowest_zero, 2**w.bits - 1
    return QuantizedTensor(codes, scale, None if w.symmetric else zero, scheme)


def layout(*schemes: str | None, shape: tuple[int, int] = (64, 128), **changes: object) -> ModelLayout:
    """One linear per scheme, each in a block of its own; None stays in float."""
    linears = tuple(
        PlannedLinear(f"model.layers.{i}.mlp.down_proj", i, shape, parse_scheme(s) if s else None)
        for i, s in enumerate(schemes)
    )
    fields = {"config": {}, "other_linears": ("lm_head",), "blocks": "model.layers", "reordered": False}
    return ModelLayout(**{**fields, "linears": linears, "dtype": "bfloat16", **changes})  # type: ignore[arg-type]


def assert_same(a: QuantizedTensor, b: QuantizedTensor) -> None:
    for x, y in ((a.codes, b.codes), (a.scale, b.scale), (a.zero, b.zero), (a.group_index, b.group_index)):
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            assert x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y)
    assert a.scheme == b.scheme


def words(tensor: torch.Tensor) -> list[int]:
    assert tensor.dtype == torch.int32
    return [int(v) & 0xFFFFFFFF for v in tensor.flatten()]


def by_hand(scheme: str, codes: torch.Tensor, zero: list[int] | None = None) -> QuantizedTensor:
    scale = torch.full((codes.shape[0], 1), 0.5)
    zeros = None if zero is None else torch.tensor(zero, dtype=torch.uint8)[:, None]
    return QuantizedTensor(codes.to(torch.uint8), scale, zeros, parse_scheme(scheme))


def test_compressed_tensors_words_by_hand():
    q = by_hand("w3a16-gchannel-asym", torch.arange(8).repeat(8, 4), list(range(8)))
    tensors = FORMATS["compressed-tensors"].encode(q, torch.bfloat16)
    assert words(tensors["weight_packed"][0]) == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]
    assert words(tensors["weight_zero_point"]) == [0x00FAC688] and tensors["weight_zero_point"].shape == (1, 1)
    assert tensors["weight_shape"].tolist() == [8, 32] and tensors["weight_shape"].dtype == torch.int64
    assert tensors["weight_scale"].dtype == torch.bfloat16 and tensors["weight_scale"].shape == (8, 1)


def test_awq_words_by_hand():
    codes = torch.arange(8)[:, None].expand(8, 32)
    sym = FORMATS["awq"].encode(by_hand("w4a16-gchannel-sym", codes), torch.bfloat16)
    assert words(sym["qweight"]) == [0x75316420] * 32 and sym["qweight"].shape == (32, 1)
    assert words(sym["qzeros"]) == [0x88888888] and sym["qzeros"].shape == (1, 1)
    assert sym["scales"].dtype == torch.float16 and sym["scales"].shape == (1, 8)
    asym = FORMATS["awq"].encode(by_hand("w4a16-gchannel-asym", codes, list(range(8))), torch.bfloat16)
    assert words(asym["qzeros"]) == [0x75316420]


@pytest.mark.parametrize(
    ("bits", "first", "second"),
    [
        (2, [0x55555555] * 2, [0xAAAAAAAA] * 2),
        (3, [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D], [0x24924924, 0x49249249, 0x92492492]),
        (4, [0x77777777] * 4, [0x88888888] * 4),
        (8, [0x7F7F7F7F] * 8, [0x80808080] * 8),
    ],
)
def test_gptq_words_by_hand(bits, first, second):
    q = by_hand(f"w{bits}a16-gchannel-sym", torch.ones(32, 64))
    one, two = (FORMATS[name].encode(q, torch.bfloat16) for name in ("gptq", "gptq_v2"))
    assert words(one["qzeros"]) == first and words(two["qzeros"]) == second
    if bits == 4:
        down = FORMATS["gptq"].encode(by_hand("w4a16-gchannel-sym", torch.arange(8).repeat(32, 4)), torch.float16)
        assert words(down["qweight"]) == [0x76543210] * 128 and down["qweight"].shape == (4, 32)
        assert down["g_idx"].tolist() == [0] * 32 and down["scales"].dtype == torch.float16


def test_native_words_by_hand():
    tensors = FORMATS["native"].encode(
        by_hand("w2a16-gchannel-asym", torch.arange(4).repeat(3, 4), [1, 2, 3]), torch.half
    )
    assert words(tensors["codes"]) == [0xE4E4E4E4] * 3
    assert words(tensors["zero"]) == [0b111001] and tensors["zero"].shape == (1,)
    assert tensors["scale"].dtype == torch.bfloat16 and set(tensors) == {"codes", "scale", "zero"}


CASES = [
    *((name, bits, group, shape) for name in ("compressed-tensors", "native") for bits in BITS
      for group, shape in (("g32", (5, 96)), ("g64", (33, 192)), ("g128", (7, 128)), ("gchannel", (7, 100)))),
    *(("awq", 4, group, shape) for group, shape in (("g32", (24, 96)), ("g128", (8, 256)), ("gchannel", (16, 40)))),
    *((name, bits, group, shape) for name in ("gptq", "gptq_v2") for bits in (2, 3, 4, 8)
      for group, shape in (("g32", (96, 160)), ("g128", (32, 256)), ("gchannel", (64, 160)))),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["sym", "asym"])
@pytest.mark.parametrize(("name", "bits", "group", "shape"), CASES)
def test_round_trip_readback_and_headers(name, bits, group, shape, kind):
    scheme = parse_scheme(f"w{bits}a16-{group}-{kind}")
    plan = layout(str(scheme), shape=shape)
    fmt = FORMATS[name]
    assert fmt.check(plan) == []
    q = random_tensor(scheme, shape, lowest_zero=1 if name == "gptq" else 0)
    for dtype in (torch.bfloat16, torch.float16):
        tensors = fmt.encode(q, dtype)
        assert set(tensors) <= fmt.suffixes
        assert_same(fmt.decode(tensors, scheme, shape), q)
        compare(NAME, q, name, tensors)
    config = {"quantization_config": fmt.config(plan)}
    stored = {f"{NAME}.{suffix}": t for suffix, t in tensors.items()}
    infos = {key: TensorInfo(t.dtype, tuple(t.shape), "f") for key, t in stored.items()}
    assert format_of(config) == fmt
    assert fmt.schemes(config, infos, stored.__getitem__) == {NAME: (scheme, shape)}


@pytest.mark.parametrize("name", ["gptq", "native"])
def test_groups_in_activation_order(name):
    scheme = parse_scheme("w4a16-g32-sym")
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0)) // 32
    q = replace(random_tensor(scheme, (64, 128)), group_index=order.to(torch.int32))
    tensors = FORMATS[name].encode(q, torch.float16)
    assert_same(FORMATS[name].decode(tensors, scheme, q.shape), q)
    compare(NAME, q, name, tensors)
    plan = layout("w4a16-g32-sym", reordered=True)
    assert FORMATS[name].check(plan) == [] and FORMATS["gptq"].config(plan)["desc_act"] is True
    with pytest.raises(ToolkitError, match="group of column"):
        compare(NAME, replace(q, group_index=None), name, tensors)


def test_zero_points_of_zero_decide_the_version_once():
    q = random_tensor(parse_scheme("w4a16-g32-asym"), (64, 128))
    written = FORMATS["gptq"].for_zeros(at_least_one=False)
    assert written == FORMATS["gptq_v2"] and written.config(layout("w4a16-g32-asym"))["checkpoint_format"] == "gptq_v2"
    assert FORMATS["gptq"].for_zeros(at_least_one=True) == FORMATS["gptq"]
    with pytest.raises(AssertionError, match="zero point of 0"):
        FORMATS["gptq"].encode(q, torch.float16)
    for label in ("gptq", "gptq_v2"):  # a wrong label is noticed by the second reader and by symmetric decoding
        other = "gptq_v2" if label == "gptq" else "gptq"
        sym = random_tensor(parse_scheme("w4a16-g32-sym"), (64, 128))
        with pytest.raises(ToolkitError, match="zero points other than 8"):
            FORMATS[other].decode(FORMATS[label].encode(sym, torch.float16), sym.scheme, sym.shape)
        with pytest.raises(ToolkitError, match="zero point at"):
            compare(NAME, sym, other, FORMATS[label].encode(sym, torch.float16))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_v1_files_of_gptqmodel_with_zero_points_of_zero(bits):
    """It subtracts 1 from whole words (from single fields at 3 bits), so that a 0 borrows from its neighbour."""
    q = random_tensor(parse_scheme(f"w{bits}a16-g32-asym"), (64, 128))
    tensors = Gptq(2).encode(q, torch.float16)
    if bits == 3:
        tensors["qzeros"] = pack((q.zero.T.int() - 1) % 8, 3)
    else:
        tensors["qzeros"] = tensors["qzeros"] - pack(torch.ones(4, 64), bits)
    assert_same(Gptq(1).decode(tensors, q.scheme, q.shape), q)


@pytest.mark.parametrize("bits", [3, 5, 6])
@pytest.mark.parametrize("group", ["g32", "gchannel"])
def test_padded_words_of_older_compressed_tensors(bits, group):
    q, per = random_tensor(parse_scheme(f"w{bits}a16-{group}-asym"), (33, 192)), 32 // bits

    def padded(codes: torch.Tensor) -> torch.Tensor:
        fields = torch.nn.functional.pad(codes.long(), (0, -codes.shape[1] % per)).unflatten(1, (-1, per))
        return sum(fields[..., i] << (i * bits) for i in range(per)).to(torch.int32)

    fmt = FORMATS["compressed-tensors"]
    tensors = fmt.encode(q, torch.bfloat16) | {"weight_packed": padded(q.codes)}
    tensors["weight_zero_point"] = padded(q.zero.T).T.contiguous()
    assert_same(fmt.decode(tensors, q.scheme, q.shape), q)
    with pytest.raises(ToolkitError, match="no packing of"):
        fmt.decode(tensors | {"weight_packed": tensors["weight_packed"][:, :-1]}, q.scheme, q.shape)


@pytest.mark.parametrize("kind", ["sym", "asym"])
@pytest.mark.parametrize("group", ["g32", "gchannel"])
@pytest.mark.parametrize("bits", BITS)
def test_compressed_tensors_library_agrees(bits, group, kind):
    q = random_tensor(parse_scheme(f"w{bits}a16-{group}-{kind}"), (33, 96))
    fmt = FORMATS["compressed-tensors"]
    tensors = fmt.encode(q, torch.float32)
    group_0 = fmt.config(layout(str(q.scheme), shape=q.shape))["config_groups"]["group_0"]
    scheme = QuantizationScheme.model_validate(group_0)
    dense = PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
    assert torch.equal(dense, q.dequantize())
    state = {"weight": dense, "weight_scale": tensors["weight_scale"]}
    if q.zero is not None:
        state["weight_zero_point"] = (q.zero.int() - 2 ** (bits - 1)).to(torch.int8)
    packed = PackedQuantizationCompressor.compress(state, scheme)
    for suffix, tensor in tensors.items():
        assert torch.equal(packed[suffix], tensor)
