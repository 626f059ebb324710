"""The plan: from headers alone, in seconds, with every problem at once and numbers that the run then keeps."""

from __future__ import annotations

import json
import os
import re
import struct
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command import done, text_file, tiny
from tiny_models import FAMILIES

from calibration.errors import PlanError
from calibration.model.checkpoint import CheckpointReader
from calibration.record import read_record
from calibration.walk.context import Context
from ptq import quantize
from ptq.planning.job import Options, prepare
from ptq.planning.peak import Calibration, walk_bytes

HIDDEN, FFN, LAYERS, KV, WORDS = 8192, 28672, 80, 1024, 128256  # Llama 3 70B
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}


def sparse_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """A safetensors file of bfloat16 tensors with a correct header and length, and no data on disk."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    data = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(data)) + data)
    os.truncate(path, 8 + len(data) + offset)
    return offset


@pytest.fixture(scope="module")
def llama_70b(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A checkpoint folder of Llama 3 70B's shapes that takes no disk, and its bytes."""
    folder = tmp_path_factory.mktemp("llama-70b")
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "hidden_size": HIDDEN,
        "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": 64, "num_key_value_heads": 8,
        "vocab_size": WORDS, "max_position_embeddings": 8192, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, tuple[int, ...]]] = [
        {
            "model.embed_tokens.weight": (WORDS, HIDDEN),
            "model.norm.weight": (HIDDEN,),
            "lm_head.weight": (WORDS, HIDDEN),
        }
    ]
    for first in range(0, LAYERS, 4):
        shard: dict[str, tuple[int, ...]] = {}
        for i in range(first, first + 4):
            shard |= {f"model.layers.{i}.{name}.weight": shape for name, shape in LINEARS.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shard[f"model.layers.{i}.{norm}.weight"] = (HIDDEN,)
        shards.append(shard)
    total, weight_map = 0, {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        total += sparse_shard(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder, total


def test_the_plan_of_a_70b_model_takes_seconds(llama_70b, tmp_path):
    folder, total = llama_70b
    assert total > 140e9 and sum(p.stat().st_blocks for p in folder.iterdir()) * 512 < 5e6, "costs no disk"
    begun = time.monotonic()
    out = done("quantize", folder, "--method", "awq", "--dry-run", "--out", tmp_path / "out")
    assert time.monotonic() - begun < 30 and list(tmp_path.iterdir()) == []
    plan = prepare(folder, method="awq").plan
    weights = LAYERS * sum(a * b for a, b in LINEARS.values())
    stored = LAYERS * sum(a * b // 2 + 2 * a * (b // 128) for a, b in LINEARS.values())
    assert plan.sizes.quantized_weights == weights and plan.sizes.quantized_bytes == stored
    assert plan.sizes.bits_per_weight == 4.125 and plan.sizes.float_bytes == total
    assert plan.sizes.output_bytes == total - 2 * weights + stored
    assert plan.sizes.forwards == 1 and plan.needs_data
    for text in ("w4a16-g128-sym", "4.1250 bits per weight", f"{total / 1e9:.2f} GB", "8192 x 28672"):
        assert text in out, text
    assert re.search(r"mlp.down_proj +8192 x 28672 +w4a16-g128-sym +4.1250 +80\b", out)
    assert f"{plan.sizes.output_bytes / 1e9:.2f} GB" in out and "loads in vLLM" in out


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        ("w4a16-g128-asym", 4 + 20 / 128), ("w3a16-g64-sym", 3.25), ("w2a16-g32-asym", 2 + 18 / 32),
        ("w8a16-gchannel-sym", None),
    ],
)  # fmt: skip
def test_bits_per_weight_count_scales_and_zeros(llama_70b, scheme, bits):
    plan = prepare(llama_70b[0], method="rtn", scheme=scheme).plan
    if bits is None:
        weights = sum(a * b for a, b in LINEARS.values())
        bits = 8 + 16 * sum(a for a, _ in LINEARS.values()) / weights
    assert plan.sizes.bits_per_weight == pytest.approx(bits, rel=1e-12)


def test_peak_memory_does_not_grow_with_depth(llama_70b, tmp_path):
    folder, _ = llama_70b
    config = json.loads((folder / "config.json").read_text())
    for path in folder.iterdir():
        if path.name != "config.json":
            (tmp_path / path.name).symlink_to(path)
    half = {"num_hidden_layers": LAYERS // 2, "num_nextn_predict_layers": LAYERS // 2}  # the others may be there
    (tmp_path / "config.json").write_text(json.dumps({**config, **half}))
    shallow, whole = (prepare(f, method="gptq").plan.sizes for f in (tmp_path, folder))
    assert shallow.peak_bytes == whole.peak_bytes


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    text_file(folder / "text.txt")
    tiny(folder / "llama", intermediate_size=128)
    tiny(folder / "bfloat16", intermediate_size=128, dtype=torch.bfloat16)
    tiny(folder / "gpt2", "gpt2")
    tiny(folder / "mixtral", "mixtral")
    return folder


def written_bytes(folder: Path) -> int:
    with CheckpointReader(folder) as reader:
        return reader.total_bytes


@pytest.mark.parametrize("model", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("scheme", ["w2a16-g32-asym", "w3a16-g32-sym", "w4a16-g32-asym", "w5a16-gchannel-sym",
                                    "w8a16-g32-asym"])  # fmt: skip
def test_planned_bytes_are_the_bytes_written(place, tmp_path, model, scheme):
    options = {"method": "rtn", "scheme": scheme, "format": "native"}
    planned = prepare(place / model, **options).plan.sizes.output_bytes
    record = quantize(place / model, out=tmp_path / "out", **options)
    assert written_bytes(tmp_path / "out") == planned == record.result["bytes"]


# What a format stores beyond codes, scales and zero points: bytes per linear [out, in] with G groups a row, 4 bits.
EXTRA = {
    ("compressed-tensors", "sym", "bfloat16"): lambda out, columns, groups: 16,  # weight_shape
    ("compressed-tensors", "asym", "bfloat16"): lambda out, columns, groups: 16,
    ("compressed-tensors", "sym", "llama"): lambda out, columns, groups: 16 + 2 * out * groups,  # float32 scales
    ("awq", "sym", "bfloat16"): lambda out, columns, groups: out * groups // 2,  # zero points that are always 8
    ("awq", "asym", "bfloat16"): lambda out, columns, groups: 0,
    ("gptq", "sym", "bfloat16"): lambda out, columns, groups: out * groups // 2 + 4 * columns,  # and g_idx
    ("gptq", "asym", "bfloat16"): lambda out, columns, groups: 4 * columns,
}


@pytest.mark.parametrize(("name", "kind", "model"), EXTRA)
def test_what_other_formats_add_to_the_planned_bytes(place, tmp_path, name, kind, model):
    options = {"method": "rtn", "scheme": f"w4a16-g32-{kind}", "format": name}
    plan = prepare(place / model, **options).plan
    quantize(place / model, out=tmp_path / "out", **options)
    more = sum(EXTRA[name, kind, model](*q.shape, q.shape[1] // 32) for q in plan.layout.quantized)
    assert written_bytes(tmp_path / "out") - plan.sizes.output_bytes == more


@pytest.mark.parametrize("method", ["rtn", "gptq", "gptaq", "awq", "true_sequential", "ranges+gptq"])
def test_planned_forward_passes_are_those_made(place, tmp_path, monkeypatch, method):
    """Counted where the blocks are run: gathering and propagating. The last block has nothing to propagate to."""
    import calibration.walk.states

    calls: list[int] = []
    original = calibration.walk.states.HiddenStates.output

    def counted(self, block, index, *args):  # one batch: once per forward pass
        calls.append(index)
        return original(self, block, index, *args)

    monkeypatch.setattr(calibration.walk.states.HiddenStates, "output", counted)
    made: list[int] = []
    leave = Context.__init__

    def remember(self, *args, **named):
        leave(self, *args, **named)
        made.append(id(self))

    monkeypatch.setattr(Context, "__init__", remember)
    how: dict[str, object] = {"method": method}
    if method == "true_sequential":
        (tmp_path / "r.toml").write_text('[[pass]]\nname = "gptq"\ntrue_sequential = true\n')
        how = {"recipe": tmp_path / "r.toml"}
    options = Options(dataset=str(place / "text.txt"), samples=2, seq_len=16)
    scheme = "w8a8kvfp8-astatic-kvstatic" if method == "ranges+gptq" else "w4a16-g32"  # inputs and caches in one pass
    planned = prepare(place / "llama", scheme=scheme, options=options, **how).plan.sizes.forwards
    quantize(
        place / "llama", scheme=scheme, out=tmp_path / "out", dataset=str(place / "text.txt"), samples=2,
        seq_len=16, **how,
    )  # fmt: skip
    assert [calls.count(i) for i in (0, 1)] == [planned, max(planned - (planned > 1), 0)]
    assert len(made) == 2 and read_record(tmp_path / "out").result["forward_passes"] == planned


def test_memory_of_two_streams_is_planned(place):
    """GPTAQ beside GPTQ: another matrix per input, the float model's states before and after the block, the weights
    before rounding, and what the float block's linears see of one batch."""
    options = Options(dataset=str(place / "text.txt"), samples=64, seq_len=64)
    plans = [prepare(place / "llama", method=m, scheme="w4a16-g32", options=options).plan for m in ("gptq", "gptaq")]
    one, two = (plan.sizes for plan in plans)
    assert (one.forwards, two.forwards) == (2, 3)
    widths = {linear.name.rpartition(".")[2]: linear.shape for linear in plans[0].layout.linears if linear.block == 0}
    inputs = [widths[name][1] for name in ("q_proj", "o_proj", "up_proj", "down_proj")]
    matrices = 4 * sum(n * n for n in inputs) + 4 * max(inputs) ** 2
    states = 2 * 64 * 64 * widths["q_proj"][1] * 4
    assert two.peak_bytes - one.peak_bytes > matrices + states + 4 * sum(a * b for a, b in widths.values())


def test_every_problem_of_a_plan_at_once(place, tmp_path):
    (tmp_path / "r.toml").write_text(
        'scheme = "w3a16-g128"\nformat = "awq"\n[[pass]]\nname = "gptq"\ndamping = 2.0\nblock_size = 0\n'
        '[[pass]]\nname = "awq"\n[[rule]]\nmatch = "*.no_such"\nscheme = "float"\n'
    )
    with pytest.raises(PlanError) as error:
        prepare(place / "llama", recipe=tmp_path / "r.toml")
    text = str(error.value)
    assert len(error.value.problems) >= 6 and text.count("fix:") == len(error.value.problems)
    for part in ("gptq.damping", "gptq.block_size", "'awq' (BALANCE) cannot follow 'gptq'", "*.no_such", "3-bit",
                 "64 input columns are not a multiple of group size 128"):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("llama-mha", "falcon-rw")])
def test_every_family_has_a_plan(family, tmp_path):
    tiny(tmp_path / "m", family)
    sizes = prepare(tmp_path / "m", method="awq+gptq", scheme="w4a16-g32").plan.sizes
    assert 0 < sizes.output_bytes < sizes.float_bytes and sizes.forwards == 2


def test_memory_follows_the_format_and_the_lanes(place):
    """Native files take finished blocks as they are. One batch is one lane: its sums are the total."""
    options = Options(dataset=str(place / "text.txt"), samples=4, seq_len=16)
    by_format = [
        prepare(place / "llama", method="rtn", scheme="w4a16-g32", format=name).plan.sizes.peak_bytes
        for name in ("native", "compressed-tensors")
    ]
    assert by_format[0] < by_format[1]
    job = prepare(place / "llama", method="awq", scheme="w4a16-g32", options=options)
    infos, linears, passes = job.reader.infos, job.plan.layout.linears, job.plan.recipe.passes
    one, two = (
        walk_bytes(infos, job.spec, linears, passes, Calibration(256, batch, 16, 4, 1, 260), 64) for batch in (256, 255)
    )
    inputs = [
        next(n.shape[1] for n in linears if n.name.endswith(e)) for e in ("q_proj", "o_proj", "up_proj", "down_proj")
    ]
    per_token = 4 * (3 * max(max(n.shape) for n in linears) + 4 * 64)
    assert two - one == 4 * sum(n * n for n in inputs) - per_token


def test_memory_does_not_follow_the_vocabulary(place):
    """Of the embedding a walk has the rows of its tokens, and of the head nothing."""
    options = Options(dataset=str(place / "text.txt"), samples=4, seq_len=16)
    job = prepare(place / "llama", method="awq", scheme="w4a16-g32", options=options)
    infos, linears, passes = job.reader.infos, job.plan.layout.linears, job.plan.recipe.passes
    taken = set()
    for rows in (100_000, 10_000_000):
        outside = {n: replace(infos[n], shape=(rows, 64)) for n in ("model.embed_tokens.weight", "lm_head.weight")}
        calibration = Calibration(256, 256, 16, 4, 1, rows)
        taken.add(walk_bytes({**infos, **outside}, job.spec, linears, passes, calibration, 64))
    assert len(taken) == 1
