"""Every exact transform on every family: logits unchanged to 1e-5 (float32) and 1e-9 (float64) of the largest.

Checkpoints are stored in the dtype of the arithmetic, and in bfloat16, where a divided gain is rounded to eight bits
and the columns that read it must be multiplied by what was really divided.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, save_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from calibration.architectures import resolve
from calibration.architectures.spec import Balance
from calibration.model.checkpoint import CheckpointReader
from calibration.model.skeleton import Skeleton, load_parameters
from calibration.text.crops import TokenBatches
from calibration.walk.float_blocks import FloatBlocks
from calibration.walk.segment import Segment
from calibration.walk.states import HiddenStates


@contextmanager
def wide_inside(dtype):
    """Model classes compute norms, router and attention softmax in float32 whatever the dtype of the model. For the
    float64 check these casts are lifted, so that only our own arithmetic is measured."""
    lower, to, softmax = torch.Tensor.float, torch.Tensor.to, torch.nn.functional.softmax

    def keep(x, *args, **kwargs):
        if x.dtype == torch.float64 and args and args[0] is torch.float32:
            return x
        return to(x, *args, **kwargs)

    def wide(x, *args, dtype=None, **kwargs):
        return softmax(x, *args, dtype=x.dtype if x.dtype == torch.float64 else dtype, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        if dtype == torch.float64:
            patch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else lower(x))
            patch.setattr(torch.Tensor, "to", keep)
            patch.setattr(torch.nn.functional, "softmax", wide)
        yield


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
STORAGE = pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float64),
    ],
    ids=["float32", "float64", "bfloat16-in-float32", "bfloat16-in-float64"],
)
"""Dtype of the file, and of masters and forward passes."""


def open_blocks(folder: Path, dtype: torch.dtype) -> FloatBlocks:
    config = AutoConfig.from_pretrained(folder)
    spec = resolve(config)
    skeleton = Skeleton(config, spec, dtype, torch.device("cpu"))
    reader = CheckpointReader(folder)
    reader.add_base_prefix(spec.base_prefix)
    return FloatBlocks(reader, skeleton, master_dtype=dtype)


def load_whole(blocks: FloatBlocks) -> list[Segment]:
    """Fill the whole skeleton; returns its segments, whose masters are the module's parameters."""
    reader, spec, model = blocks.reader, blocks.skeleton.spec, blocks.skeleton.model
    outside = {
        spec.root_module_name(n): reader.tensor(n).to(blocks.skeleton.dtype)
        for n in reader.infos
        if not n.startswith(spec.blocks + ".")
    }
    load_parameters(model, outside)
    model.tie_weights()
    return [blocks.load(i) for i in range(spec.n_blocks)]


def scales(segment: Segment, group: Balance, generator: torch.Generator) -> torch.Tensor:
    if group.heads is not None:
        n = group.heads.key_value * group.heads.width
    elif group.kind == "linear":
        n = segment.weight(group.consumers[0]).shape[1]
    else:
        n = segment.masters[f"{group.producer}.weight"].numel()
    return torch.exp(torch.randn(n, generator=generator, dtype=torch.float64)).to(walk_dtype(segment))


def walk_dtype(segment: Segment) -> torch.dtype:
    return next(iter(segment.masters.values())).dtype


@STORAGE
@pytest.mark.parametrize("family", FAMILIES)
def test_balancing_leaves_logits_unchanged(family, stored, dtype, tmp_path):
    folder = save_tiny(family, tmp_path, stored)
    blocks = open_blocks(folder, dtype)
    segments = load_whole(blocks)
    ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(3))
    stock = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=blocks.skeleton.spec.attention
    )
    stock.set_experts_implementation("eager")  # the grouped product has no float64
    with torch.no_grad(), wide_inside(dtype):
        reference = stock(ids).logits
        before = blocks.skeleton.model(ids).logits
        assert (before - reference).abs().max() <= TOLERANCE[dtype] * reference.abs().max()
        generator = torch.Generator().manual_seed(4)
        for segment in segments:
            for group in segment.spec.balance:
                segment.absorb(group, scales(segment, group, generator))
            segment.sync()
        after = blocks.skeleton.model(ids).logits
    assert (after - reference).abs().max() <= TOLERANCE[dtype] * reference.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_walking_block_by_block_is_exact(family, tmp_path):
    """Hidden states streamed through the blocks, with recorded call arguments, end in the model's own logits."""
    folder = save_tiny(family, tmp_path)
    blocks = open_blocks(folder, torch.float32)
    load_whole(blocks)
    model, spec = blocks.skeleton.model, blocks.skeleton.spec
    ids = torch.randint(0, 96, (5, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=spec.attention)(ids).logits
        states = HiddenStates.from_tokens(blocks.skeleton, TokenBatches(ids, {}), batch_size=2)
        for index in range(spec.n_blocks):
            states.run(blocks.skeleton.block(index), index, keep=True, advance=lambda _: None)
        last = torch.cat(states.batches)
        blocks = model.get_submodule(spec.blocks)
        for block in blocks:
            block.forward = lambda hidden, *a, **k: (last,) if spec.tuple_output else last
        logits = model(ids, use_cache=False).logits
    assert torch.equal(logits, reference) or (logits - reference).abs().max() < 1e-5 * reference.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_table_names_every_linear_of_the_block(family, tmp_path):
    blocks = open_blocks(save_tiny(family, tmp_path), torch.float32)
    spec = blocks.skeleton.spec
    for index in range(spec.n_blocks):
        prefix = spec.prefix(index)
        matrices = {
            n[len(prefix) : -len(".weight")]
            for n, info in blocks.reader.infos.items()
            if n.startswith(prefix) and len(info.shape) == 2
        }
        block = spec.block(index)
        assert matrices == set(block.linears) | set(block.routers)
        for group in block.balance:
            assert f"{prefix}{group.producer}.weight" in blocks.reader.infos
