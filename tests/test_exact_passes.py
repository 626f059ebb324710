"""Every pass that promises exactness, on every family: logits unchanged to 1e-5 (float32), 1e-9 (float64).

Passes that round what they change to the dtype of the file, gains and biases, also from bfloat16 files. (A rotation of
the residual stream also turns embeddings and head, which the file then holds in its own dtype: from bfloat16 that is
exact to bfloat16 only.)
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_exactness import TOLERANCE, load_whole, open_blocks, wide_inside
from test_statistics import new_context
from tiny_models import FAMILIES, save_tiny
from tiny_runs import edit_config
from transformers import AutoConfig, AutoModelForCausalLM

from calibration.architectures import Residual, resolve
from calibration.model.skeleton import load_parameters
from calibration.text.crops import TokenBatches
from calibration.walk.states import HiddenStates
from ptq.methods import OutlierTune, RepQuant, Rotate, SmoothQuant
from ptq.scheme import parse_scheme

SCHEME = parse_scheme("w8a8-asym")
SMOOTHING = {
    "smoothquant": SmoothQuant(),
    "smoothquant-all-pairs": SmoothQuant(alpha=0.85, down=True, values=True),
    "smoothquant-search": SmoothQuant(search=True, down=True, values=True, grid=4),
}
ROTATION = {
    "rotate": Rotate(),
    "rotate-residual": Rotate(values=False, online=False),
    "rotate-orthogonal": Rotate(kind="orthogonal", seed=3),
    "rotate-values-online": Rotate(residual=False),
}
FROM_BFLOAT16 = {
    "smoothquant-all-pairs": SMOOTHING["smoothquant-all-pairs"],
    "outliertune": OutlierTune(),
    "repquant": RepQuant("minmax", shift=True, down=True, values=True),
    "rotate-values-online": ROTATION["rotate-values-online"],
}
DTYPES = pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float64], ids=["float32", "float64"]
)
"""What is exact to 1e-9 in float64 seldom fails to be so to 1e-5 in float32: that one is slow."""


@torch.no_grad()
def logits_around(family, step, dtype, folder, stored=None, **changes):
    """Logits of plain transformers, and of the model after the pass; its blocks and their segments. The file is in
    ``stored``, or in ``dtype``."""
    save_tiny(family, folder, stored or dtype, **changes)
    config = AutoConfig.from_pretrained(folder)
    spec = resolve(config)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=spec.attention)
    stock.set_experts_implementation("eager")  # the grouped product has no float64
    if isinstance(step, OutlierTune | RepQuant):
        edit_config(folder, **step.config_changes(config))
    blocks = open_blocks(folder, dtype)
    schemes = [dict.fromkeys(blocks.skeleton.spec.block(i).linears, SCHEME) for i in range(len(blocks))]
    blocks = replace(blocks, passes=(step,), schemes=schemes.__getitem__)
    segments, model = load_whole(blocks), blocks.skeleton.model
    ids = torch.randint(0, 96, (4, 24), generator=torch.Generator().manual_seed(3))
    with wide_inside(dtype):
        reference = stock(ids).logits
        outside = {spec.root_module_name(n): t.to(dtype) for n, t in blocks.outside.tensors()}
        load_parameters(
            model, {n: t for n, t in outside.items() if n in dict(model.named_parameters(remove_duplicate=False))}
        )
        blocks.transform_inputs()
        states = HiddenStates.from_tokens(blocks.skeleton, TokenBatches(ids, {}), batch_size=2)
        for segment in segments:
            step.apply(segment, new_context(segment, states, step.statistics, allow_unseen=True))
            segment.sync()
            states.run(segment.module, segment.index, keep=True, advance=lambda _: None)
        return reference, model(ids).logits, blocks, segments


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SMOOTHING)
def test_smoothing(name, family, dtype, tmp_path):
    step = SMOOTHING[name]
    reference, after, blocks, segments = logits_around(family, step, dtype, tmp_path)
    wanted = {"norm": True, "linear": step.down, "value": step.values}
    smoothed = {g.consumers[0] for s in segments for g in s.spec.balance if wanted[g.kind]}
    assert {n for s in segments for n in s.notes} >= smoothed
    for segment in segments:
        before = blocks.load(segment.index, with_module=False)
        changed = {n for n, t in segment.masters.items() if not torch.equal(t, before.masters[n])}
        assert bool(changed) == bool(smoothed)
    assert (after - reference).abs().max() <= TOLERANCE[dtype] * reference.abs().max()


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_outliertune(family, dtype, tmp_path):
    """Shift and steps, with biases that the family lacks switched on."""
    reference, after, blocks, segments = logits_around(family, OutlierTune(), dtype, tmp_path)
    admits = [g for s in segments for g in s.spec.balance if g.kind == "norm"]
    moved = [n for s in segments for n, notes in s.notes.items() if notes.get("outliertune.shifted") == "true"]
    assert bool(moved) == (blocks.skeleton.spec.norm == "layer" and bool(admits))
    assert (after - reference).abs().max() <= TOLERANCE[dtype] * reference.abs().max()


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_repquant(family, dtype, tmp_path):
    """Steps and zero points of channels, wherever a block has a place for them."""
    step = RepQuant("minmax", shift=True, down=True, values=True)
    reference, after, blocks, segments = logits_around(family, step, dtype, tmp_path)
    assert any(s.parts for s in segments) != bool(list(step.refusals(blocks.skeleton.spec)))
    assert (after - reference).abs().max() <= TOLERANCE[dtype] * reference.abs().max()


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ROTATION)
def test_rotation(name, family, dtype, tmp_path):
    """Families that admit R1 keep their logits with every linear of the blocks turned; the others are refused."""
    step = ROTATION[name]
    blocks = open_blocks(save_tiny(family, tmp_path / "table", dtype), dtype)
    admits = isinstance(blocks.skeleton.spec.residual, Residual)
    refusals = list(step.refusals(blocks.skeleton.spec))
    assert bool(refusals) == (step.residual and not admits)
    if refusals:
        assert blocks.skeleton.spec.residual in refusals[0].reason and "residual = false" in refusals[0].fix
        return
    reference, after, blocks, segments = logits_around(family, step, dtype, tmp_path / "model")
    for segment in segments:
        before = blocks.load(segment.index, with_module=False)
        same = {n for n in segment.spec.linears if torch.equal(segment.weight(n), before.weight(n))}
        assert not same if step.residual else same < set(segment.spec.linears)
        online = {n for n in segment.spec.writes if n in segment.parts}
        values = {n for g in segment.spec.balance if g.kind == "value" for n in g.consumers}
        assert online == (set(segment.spec.writes) - values if step.online else set())
    assert (after - reference).abs().max() <= TOLERANCE[dtype] * reference.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FROM_BFLOAT16)
def test_bfloat16_files(name, family, tmp_path):
    reference, after, *_ = logits_around(family, FROM_BFLOAT16[name], torch.float64, tmp_path, torch.bfloat16)
    assert (after - reference).abs().max() <= TOLERANCE[torch.float64] * reference.abs().max()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"num_key_value_heads": 1}),
        (
            "llama",
            {"hidden_size": 72, "head_dim": 18, "intermediate_size": 108},
        ),  # no Hadamard matrices of order 72 / 18
        ("opt", {"tie_word_embeddings": False}),
        ("opt", {"enable_bias": False}),
        ("gpt2", {"tie_word_embeddings": False}),
        ("gpt_neox", {"tie_word_embeddings": True}),
        ("gpt_neox", {"attention_bias": False}),
        ("mixtral", {"tie_word_embeddings": True}),
        ("falcon-40b", {"tie_word_embeddings": False}),
    ],
    ids=str,
)
def test_rotation_of_variants(family, changes, tmp_path):
    reference, after, *_ = logits_around(family, Rotate(), torch.float32, tmp_path, **changes)
    assert (after - reference).abs().max() <= TOLERANCE[torch.float32] * reference.abs().max()
