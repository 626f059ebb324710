"""`QuantLinear` as a module: memory, shapes, casts, moves, and the layers it stands for."""

import copy

import pytest
import torch
from runtime_layers import BF16, FP32, inputs, quantized

from calibration.errors import ToolkitError
from ptq.quantized import QuantizedTensor
from ptq.runtime.linear import QuantLinear


@pytest.mark.parametrize(
    ("scheme", "kernel", "code_bytes"),
    [
        ("w4a16-g128-sym", "int4", 0.5),
        ("w3a16-g128-asym", "int4", 0.5),
        ("w8a16-gchannel-sym", "int8", 1.0),
        ("w8a16-g128-sym", "reference", 1.0),
        ("w5a16-g128-asym", "reference", 1.0),
    ],
)
def test_one_copy_of_the_weight_is_kept(scheme, kernel, code_bytes):
    q = quantized(scheme, 256, 512)
    layer = QuantLinear(q)
    assert layer.kernel == kernel
    per_group = 4 if kernel in ("int4", "reference") else 2  # (scale, offset) in bf16; float32 scale; bf16 scale
    zeros = q.zero.numel() if kernel == "reference" and q.zero is not None else 0
    assert layer.weight_bytes == 256 * 512 * code_bytes + q.scale.numel() * per_group + zeros
    held = [v for v in vars(layer).values() if isinstance(v, (torch.Tensor, QuantizedTensor))]
    assert not held and not list(layer.parameters()) and not layer.state_dict()
    layer(inputs(3, 512))
    assert layer.weight_bytes == sum(b.nbytes for b in layer.buffers()), "nothing is cached by a call"


@pytest.mark.parametrize(
    ("scheme", "dtype"), [("w4a16-g32-sym", BF16), ("w8a16-gchannel-sym", BF16), ("w4a16-g32-asym", FP32)]
)
def test_bias_and_input_shapes(scheme, dtype):
    q, bias = quantized(scheme, 48, 96), inputs(48, dtype=dtype)
    layer, plain = QuantLinear(q, bias, dtype), QuantLinear(q, None, dtype)
    assert (layer.in_features, layer.out_features) == (96, 48)
    x = inputs(2, 5, 96, dtype=dtype)
    y = layer(x)
    assert y.shape == (2, 5, 48) and y.dtype == dtype
    torch.testing.assert_close(y, plain(x) + bias)
    assert layer(x[0, 0]).shape == (48,) and layer(x[:0]).shape == (0, 5, 48)
    for one, many in [(x[0, 0], y[0, 0]), (x[:, -1:], y[:, -1:]), (x.transpose(0, 1), y.transpose(0, 1))]:
        torch.testing.assert_close(layer(one), many)
    assert "weight" not in repr(layer) and "kernel=" in repr(layer) and not hasattr(layer, "weight")


@pytest.mark.parametrize("kernel", ["int4", "int8", "reference"])
def test_casting_the_model_does_not_touch_packed_tensors(kernel):
    q = quantized("w4a16-gchannel-sym", 32, 64)
    model = torch.nn.Sequential(QuantLinear(q, inputs(32), kernel=kernel), torch.nn.Linear(32, 4, dtype=BF16))
    x, before = inputs(3, 64), {name: b.clone() for name, b in model.named_buffers()}
    expected = model[0](x)
    model.to(torch.float32).half().to("cpu", torch.float32)
    assert model[1].weight.dtype == torch.float32
    for name, buffer in model.named_buffers():
        assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name])
    assert torch.equal(model[0](x), expected)
    if kernel == "reference":
        y = model[0](x.float())
        torch.testing.assert_close(y, x.float() @ q.dequantize().T + model[0].bias.float())
    else:
        with pytest.raises(ToolkitError, match="packed for bfloat16 activations, got float32"):
            model[0](x.float())


def test_a_layout_bound_to_its_device_does_not_move_and_the_reference_does():
    q = quantized("w4a16-g32-sym", 32, 64)
    with pytest.raises(ToolkitError, match="cannot move to meta"):
        QuantLinear(q).to("meta")
    assert all(b.device.type == "meta" for b in QuantLinear(q, kernel="reference").to("meta").buffers())


def test_a_deep_copy_is_independent():
    layer, x = QuantLinear(quantized("w4a16-g32-sym", 32, 64)), inputs(1, 64)
    clone = copy.deepcopy(layer)
    expected = layer(x)
    layer.get_buffer("codes").zero_()
    assert torch.equal(clone(x), expected)


@pytest.mark.parametrize("family", ["gpt2", "falcon", "llama"])
def test_it_stands_for_every_kind_of_linear(family):
    """Conv1D, FalconLinear and nn.Linear replaced in whole models: the logits of the dequantized float model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    if family == "llama":
        sizes |= {"intermediate_size": 96}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes), dtype=torch.float32).eval()
    ids = torch.randint(0, 64, (2, 9))
    fast = copy.deepcopy(model)
    replaced = 0
    for name, module in model.named_modules():
        if type(module).__name__ not in ("Linear", "Conv1D", "FalconLinear") or name == "lm_head":
            continue
        transposed = type(module).__name__ == "Conv1D"
        out, width = module.weight.shape[::-1] if transposed else module.weight.shape
        q = quantized("w4a16-g32-sym", out, width, seed=replaced)
        with torch.no_grad():
            module.weight.copy_(q.dequantize().T if transposed else q.dequantize())
        fast.set_submodule(name, QuantLinear(q, module.bias, FP32))
        replaced += 1
    assert replaced >= 8
    with torch.no_grad():
        torch.testing.assert_close(fast(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
