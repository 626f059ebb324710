"""Decoding in one call per step: products by rows against float64, steps against the model's own, what is refused."""

from __future__ import annotations

import pytest
import torch
from test_runtime_generate import tiny
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import ptq
from calibration.errors import ToolkitError
from ptq.quantized import QuantizedTensor
from ptq.runtime.attention import quantize_cache
from ptq.runtime.decoding.builder import Unsupported
from ptq.runtime.decoding.native import code_matrix, float_matrix, library, products
from ptq.runtime.decoding.stepper import Stepper, check_inputs
from ptq.runtime.generate import decode_tokens
from ptq.runtime.linear import QuantLinear
from ptq.scheme import parse_scheme
from sparsity.kernels.build import cpu_level

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4,
    "intermediate_size": 96, "head_dim": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 0,
}  # fmt: skip
KNOWN = {
    "llama": {}, "mistral": {"sliding_window": 8}, "qwen2": {}, "qwen3": {}, "gemma": {}, "granite": {}, "olmo2": {},
    "gemma2": {"sliding_window": 8}, "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2},
    "olmo3": {"sliding_window": 8},
}  # fmt: skip
SHAPES = [
    ("w4a16-g64-sym", 100, 576), ("w4a16-g32", 64, 96), ("w4a16-g128", 64, 1536), ("w3a16-g64", 33, 128),
    ("w2a16-g32-sym", 33, 160), ("w6a16-g64", 9, 192), ("w4a16-gchannel", 17, 100), ("w4a16-gchannel-sym", 8, 14336),
    ("w8a16-gchannel", 40, 5000), ("w8a16-g32", 40, 96), ("w8a16-gchannel-sym", 17, 100),
]  # fmt: skip


@pytest.fixture(params=sorted({cpu_level(), "DEFAULT"}))
def level(request, monkeypatch):
    """With this machine's instructions, and in plain C++."""
    found = library(request.param)
    monkeypatch.setattr("ptq.runtime.decoding.native.library", lambda: found)
    return request.param


def quantized(text: str, out: int, columns: int, wide: bool = False) -> QuantizedTensor:
    scheme = parse_scheme(text)
    groups = columns // scheme.weights.grouping.width(columns)
    generator = torch.Generator().manual_seed(out)
    codes = torch.randint(0, 2**scheme.weights.bits, (out, columns), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(out, groups, generator=generator) * 0.1 - 0.02).to(torch.bfloat16).float() * (
        1.001 if wide else 1
    )
    zero = torch.randint(0, 2**scheme.weights.bits, (out, groups), dtype=torch.uint8, generator=generator)
    return QuantizedTensor(codes, scale, None if scheme.weights.symmetric else zero, scheme)


@pytest.mark.parametrize(("scheme", "out", "columns"), SHAPES)
@pytest.mark.parametrize("wide", [False, True], ids=["bfloat16", "float32"])
def test_products_of_codes(level, scheme, out, columns, wide):
    """Against float64, with inputs over four orders of magnitude: 2^-15 of a group's largest value is lost at most."""
    q = quantized(scheme, out, columns, wide)
    bias = torch.randn(out)
    layer = QuantLinear(q, bias, torch.float32, "cpu", "rows")
    weight = q.dequantize(torch.float64)
    groups = q.scale.shape[1]
    for tokens in (1, 3, 70):
        x = torch.randn(tokens, columns) * torch.logspace(-2, 2, columns)[torch.randperm(columns)]
        error = (layer(x).double() - x.double() @ weight.T - bias.double()).abs()
        largest = x.abs().view(tokens, groups, -1).amax(2).double() / 32512
        allowed = (
            largest @ weight.abs().view(out, groups, -1).sum(2).T + 2e-6 * (x.double().abs() @ weight.abs().T) + 1e-6
        )
        assert (error <= allowed).all(), (error / allowed).max()


@pytest.mark.parametrize(("scheme", "out", "columns"), SHAPES)
def test_products_with_inputs_of_8_bits(level, scheme, out, columns):
    """To the last bits what inputs rounded by the definition give: one step per 64 columns, or per 32."""
    q = quantized(scheme, out, columns)
    layer = QuantLinear(q, None, torch.float32, "cpu", "rows")
    parts = (layer.get_buffer("codes"), layer.get_buffer("scale"), layer._buffers.get("zero"), columns)
    group = columns // q.scale.shape[1]
    cut = 64 if group % 64 == 0 or group == columns else 32
    x = torch.randn(3, columns) * torch.logspace(-2, 2, columns)[torch.randperm(columns)]
    padded = torch.nn.functional.pad(x, (0, -columns % cut)).unflatten(1, (-1, cut))
    step = padded.abs().amax(2, keepdim=True) / 127
    rounded = (torch.round(padded / step.clamp_min(1e-30)) * step).flatten(1)[:, :columns].double()
    weight = q.dequantize(torch.float64)
    found = products(code_matrix(*parts, inputs="int8"), x).double()
    near = 2e-6 * (rounded.abs() @ weight.abs().T) + 1e-6
    ties = step.double().sum() * 0.02 * weight.abs().max()  # of the float32 product that is rounded
    assert ((found - rounded @ weight.T).abs() <= near + ties).all()
    assert (found - x.double() @ weight.T).abs().max() > 10 * near.max(), "they are rounded"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [7, 64, 100, 576])
def test_products_of_floats(level, dtype, columns):
    weight, x = torch.randn(9, columns).to(dtype), torch.randn(3, columns)
    bias = torch.randn(9)
    exact = x.double() @ weight.double().T + bias.double()
    found = products(float_matrix(weight, bias), x).double()
    assert torch.allclose(found, exact, atol=1e-5, rtol=1e-5)


def family(name: str, dtype: torch.dtype = torch.float32, **more: object) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(SIZES | KNOWN.get(name, {}) | more))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():  # norms and attention must matter
        parameter.data.add_(torch.randn(parameter.shape) * 0.25)
    return model.to(dtype)


def watched(monkeypatch) -> list[bool]:
    """What the comparisons of first steps came to."""
    found: list[bool] = []
    agrees = Stepper.agrees
    monkeypatch.setattr(Stepper, "agrees", lambda self, *args: found.append(agrees(self, *args)) or found[-1])
    return found


@pytest.mark.parametrize("name", KNOWN)
def test_steps_are_the_models_own(level, name, monkeypatch):
    """Windows are passed on the way; every token is that of transformers."""
    seen, model, ids = watched(monkeypatch), family(name), torch.randint(1, 96, (1, 11))
    expected = decode_tokens(model, ids, 24, fused=False).tokens
    assert decode_tokens(model, ids, 24)[0] == expected and seen == [True]


@pytest.mark.parametrize("threads", [1, 2])
def test_logits_step_by_step(threads):
    model, ids = family("qwen3"), torch.randint(1, 96, (1, 9))
    cache = DynamicCache(config=model.config)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            model(ids[:, :4], past_key_values=cache, use_cache=True)
            stepper = Stepper(model, cache, 4, 9)
            found = torch.stack([stepper(ids[:, i : i + 1]).clone() for i in range(4, 9)])
            expected = model(ids).logits[0, 4:]
            with pytest.raises(AssertionError, match="no room"):
                stepper(ids[:, :1])
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


def test_bfloat16_is_closer_to_exact_arithmetic(monkeypatch):
    """The same bfloat16 weights in float64: steps in float32 arithmetic are nearer than transformers in bfloat16."""
    model, ids = family("llama", torch.bfloat16), torch.randint(1, 96, (1, 9))
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids[:, :8], past_key_values=cache, use_cache=True)
        stepper = Stepper(model, cache, 8, 9)
        fused = stepper(ids[:, 8:]).double().clone()
        plain = model(ids[:, 8:], past_key_values=cache, use_cache=True).logits[0, -1].double()
        exact = model.double()(ids).logits[0, -1]
    assert (fused - exact).norm() < (plain - exact).norm()


def test_codes_inside_a_model(level, monkeypatch):
    seen, model, ids = watched(monkeypatch), family("llama"), torch.randint(1, 96, (1, 11))
    for name, module in list(model.named_modules()):
        if name.endswith("_proj"):
            out, columns = module.weight.shape
            q = quantized("w4a16-g32", out, columns)
            model.set_submodule(name, QuantLinear(q, None, torch.float32, "cpu", "rows"))
    expected = decode_tokens(model, ids, 16, fused=False).tokens
    assert decode_tokens(model, ids, 16)[0] == expected and seen == [True]


def coded_family() -> torch.nn.Module:
    model = family("llama")
    for name, module in list(model.named_modules()):
        if name.endswith("_proj"):
            q = quantized("w4a16-g32-sym", *module.weight.shape)
            model.set_submodule(name, QuantLinear(q, None, torch.float32, "cpu", "rows"))
    return model


@pytest.mark.parametrize("wrong", ["codes", "scale", None])
def test_inputs_of_8_bits_are_compared_too(level, monkeypatch, wrong):
    """They differ by more than 15 bits may, and a weight that is read wrongly in one linear is still seen."""
    seen, model, ids = watched(monkeypatch), coded_family(), torch.randint(1, 96, (1, 11))
    made = code_matrix

    def broken(codes, scale, *rest):
        if wrong and scale.shape == (64, 3) and not kept:  # down of the first block
            damaged = {"codes": (codes ^ 1, scale * 1), "scale": (codes, scale.roll(1, 0))}[wrong]
            kept.extend(t.contiguous() for t in damaged)
            codes, scale = kept
        return made(codes, scale, *rest)

    kept: list[torch.Tensor] = []
    monkeypatch.setattr("ptq.runtime.decoding.builder.code_matrix", broken)
    found = decode_tokens(model, ids, 6, inputs="int8")
    assert seen == [wrong is None] and found.one_call == (wrong is None) and bool(kept) == bool(wrong)
    monkeypatch.setattr("ptq.runtime.decoding.stepper.TOLERANCE_INT8", 0.0)
    kept.clear()
    assert not decode_tokens(model, ids, 3, inputs="int8").one_call, "what int15 may differ by is less"


def test_inputs_are_refused_where_nothing_rounds_them(tmp_path):
    model, words = family("llama"), "no linear of this model multiplies integer codes"
    with pytest.raises(ToolkitError, match=words):
        check_inputs(model, "int8")
    with pytest.raises(ToolkitError, match=r"inputs 'int4'(?s:.*)int15, int8"):
        ptq.generate("demo", "def", inputs="int4")
    with pytest.raises(ToolkitError, match=words):
        ptq.generate("demo", "def", inputs="int8")
    ptq.quantize("demo", out=tmp_path / "q", method="rtn", scheme="w4a16-g32", format="native")
    found = ptq.generate(tmp_path / "q", "def main(", max_new_tokens=6, inputs="int8")
    assert found.one_call and found.steps == "one call each, inputs rounded to 8 bits"


def test_a_checkpoint_generates_by_steps(tmp_path, monkeypatch):
    """The command's way: codes in rows, a quantized embedding with its tied head, steps taken over."""
    seen = watched(monkeypatch)
    folder, prompt = tmp_path / "q", "def main("
    ptq.quantize("demo", out=folder, method="rtn", scheme="w4a16-g32", format="native", embeddings="w8a16-g32")
    loaded = ptq.load_model(folder, dtype="bfloat16", decoding=True)
    assert set(loaded.kernels) == {"rows"} and loaded.model.get_output_embeddings().kernel == "rows"
    fused = ptq.generate(folder, prompt, max_new_tokens=12)
    assert seen == [True] and fused.one_call and fused.new_tokens == 12 and fused.linears.startswith("rows x")
    assert fused.text == ptq.generate(loaded, prompt, max_new_tokens=12).text
    exact = [ptq.generate(folder, prompt, max_new_tokens=12, dtype="float32", kernel=k) for k in ("reference", None)]
    assert len(seen) == 3 and exact[0].text == exact[1].text


def test_what_it_does_not_know_runs_as_ever(monkeypatch):
    seen, ids = watched(monkeypatch), torch.randint(1, 96, (1, 7))
    for name, why in (("gpt2", None), ("phi3", "no q_proj")):
        model = tiny(name) if name == "gpt2" else family(name)
        expected = decode_tokens(model, ids, 8, fused=False).tokens
        assert decode_tokens(model, ids, 8)[0] == expected
        if why:
            with pytest.raises(Unsupported, match=why):
                Stepper(model, DynamicCache(config=model.config), 0, 8)
    model = family("llama")
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 96, bias=False)
    with pytest.raises(Unsupported, match="32 inputs and 96 outputs where 64 and 96"):
        Stepper(model, DynamicCache(config=model.config), 0, 8)
    model = family("llama")
    quantize_cache(model, {0: parse_scheme("w8a8kv8").cache}, {}, {})
    with pytest.raises(Unsupported, match="attention by 'ptq-cache"):
        Stepper(model, DynamicCache(config=model.config), 0, 8)
    model = family("llama")
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: (args[0] * 1.001,))
    with pytest.raises(Unsupported, match=r"hooks.*layers.1.mlp"):
        Stepper(model, DynamicCache(config=model.config), 0, 8)
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(Unsupported, match="type dynamic"):
        model = family("llama", rope_parameters=rope)
        Stepper(model, DynamicCache(config=model.config), 0, 8)
    model = family("llama")
    model.set_submodule(
        "model.layers.0.mlp.up_proj",
        QuantLinear(quantized("w4a16-g32", 96, 64), kernel="reference", dtype=torch.float32),
    )
    with pytest.raises(Unsupported, match="kernel 'reference'"):
        Stepper(model, DynamicCache(config=model.config), 0, 8)
    assert not seen


@pytest.mark.parametrize(
    "part", ["residual_multiplier", "attention_multiplier", "logits_scaling", "embedding_multiplier"]
)
def test_a_model_that_does_more_is_seen(monkeypatch, part):
    """Granite looks like Llama and multiplies in four places: what the embedding gives and the scale of attention are
    read off, the rest makes the first step another one, and the model's own goes on."""
    seen, ids = watched(monkeypatch), torch.randint(1, 96, (1, 7))
    model = family("granite", **{part: 0.5})
    expected = decode_tokens(model, ids, 12, fused=False).tokens
    assert decode_tokens(model, ids, 12)[0] == expected
    assert seen == [part in ("attention_multiplier", "embedding_multiplier")]


def test_no_compiler(monkeypatch):
    def none(*_: object) -> None:
        raise ToolkitError("C++ kernels: no compiler", "install one")

    monkeypatch.setattr("ptq.runtime.decoding.stepper.library", none)
    monkeypatch.setattr("ptq.runtime.kernels.rows.library", none)
    model, ids = family("llama"), torch.randint(1, 96, (1, 7))
    expected = decode_tokens(model, ids, 8, fused=False).tokens
    assert decode_tokens(model, ids, 8)[0] == expected
    with pytest.raises(ToolkitError, match="no compiler"):
        QuantLinear(quantized("w4a16-g32", 8, 64), kernel="rows")
