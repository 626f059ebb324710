"""Sparse decoding of whole models against transformers' own forward with pruned inputs, token by token."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from command import done, text_file, tiny
from runtime_layers import quantized
from transformers import DynamicCache

from calibration.architectures import resolve
from calibration.errors import ToolkitError
from calibration.model.opening import open_model
from ptq.runtime.load import load_model
from ptq.scheme import parse_scheme
from ptq.sparse.decoding import fits_int4_rows, load_with_sites
from sparsity.attach import attach, decode_modes
from sparsity.decode import BREAK_EVEN, DecodeLinear, Phase
from sparsity.sites import Site, prune

PROMPT, STEPS = 6, 4
GATED = ["llama", "llama-tied-bias", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "mixtral", "qwen3_moe"]
PLAIN = ["opt", "opt-post-norm", "gpt2", "gpt_neox", "bloom", "falcon-7b", "falcon-40b"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """family -> a fresh model of it and its architecture."""
    folders = {}

    def load(family: str):
        if family not in folders:
            folders[family] = tiny(tmp_path_factory.mktemp(family), family)
        reader, _, architecture = open_model(folders[family])
        reader.close()
        return load_model(folders[family], dtype=torch.float32).model, architecture

    return load


def linears(architecture) -> list[str]:
    return list(decode_modes(architecture, ()))


def width(model, path: str, out: bool = False) -> int:
    module = model.get_submodule(path)
    shape = tuple(reversed(module.weight.shape)) if type(module).__name__ == "Conv1D" else module.weight.shape
    return shape[0 if out else 1]


def input_sites(model, architecture) -> list[Site]:
    """Every linear; scalars, vectors and centers by turns."""
    sites = []
    for number, path in enumerate(linears(architecture)):
        module, n = model.get_submodule(path), width(model, path)
        threshold = torch.rand(n if number % 2 else 1, generator=torch.Generator().manual_seed(number)) * 0.8
        if number % 3 == 0:
            center = torch.full((1,), 0.1)
            w = module.weight.detach().T if type(module).__name__ == "Conv1D" else module.weight.detach()
            sites.append(Site(path, "input", threshold, center, w.float() @ center.expand(n)))
        else:
            sites.append(Site(path, "input", threshold))
    return sites


def gate_sites(model, architecture) -> list[Site]:
    sites = []
    for index in range(architecture.n_blocks):
        for network in architecture.block(index).feed_forward:
            gate = architecture.prefix(index) + architecture.module_name(network.gate)
            n = width(model, gate, out=True) // (2 if network.up == network.gate else 1)
            threshold = torch.rand(n if index else 1, generator=torch.Generator().manual_seed(index)) * 0.5
            sites.append(Site(gate, "output", threshold))
    return sites


@contextmanager
def pruned(model, architecture, sites):
    """transformers' forward, pruning where ``state["on"]``."""
    state, handles = {"on": False}, []
    for site in sites:
        if site.mode == "input":

            def before(module, args, site=site):
                return (prune(args[0], site.threshold, site.center), *args[1:]) if state["on"] else None

            handles.append(model.get_submodule(site.linear).register_forward_pre_hook(before))
            continue
        index = int(site.linear.removeprefix(architecture.blocks + ".").split(".")[0])
        prefix = architecture.prefix(index)
        network = next(
            f
            for f in architecture.block(index).feed_forward
            if prefix + architecture.module_name(f.gate) == site.linear
        )

        def after(module, args, output, site=site):
            return prune(output, site.threshold) if state["on"] else None

        handles.append(model.get_submodule(prefix + network.nonlinearity).register_forward_hook(after))
    yield state
    for handle in handles:
        handle.remove()


def run(model, ids: torch.Tensor, state=None) -> torch.Tensor:
    """Logits of a prompt and of the steps behind it, ``[B, PROMPT + STEPS, V]``."""
    cache, logits = DynamicCache(config=model.config), []
    with torch.inference_mode():
        for start, end in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, PROMPT + STEPS))]:
            if state is not None:
                state["on"] = start > 0
            logits.append(model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, dim=1)


def ids_of(batch: int) -> torch.Tensor:
    return torch.randint(1, 90, (batch, PROMPT + STEPS), generator=torch.Generator().manual_seed(0))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert ((found - expected).abs() <= 2e-5 * expected.abs().max()).all(), (found - expected).abs().max()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", GATED + PLAIN)
def test_decoding_with_pruned_inputs(family, batch, loaded):
    model, architecture = loaded(family)
    sites, ids = input_sites(model, architecture), ids_of(batch)
    dense = run(model, ids)
    with pruned(model, architecture, sites) as state:
        expected = run(model, ids, state)
    decoder = attach(model, architecture, sites, Phase())
    found = run(model, ids)
    assert_close(found, expected)
    assert (expected - dense)[:, PROMPT:].abs().max() > 1e-3, "the masks do something"
    assert not decoder.masked_only
    decoder.phase.masked = False
    assert_close(run(model, ids), dense)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", GATED)
def test_decoding_with_pruned_gates(family, batch, loaded):
    model, architecture = loaded(family)
    sites, ids = gate_sites(model, architecture), ids_of(batch)
    sites += [Site(p, "input", torch.tensor([0.3])) for p in linears(architecture) if p.endswith("o_proj")]
    dense = run(model, ids)
    with pruned(model, architecture, sites) as state:
        expected = run(model, ids, state)
    decoder = attach(model, architecture, sites, Phase())
    assert_close(run(model, ids), expected)
    assert (expected - dense)[:, PROMPT:].abs().max() > 1e-3
    decoder.phase.masked = False
    assert_close(run(model, ids), dense)


def test_prompts_single_positions_and_large_batches_are_dense(loaded):
    model, architecture = loaded("llama")
    one, many = ids_of(1)[:, :1], ids_of(BREAK_EVEN + 1)
    with torch.inference_mode():
        first, whole = model(input_ids=one).logits, model(input_ids=many).logits
    stepped = run(model, many)
    attach(model, architecture, input_sites(model, architecture), Phase())
    with torch.inference_mode():
        assert_close(model(input_ids=one, past_key_values=DynamicCache(config=model.config)).logits, first)
        assert_close(model(input_ids=many).logits, whole)
    assert_close(run(model, many), stepped)


def test_thresholds_of_zero_change_no_bit_of_decoding(loaded):
    model, architecture = loaded("llama")
    sites = [Site(path, "input", torch.zeros(1)) for path in linears(architecture)]
    decoder = attach(model, architecture, sites, Phase())
    masked = run(model, ids_of(1))
    decoder.phase.masked = False
    assert torch.equal(run(model, ids_of(1)), masked)


def test_there_is_one_copy_of_each_weight(loaded):
    model, architecture = loaded("llama-tied-bias")
    sites = input_sites(model, architecture)[::2]
    decoder = attach(model, architecture, sites, Phase())
    assert model.lm_head.weight_rows.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    held = {p.data_ptr() for p in model.parameters()}
    inside = [layer for path, layer in decoder.linears.items() if path != "lm_head"]
    assert not held & {layer.weight_rows.data_ptr() for layer in inside}
    for layer in inside:
        out, n_in = layer.shape
        assert layer.weight_rows.is_contiguous() and layer.weight_rows.numel() == out * n_in
        if layer.mode == "input":
            assert layer.dense_weight().stride() == (1, out)


def test_counting_reports_the_rows_that_were_read(loaded):
    model, architecture = loaded("llama")
    path = linears(architecture)[0]
    decoder = attach(model, architecture, [Site(path, "input", torch.tensor([0.7]))], Phase(counting=True))
    inputs = []
    model.get_submodule(path).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    run(model, ids_of(1))
    kept = torch.cat([x.flatten() for x in inputs[1:]]).abs() > 0.7
    layer = decoder.linears[path]
    assert layer.kept.rows == int(kept.sum()) and layer.kept.of == kept.numel()
    assert decoder.bytes_skipped(STEPS) == pytest.approx(layer.weight_rows.nbytes * (1 - float(kept.double().mean())))


@pytest.fixture(scope="module")
def quantized_folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("quantized")
    source = tiny(base / "float", hidden_size=64, intermediate_size=128)
    text = text_file(base / "text.txt")
    done("quantize", source, "--method", "rtn", "--scheme", "w4a16-g32-asym", "--dataset", text, "--out", base / "q")
    done("quantize", source, "--method", "rtn", "--scheme", "w8a16-g32", "--dataset", text, "--out", base / "q8")
    return base


@pytest.mark.parametrize("kind", ["input", "output"])
def test_four_bit_models_decode_from_their_codes(kind, quantized_folder):
    dense = load_model(quantized_folder / "q", dtype=torch.float32).model
    architecture = resolve(dense.config)
    source = load_model(quantized_folder / "float", dtype=torch.float32).model
    sites = (input_sites if kind == "input" else gate_sites)(source, architecture)
    sites = [Site(s.linear, s.mode, s.threshold) for s in sites]
    with pruned(dense, architecture, sites) as state:
        expected = run(dense, ids_of(1), state)
    loaded, decoder = load_with_sites(quantized_folder / "q", tuple(sites), torch.float32, torch.device("cpu"))
    assert not loaded.kernels and not decoder.masked_only, "no linear is left to another kernel"
    assert_close(run(loaded.model, ids_of(1)), expected)


def test_a_linear_without_sparse_kernel_is_pruned_and_named(quantized_folder):
    dense = load_model(quantized_folder / "q8", dtype=torch.float32, decoding=True).model
    architecture = resolve(dense.config)
    sites = [Site(path, "input", torch.tensor([0.4])) for path in linears(architecture)]
    with pruned(dense, architecture, sites) as state:
        expected = run(dense, ids_of(1), state)
    loaded, decoder = load_with_sites(quantized_folder / "q8", tuple(sites), torch.float32, torch.device("cpu"))
    assert set(decoder.masked_only) == set(linears(architecture))
    assert "w8a16" in decoder.masked_only[linears(architecture)[0]]
    assert_close(run(loaded.model, ids_of(1)), expected)


@pytest.mark.parametrize(
    ("scheme", "changes", "fits"),
    [
        ("w4a16-g32-asym", {}, True),
        ("w2a16-gchannel-sym", {}, True),
        ("w8a16-g32-sym", {}, False),
        ("w4a16-ic32-sym", {}, False),
        ("w4a16-g32-sym", {"group_index": torch.zeros(64, dtype=torch.int32)}, False),
        ("w4a16-g32-sym", {"scale": torch.full((64, 2), 1 + 2.0**-10)}, False),
        ("w4a16-g32-sym", {"parts": {"lora_a": torch.zeros(1, 64)}}, False),
    ],
)
def test_only_plain_four_bit_codes_are_laid_out_in_rows(scheme, changes, fits):
    q = dataclasses.replace(quantized(scheme.replace("ic32", "g32"), 64, 64), scheme=parse_scheme(scheme))
    assert fits_int4_rows(dataclasses.replace(q, **changes)) == fits


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "site", "reason"),
    [
        ("llama", Site("model.layers.7.mlp.up_proj", "input", torch.zeros(1)), "has no linear"),
        ("llama", Site("model.layers.0.mlp.up_proj", "input", torch.zeros(65)), "65 thresholds for 64 values"),
        ("llama", Site("model.layers.0.mlp.gate_proj", "output", torch.zeros(64)), "64 thresholds for 96 values"),
        ("llama", Site("model.layers.0.mlp.up_proj", "output", torch.zeros(1)), "not the gate"),
        ("opt", Site("model.decoder.layers.0.fc1", "output", torch.zeros(1)), "not the gate"),
    ],
)
def test_sites_of_another_model_are_refused(family, site, reason, loaded):
    model, architecture = loaded(family)
    with pytest.raises(ToolkitError, match=reason) as error:
        attach(model, architecture, [site], Phase())
    assert "ptq sparsify" in error.value.fix


def test_inputs_and_rows_of_one_up_projection_cannot_both_be_skipped(loaded):
    _, architecture = loaded("llama")
    gate = Site("model.layers.0.mlp.gate_proj", "output", torch.zeros(1))
    up = Site("model.layers.0.mlp.up_proj", "input", torch.zeros(1))
    with pytest.raises(ToolkitError, match="both its inputs and its outputs"):
        decode_modes(architecture, [gate, up])


def test_a_layer_says_what_it_is(loaded):
    model, architecture = loaded("llama")
    attach(model, architecture, [], Phase(), kernel="reference")
    head = model.lm_head
    assert isinstance(head, DecodeLinear) and "kernel=reference" in repr(head) and "out=260" in repr(head)
