"""The decode loop against transformers' own, its measurements, and streaming."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from calibration.errors import ToolkitError
from ptq.quantized import QuantizedTensor
from ptq.runtime.generate import decode_tokens, generate, read_bandwidth, weight_bytes_per_token
from ptq.runtime.linear import QuantLinear
from ptq.scheme import parse_scheme


class Letters:
    """A tokenizer of bytes: token t is byte t."""

    eos_token_id = 0

    def __call__(self, text, return_tensors):
        ids = torch.tensor([list(text.encode())], dtype=torch.int64)
        return type("Encoding", (), {"input_ids": ids})()

    def decode(self, tokens, skip_special_tokens):
        return bytes(t for t in tokens if t or not skip_special_tokens).decode("utf-8", errors="replace")


def tiny(family: str = "llama", **more) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2} | more
    sizes |= {"intermediate_size": 64} if family in ("llama", "mixtral") else {}
    config = AutoConfig.for_model(family, **sizes, eos_token_id=0, bos_token_id=1, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "falcon"])
def test_greedy_tokens_are_those_of_transformers(family):
    model = tiny(family)
    ids = torch.randint(1, 256, (1, 7))
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0, 7:].tolist()
    tokens, times, _ = decode_tokens(model, ids, 12, end_tokens=frozenset([0]))
    assert tokens == expected and len(times) == len(tokens) + 1 and times == sorted(times)


def long_rope():
    """A Phi-3 that changes its frequencies at 16 positions."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
    rope |= {"original_max_position_embeddings": 16, "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    sizes = {"max_position_embeddings": 64, "intermediate_size": 64, "original_max_position_embeddings": 16}
    model = tiny("phi3", **sizes, num_key_value_heads=4, rope_parameters=rope)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():  # attention must matter, or frequencies do not
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


@torch.no_grad()
@pytest.mark.parametrize("prompt", [5, 15, 16, 17, 20])
def test_long_rope_generates_what_recomputation_gives(prompt):
    model, ids = long_rope(), torch.randint(1, 256, (1, prompt), generator=torch.Generator().manual_seed(1))
    found = decode_tokens(model, ids, 24).tokens
    for _ in range(24):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert found == ids[0, prompt:].tolist()


def test_it_stops_at_an_end_token_and_counts_it():
    model = tiny()
    ids = torch.randint(1, 256, (1, 7))
    tokens = decode_tokens(model, ids, 12).tokens
    first = tokens.index(tokens[5])
    assert decode_tokens(model, ids, 12, end_tokens=frozenset([tokens[5]]))[0] == tokens[: first + 1]


def test_sampling_is_a_function_of_the_seed():
    model, ids = tiny(), torch.randint(1, 256, (1, 7))
    draws = [decode_tokens(model, ids, 20, temperature=1.5, seed=seed)[0] for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]


def test_a_generation_reports_what_it_did():
    pieces: list[str] = []
    result = generate(tiny(), Letters(), "prompt", max_new_tokens=60, temperature=1.0, stream=pieces.append)
    assert result.prompt_tokens == 6 and 1 < result.new_tokens <= 60
    assert "".join(pieces) == result.text
    assert result.prefill_seconds > 0 and result.decode_tokens_per_second > 0 and result.peak_rss_bytes > 2**20
    share = result.bandwidth_share(1e9)
    assert share == result.decode_tokens_per_second * result.weight_bytes_read_per_token / 1e9
    one = generate(tiny(), Letters(), "prompt", max_new_tokens=1)
    assert one.decode_tokens_per_second is None and one.bandwidth_share(1e9) is None


def test_prompts_that_cannot_be_continued_are_refused():
    with pytest.raises(ToolkitError, match="no tokens"):
        generate(tiny(), Letters(), "")
    with pytest.raises(ToolkitError, match="max new tokens: 0"):
        generate(tiny(), Letters(), "a", max_new_tokens=0)


def test_weight_bytes_count_what_a_token_reads_once():
    plain, tied = tiny(tie_word_embeddings=False), tiny(tie_word_embeddings=True)
    total = sum(p.nbytes for p in plain.parameters())
    assert weight_bytes_per_token(plain) == total - 256 * 32 * 4  # a look-up reads one row of the table
    assert weight_bytes_per_token(tied) == weight_bytes_per_token(plain)  # a tied head reads all of it
    codes = torch.zeros(64, 32, dtype=torch.uint8)
    layer = QuantLinear(QuantizedTensor(codes, torch.ones(64, 1), None, parse_scheme("w4a16-g32")))
    plain.set_submodule("model.layers.0.mlp.up_proj", layer)
    assert weight_bytes_per_token(plain) == total - 256 * 32 * 4 - 64 * 32 * 4 + layer.weight_bytes


def test_weight_bytes_count_active_experts_only():
    model = tiny("mixtral", num_local_experts=4, num_experts_per_tok=1)
    experts = sum(p.nbytes for n, p in model.named_parameters() if ".experts." in n)
    others = sum(p.nbytes for n, p in model.named_parameters() if ".experts." not in n and "embed" not in n)
    assert experts > 0 and weight_bytes_per_token(model) == others + experts // 4


def test_read_bandwidth_is_a_plausible_speed():
    assert 1e7 < read_bandwidth(buffer_bytes=2**22, repeats=2) < 1e13
