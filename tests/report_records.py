"""Run records of many shapes, for the tests of reports."""

from __future__ import annotations

import dataclasses
import math

from calibration.record import Divergence, Evaluation, LinearRecord, Protocol, RunRecord

HOSTILE = "<script>alert('x')</script> | `a` \" & <img src=x onerror=y>"
PROTOCOL = Protocol("gptq", "WikiText-2 raw, test", "9f3c1a77b2e04d15", "\n\n", False, 2048, 2048, 288627, "bfloat16")
KINDS = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (128, 64),
    "mlp.up_proj": (128, 64),
    "mlp.down_proj": (64, 128),
}


def evaluations(protocol: Protocol = PROTOCOL, own: float = 6.4117) -> tuple[Evaluation, ...]:
    near, far = (
        Divergence(0.0402, 0.391, 0.9127, 0.0436, 0.0011, 6.1382),
        Divergence(0.0871, 0.8, 0.87, 0.09, 0.0, 6.1382),
    )
    return (
        Evaluation("quantized", protocol, own, 1e5, 1000, 5000, near, "reference x 42"),
        Evaluation("rtn", protocol, 6.7361, 1e5, 1000, 5000, far),
        Evaluation("float", protocol, 6.1382, 1e5, 1000, 5000),
    )


def linears(blocks: int, error: float | None = 1e-3, experts: int = 0) -> tuple[LinearRecord, ...]:
    names = dict(KINDS) | {f"mlp.experts.{i}.up_proj": (32, 64) for i in range(experts)}
    return tuple(
        LinearRecord(
            f"model.layers.{b}.{name}", b, shape, "w4a16-g32-sym", 4.5, 0.009 + 1e-5 * b,
            None if error is None else error * (1 + b + i), {"awq.alpha": 0.45},
        )
        for b in range(blocks)
        for i, (name, shape) in enumerate(names.items())
    )  # fmt: skip


def record(entries: tuple[LinearRecord, ...] | None = None, **changes: object) -> RunRecord:
    entries = linears(4) if entries is None else entries
    weights = sum(e.shape[0] * e.shape[1] for e in entries)
    base = RunRecord(
        model={"name": "org/tiny", "architecture": "LlamaForCausalLM", "parameters": weights + 1000,
               "dtype": "bfloat16", "fingerprint": "4b0e66a1", "bytes": 16_060_522_496},
        recipe={"method": "awq+gptq",
                "passes": [{"name": "awq", "grid": 20, "duo": True}, {"name": "gptq", "damping": 0.01}],
                "schemes": [{"match": "*.o_proj", "scheme": "float"}, {"match": "*", "scheme": "w4a16-g32-sym"}],
                "command": "ptq quantize org/tiny --method awq+gptq --out tiny-w4"},
        calibration={"dataset": "allenai/c4", "samples": 128, "seq_len": 2048, "seed": 31337, "join": "\n\n",
                     "special_tokens": False, "tokens": 262144, "fingerprint": "77ab01fe"},
        result={"format": "compressed-tensors", "format_reason": "the default", "bytes": 5_702_000_000,
                "quantized_bytes": 3_600_000_000, "bits_per_weight": 4.5, "quantized_linears": len(entries),
                "quantized_weights": weights, "forward_passes": 3, "verified": len(entries),
                "loads_in": {"ptq": "yes", "transformers": "yes", "vllm": "yes", "llama.cpp": "reads GGUF only"}},
        linears=entries,
        left=({"what": "lm_head", "why": "it costs too much quality", "count": 1},),
        evaluations=evaluations(),
        versions={"ptq": "0.1.0", "torch": "2.8.0"},
    )  # fmt: skip
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def empty() -> RunRecord:
    return RunRecord({}, {}, {}, {}, (), (), (), {})


def hostile() -> RunRecord:
    entry = LinearRecord(HOSTILE, 0, (8, 8), HOSTILE, 4.0, 0.1, 0.1, {HOSTILE: HOSTILE})
    own = Evaluation(HOSTILE, dataclasses.replace(PROTOCOL, dataset=HOSTILE), 5.0, 1.0, 1, 1, path=HOSTILE)
    quantized = dataclasses.replace(own, model="quantized")
    return RunRecord(
        {"name": HOSTILE, "architecture": HOSTILE, "dtype": HOSTILE, "fingerprint": HOSTILE,
         "bytes": 10, "parameters": 5},
        {"method": HOSTILE, "passes": [{"name": HOSTILE, HOSTILE: HOSTILE}],
         "schemes": [{"match": HOSTILE, "scheme": HOSTILE}],
         "command": f"ptq {HOSTILE}\n```\n# not a heading"},
        {"dataset": HOSTILE, HOSTILE: HOSTILE},
        {"format": HOSTILE, "format_reason": HOSTILE, "bytes": 9, "loads_in": {HOSTILE: HOSTILE, HOSTILE + "2": "yes"},
         "quantized_bytes": 8, "bits_per_weight": 4.0, "quantized_linears": 2, "quantized_weights": 128,
         "forward_passes": 1, "verified": 2},
        (entry, dataclasses.replace(entry, block=1)),
        ({"what": HOSTILE, "why": HOSTILE, "count": 1},),
        (own, quantized),
        {HOSTILE: HOSTILE},
    )  # fmt: skip


RECORDS = {
    "small": record(),
    "one block": record(linears(1)),
    "no evaluations": record(evaluations=()),
    "no data": record(linears(3, error=None), calibration={}),
    "exact": record(linears(3, error=0.0)),
    "broken baseline": record(
        evaluations=(*evaluations()[:1], dataclasses.replace(evaluations()[1], perplexity=math.inf))
    ),
    "all broken": record(evaluations=tuple(dataclasses.replace(e, perplexity=math.nan) for e in evaluations())),
    "80 layers": record(linears(80)),
    "experts": record(linears(4, experts=300)),
    "empty": empty(),
    "hostile": hostile(),
}
