"""Every pass that promises exactness, on every family: logits unchanged to 1e-5 (float32), 1e-9 (float64)."""

from __future__ import annotations

import pytest
import torch
from test_exactness import TOLERANCE, load_whole, open_walk, wide_inside
from test_statistics import new_context
from tiny_models import FAMILIES, save_tiny
from transformers import AutoModelForCausalLM

from calibration.states import HiddenStates
from calibration.text import TokenBatches
from ptq.methods import SmoothQuant
from ptq.scheme import parse_scheme

PASSES = {
    "smoothquant": SmoothQuant(),
    "smoothquant-all-pairs": SmoothQuant(alpha=0.85, down=True, values=True),
    "smoothquant-search": SmoothQuant(search=True, down=True, values=True, grid=4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PASSES)
def test_logits_are_unchanged(name, family, dtype, tmp_path):
    folder, step = save_tiny(family, tmp_path, dtype), PASSES[name]
    walk = open_walk(folder, dtype)
    segments = load_whole(walk)
    ids = torch.randint(0, 96, (4, 24), generator=torch.Generator().manual_seed(3))
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=walk.skeleton.spec.attention)
    stock.set_experts_implementation("eager")  # the grouped product has no float64
    with torch.no_grad(), wide_inside(dtype):
        reference = stock(ids).logits
        states = HiddenStates.from_tokens(walk.skeleton, TokenBatches(ids, {}), batch_size=2)
        before = [{n: t.clone() for n, t in segment.masters.items()} for segment in segments]
        for segment in segments:
            segment.schemes = dict.fromkeys(segment.spec.linears, parse_scheme("w8a16-gchannel"))
            step.apply(segment, new_context(segment, states, step.statistics, allow_unseen=True))
            segment.sync()
            states.run(segment.module, segment.index, keep=True, advance=lambda _: None)
        after = walk.skeleton.model(ids).logits
    changed = any(
        not torch.equal(t, old[n]) for s, old in zip(segments, before, strict=True) for n, t in s.masters.items()
    )
    assert changed == any(pair_is_smoothed(step, g) for s in segments for g in s.spec.balance)
    assert (after - reference).abs().max() <= TOLERANCE[dtype] * reference.abs().max()


def pair_is_smoothed(step, group) -> bool:
    return {"norm": True, "linear": step.down, "value": step.values}[group.kind]
