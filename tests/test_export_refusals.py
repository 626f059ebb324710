"""What each format refuses, that the suggested fix works, and which files by other tools are recognised."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from calibration.errors import ToolkitError
from calibration.model.headers import TensorInfo
from ptq.formats.checks import stored_scale, summary
from ptq.formats.readback import compare
from ptq.formats.registry import FORMATS, choose, format_of
from ptq.linears import ModelLayout, PlannedLinear
from ptq.quantized import QuantizedTensor
from ptq.scheme import parse_scheme


def linear(
    name: str, scheme: str | None = "w4a16-g32-sym", shape: tuple[int, int] = (64, 128), **more
) -> PlannedLinear:
    return PlannedLinear(name, int(name.split(".")[2]), shape, parse_scheme(scheme) if scheme else None, **more)


def model(*linears: PlannedLinear, **changes) -> ModelLayout:
    fields = {"config": {"model_type": "llama"}, "other_linears": ("lm_head",), "reordered": False, **changes}
    return ModelLayout(linears=linears, blocks="model.layers", dtype="bfloat16", **fields)


Q, K, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"
EXPERT = "model.layers.0.mlp.experts.{}.down_proj"
G32 = "w4a16-g32-sym"

# format, a model it refuses, a word of the reason, what the fix says, the model after the fix (None: only native)
REFUSALS = [
    ("awq", model(linear(Q, "w3a16-g32-sym")), "3-bit", "use 4 bits", model(linear(Q))),
    ("gptq", model(linear(Q, "w5a16-g32-sym")), "5-bit", "2 or 3 or 4 or 8 bits", model(linear(Q, "w8a16-g32-sym"))),
    ("awq", model(linear(Q), linear(UP, "w4a16-g64-sym")), "another", "same scheme", model(linear(Q), linear(UP))),
    ("gptq", model(linear(Q), linear(UP, "w8a16-g32-sym")), "another scheme", "same", model(linear(Q), linear(UP))),
    ("gptq_v2", model(linear(Q), linear(UP, "w4a16-g32-asym")), "another", "same", model(linear(Q), linear(UP))),
    ("compressed-tensors", model(linear(Q, "w4a16-g128-sym", (64, 96))), "96 input columns", "size 32, or gchannel",
     model(linear(Q, G32, (64, 96)))),
    ("native", model(linear(Q, "w4a16-g128-sym", (64, 100))), "100 input columns", "gchannel",
     model(linear(Q, "w4a16-gchannel-sym", (64, 100)))),
    ("awq", model(linear(Q, G32, (60, 128))), "60 x 128", "native", None),
    ("gptq", model(linear(Q, G32, (48, 128))), "48 x 128", "native", None),
    ("gptq", model(linear(Q, "w4a16-gchannel-sym", (64, 100))), "inputs of 32", "native", None),
    ("compressed-tensors", model(linear(Q), reordered=True), "activation order", "adjacent columns", model(linear(Q))),
    ("awq", model(linear(Q), reordered=True), "activation order", "adjacent columns", model(linear(Q))),
    ("compressed-tensors", model(linear(Q, "fp4-e2m1-g32")), "no place for fp4-e2m1-g32", "use --scheme nvfp4",
     model(linear(Q, "nvfp4"))),
    ("compressed-tensors", model(linear(EXPERT.format(0), "mxfp4", expert=0)), "experts in FP4", "native", None),
    *((name, model(linear(Q, conv1d=True)), "Conv1D", "native", None) for name in FORMATS if name != "native"),
    *((name, model(linear(EXPERT.format(0), expert=0)), "expert", "native", None) for name in ("awq", "gptq")),
    *((n, model(linear(Q), parts=("lora_a",)), "beside the codes", "native", None) for n in FORMATS if n != "native"),
    ("awq", model(linear(Q), config={"model_type": "falcon"}), "scaled activations", "native", None),
    ("awq", model(linear(Q), other_linears=("q_proj",)), "by fragments", "native", None),
    ("gptq", model(linear(Q), linear(K, None)), "shares its name", "all blocks alike", model(linear(Q), linear(K))),
    ("compressed-tensors", model(linear(Q), linear(EXPERT.format(0), None, expert=0)), "beside float", "all experts",
     model(linear(Q), linear(EXPERT.format(0), expert=0))),
    ("compressed-tensors", model(linear(EXPERT.format(0), "w4a16-g32-asym", expert=0)), "asymmetric", "symmetric",
     model(linear(EXPERT.format(0), expert=0))),
    ("compressed-tensors", model(*(linear(EXPERT.format(i), f"w{4 + 4 * i}a16-g32-sym", expert=i) for i in (0, 1))),
     "more than one scheme", "same symmetric scheme", model(*(linear(EXPERT.format(i), expert=i) for i in (0, 1)))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "refused", "reason", "fix", "repaired"), REFUSALS)
def test_refusals_and_their_fixes(name, refused, reason, fix, repaired):
    problems = FORMATS[name].check(refused)
    assert len(problems) == 1 and reason in problems[0].reason and fix in problems[0].fix
    if name != "native":
        assert "--format native" in problems[0].fix or "gchannel" in problems[0].fix
    after = refused if repaired is None else repaired
    assert FORMATS["native" if repaired is None else name].check(after) == []


def test_every_problem_is_told_at_once():
    bad = model(linear(Q, "w5a16-g32-sym", (60, 100), conv1d=True), reordered=True)
    assert len(FORMATS["awq"].check(bad)) == 5


def test_names_are_summarised():
    names = [f"model.layers.{i}.mlp.experts.{j}.w1" for i in (0, 1) for j in (0, 10)]
    assert summary([*names, UP]) == f"model.layers.*.mlp.experts.*.w1, {UP}"


def test_the_default_format():
    chosen, why = choose(model(linear(Q)))
    assert chosen.name == "compressed-tensors" and "holds this model" in why
    chosen, why = choose(model(linear(Q, conv1d=True)))
    assert chosen.name == "native" and "Conv1D" in why and Q in why


def test_configs_describe_what_stays_in_float():
    plan = model(linear(Q), linear(UP, None))
    assert FORMATS["compressed-tensors"].config(plan)["ignore"] == [UP, "lm_head"]
    assert FORMATS["awq"].config(plan)["modules_to_not_convert"] == [UP, "lm_head"]
    config = FORMATS["gptq"].config(plan)
    assert config["modules_in_block_to_quantize"] == [["self_attn.q_proj"]]
    (rule,) = config["dynamic"]  # gptqmodel matches these from the start of full names
    names = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")
    assert [bool(re.match(rule.removeprefix("-:"), name)) for name in names] == [False, True]
    assert "modules_in_block_to_quantize" not in FORMATS["gptq"].config(model(linear(Q)))


def test_configs_with_two_schemes_name_every_linear():
    plan = model(linear(Q), linear(UP, "w8a16-gchannel-sym"), linear(EXPERT.format(0), "w8a16-gchannel-sym", expert=0))
    groups = FORMATS["compressed-tensors"].config(plan)["config_groups"]
    assert [g["targets"] for g in groups.values()] == [[Q], [UP, r"re:.*\.experts\.\d+\..*"]]
    assert [g["weights"]["strategy"] for g in groups.values()] == ["group", "channel"]
    assert {g["format"] for g in groups.values()} == {"pack-quantized"}


def test_who_loads_what():
    packed = FORMATS["compressed-tensors"]
    assert packed.loads_in(model(linear(Q)))["transformers"].startswith("yes")
    asymmetric = linear(UP, "w4a16-g32-asym")
    assert "dequantize=True" in packed.loads_in(model(asymmetric))["transformers"]
    assert packed.loads_in(model(linear(Q), asymmetric))["transformers"].startswith("no: ")
    assert "not with dequantize=True" in packed.loads_in(model(linear(Q), linear(UP, "w8a16-g32-sym")))["transformers"]
    for fmt in FORMATS.values():
        answers = fmt.loads_in(model(linear(Q)))
        own = {"GPTQModel"} if fmt.name in ("awq", "gptq", "gptq_v2") else set()
        assert set(answers) == {"transformers", "vLLM", "llama.cpp", *own} and answers["llama.cpp"].startswith(
            "no: " if fmt.name != "gguf" else "yes"
        )


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (None, None),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, "gptq_v2"),
        ({"quant_method": "gptq", "format": "gptq_v2"}, "gptq_v2"),
        ({"quant_method": "awq", "w_bit": 4}, "awq"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "ptq"}, "native"),
    ],
)
def test_formats_are_recognised(data, expected):
    found = format_of({} if data is None else {"quantization_config": data})
    assert (found and found.name) == expected


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "gptq", "is_marlin_format": True}, "marlin"),
        ({"bits": 4}, "missing"),
    ],
)
def test_foreign_formats_are_refused_by_name(data, named):
    with pytest.raises(ToolkitError, match=named):
        format_of({"quantization_config": data})


def infos(**shapes: tuple[int, ...]) -> dict[str, TensorInfo]:
    return {f"{Q}.{suffix}": TensorInfo(torch.int32, shape, "f") for suffix, shape in shapes.items()}


def test_headers_of_other_tools():
    def read(name: str) -> torch.Tensor:
        assert name == f"{Q}.weight_shape"
        return torch.tensor([64, 100])

    def found(data: dict, **shapes: tuple[int, ...]) -> tuple[str, tuple[int, int]]:
        config = {"quantization_config": data}
        scheme, shape = format_of(config).schemes(config, infos(**shapes), read)[Q]
        return str(scheme), shape

    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}
    assert found(old, qweight=(128, 8), qzeros=(2, 8), scales=(2, 64)) == ("w4a16-g64-asym", (64, 128))
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True}
    assert found(gptq, qweight=(16, 64), scales=(2, 64)) == ("w4a16-g64-sym", (64, 128))
    overridden = found(gptq, qweight=(32, 64), scales=(4, 64), g_idx=(128,))  # gptqmodel's `dynamic`
    assert overridden == ("w8a16-g32-sym", (64, 128))
    with pytest.raises(ToolkitError, match="do not fit"):
        found(gptq, qweight=(16, 64), scales=(3, 64))
    with pytest.raises(ToolkitError, match="gemv"):
        found({**old, "version": "gemv"}, qweight=(128, 8))

    weights = {"num_bits": 3, "type": "int", "symmetric": False, "strategy": "channel"}
    group = {"targets": ["re:.*q_proj"], "weights": weights, "input_activations": None}
    packed = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": group}}
    assert found(packed, weight_packed=(64, 10), weight_scale=(64, 1)) == ("w3a16-gchannel-asym", (64, 100))
    grouped = {**group, "targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}
    both = {**packed, "config_groups": {"a": grouped, "b": group}}  # a name comes before a class
    assert found(both, weight_packed=(64, 10), weight_scale=(64, 1))[0] == "w3a16-gchannel-asym"
    only = {**packed, "config_groups": {"a": grouped}}
    assert found(only, weight_packed=(64, 16), weight_scale=(64, 4)) == ("w4a16-g32-sym", (64, 128))
    for change in (
        {"input_activations": {"num_bits": 8, "strategy": "token"}},
        {"format": "int-quantized"},
        {"targets": ["Conv2d"]},
    ):
        with pytest.raises(ToolkitError, match="q_proj"):
            found({**packed, "config_groups": {"g": {**group, **change}}}, weight_packed=(64, 10))
    with pytest.raises(ToolkitError, match="transform_config"):
        found({**packed, "transform_config": {"config_groups": {"r": {}}}}, weight_packed=(64, 10))


def test_native_headers_are_checked():
    config = {"quantization_config": FORMATS["native"].config(model(linear(Q)))}
    with pytest.raises(ToolkitError, match=r"codes: missing"):
        FORMATS["native"].schemes(config, {}, lambda name: torch.zeros(0))
    config["quantization_config"]["version"] = 2
    with pytest.raises(ToolkitError, match="version 2"):
        FORMATS["native"].schemes(config, {}, lambda name: torch.zeros(0))


def test_scales_are_never_rounded():
    fine = torch.tensor([[1 + 2.0**-10]])  # exact in float16, not in bfloat16
    with pytest.raises(ToolkitError, match=r"not exact in torch\.bfloat16"):
        stored_scale(fine, torch.bfloat16)
    q = QuantizedTensor(torch.zeros(1, 32, dtype=torch.uint8), fine, None, parse_scheme(G32))
    stored = FORMATS["native"].encode(q, torch.bfloat16)
    assert stored["scale"].dtype == torch.float16  # a scale from another tool's file
    assert torch.equal(FORMATS["native"].decode(stored, q.scheme, q.shape).scale, fine)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "gguf"])  # read back with its own package
def test_damage_is_found_by_the_second_reader(name):
    scheme = parse_scheme("w4a16-g32-asym")
    codes = torch.arange(64 * 128).view(64, 128).remainder(16).to(torch.uint8)
    q = QuantizedTensor(codes, torch.full((64, 4), 0.25), torch.full((64, 4), 3, dtype=torch.uint8), scheme)
    tensors = FORMATS[name].encode(q, torch.bfloat16)
    compare(Q, q, name, tensors)
    for suffix in tensors:
        broken = tensors[suffix].clone()
        broken.view(-1)[-1] += 1
        with pytest.raises(ToolkitError, match=f"{Q}: (code|scale|zero point|weight_shape|group of column) at"):
            compare(Q, q, name, {**tensors, suffix: broken})
    with pytest.raises(ToolkitError, match="scale reads back as shape"):
        compare(Q, replace(q, scale=q.scale[:, :2]), name, tensors)


@pytest.mark.parametrize(
    ("schemes", "answer"),
    [
        (["w4a16-g32-sym"], "yes"),
        (["w4a16-g32-asym"], "yes"),
        (["w8a8"], "yes"),
        (["fp8"], "yes"),
        (["w4a8"], "yes"),
        (["w8a8-asym"], "no: it has no scheme for asymmetric"),
        (["w8a8-ag64"], "no: it has no scheme for integer inputs with a step per group"),
        (["w4a8-astatic"], "no: it has no scheme for static inputs"),
        (["w8a8kv8"], "no: it takes KV caches"),
        (["w8a8kvfp8-kvstatic"], "not known: a static KV cache was not run"),
        (["nvfp4-anvfp4"], "not known: nvfp4 has no CPU kernel"),
        (["mxfp4-amxfp4"], "not known: mxfp4 has no CPU kernel"),
        (["w3a16-g32-sym"], "not known: 3-bit"),
        (["w8a16-gchannel"], "not known: weights with one scale per row"),
        (["nvfp4"], "not known: nvfp4"),
        (["mxfp4"], "not known: mxfp4"),
        (["w4a16-g32-sym", "w8a16-g32-sym"], "no: model.layers.*.self_attn.q_proj"),
        (["w4a16-g32-sym", None], "no: model.layers.*.self_attn.q_proj"),
    ],
)
def test_what_vllm_does_with_compressed_tensors(schemes, answer):
    linears = [linear(name, scheme) for name, scheme in zip((Q, Q.replace("q_proj", "k_proj")), schemes, strict=False)]
    assert FORMATS["compressed-tensors"].loads_in(model(*linears))["vLLM"].startswith(answer)
