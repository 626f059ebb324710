"""LLM-FP4 on weights: the search against its own candidates, whole runs, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import done, refused, text_file, tiny
from test_cli import codes
from test_oracles_llm_fp4 import randn
from tiny_runs import IDS, plain_model

from calibration.record import read_record
from ptq.methods.rtn import round_to_nearest
from ptq.numerics import floats
from ptq.numerics.float_search import OFFSETS, search_bounds
from ptq.numerics.grids import grid_of, own_global_scale
from ptq.numerics.objective import rounding_error
from ptq.runtime.load import load_model
from ptq.scheme import E2M1, parse_scheme

torch.set_num_threads(1)
GRIDS = ["fp4-e2m1-g32", "fp4-e1m2-g64", "fp4-e3m0-gchannel", "fp6-e3m2-g128", "mxfp4", "nvfp4", "fp4-e2m1-ic32"]


def published_offsets(bias: float, n: int = 100, low: float = 0.01, high: float = 1.2) -> list[float]:
    """The paper's candidates for a bias as offsets to it: (c - 1) bias with c = low + i (high - low) / n, i < n, and
    c = 1, which its grid leaves out."""
    return [(low + i * (high - low) / n - 1) * bias for i in range(n)] + [0.0]


def problem(rows: int = 64, columns: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight with some large entries and the Gram matrix of correlated inputs of unequal size."""
    w = randn(rows, columns).float()
    w[::5, ::7] *= 4
    x = randn(512, columns, seed=1) @ randn(columns, columns, seed=2) * torch.logspace(-1, 1, columns)
    return w, (x.T @ x).float()


def group_errors(w: torch.Tensor, gram: torch.Tensor, text: str, bounds: torch.Tensor | None) -> torch.Tensor:
    """The error of every group on its own, ``[lines, G]``."""
    scheme = parse_scheme(text)
    d = round_to_nearest(w, scheme, grid_of(w, scheme.weights, bounds)).dequantize() - w
    grouping = scheme.weights.grouping
    if grouping.axis == "out":
        return (d.T.unflatten(1, (-1, grouping.width(len(d)))).square().sum(2).T * gram.diagonal()).T
    width = grouping.width(w.shape[1])
    runs = [slice(k * width, (k + 1) * width) for k in range(w.shape[1] // width)]
    return torch.stack([((d[:, run] @ gram[run, run]) * d[:, run]).sum(1) for run in runs], dim=1)


@pytest.mark.parametrize("text", GRIDS)
def test_oracle_6_no_group_is_worse_than_plain_rounding(text):
    """6. With the factor 1 among the candidates the search is never worse than MinMax, group by group, and it finds the
    best of all candidates."""
    w, gram = problem()
    quant = parse_scheme(text).weights
    plain = group_errors(w, gram, text, None)
    best = group_errors(w, gram, text, search_bounds(w, gram, quant))
    assert bool((best <= plain * (1 + 1e-4)).all()) and best.sum() < 0.98 * plain.sum()
    global_scale = own_global_scale(w, quant)
    units = w if quant.grouping.axis == "in" else w.T
    units = units.unflatten(-1, (-1, quant.grouping.width(units.shape[1])))
    top = 4.0 if quant.scale_format == "e8m0" else quant.float_format.largest
    for offset in (-1.0, 0.0, 1.0) if quant.scale_format == "e8m0" else OFFSETS[::8]:
        scale = floats.scales(units, quant, None, global_scale)
        bound = scale / (1 if global_scale is None else global_scale) * top * 2.0**-offset
        assert bool((best <= group_errors(w, gram, text, bound) * (1 + 1e-4)).all())


def test_chosen_scales_are_those_that_rounding_takes():
    """A bound stands for a stored scale exactly: rounding with it does not move it to a neighbour."""
    w, gram = problem()
    for text in GRIDS:
        quant = parse_scheme(text).weights
        bounds = search_bounds(w, gram, quant)
        q = round_to_nearest(w, parse_scheme(text), grid_of(w, quant, bounds))
        top = 4.0 if quant.scale_format == "e8m0" else quant.float_format.largest
        assert torch.allclose(q.step * top, bounds, rtol=1e-6)


def test_published_candidates():
    """100 multiples from 0.01 to 1.1881 of the bias, and the 1 that they leave out."""
    offsets = torch.tensor(published_offsets(8.0)) / 8 + 1
    assert len(offsets) == 101 and float(offsets[0]) == pytest.approx(0.01) and float(offsets[-1]) == 1
    assert float(offsets[99]) == pytest.approx(1.1881) and set(published_offsets(0.0)) == {0.0}
    w, gram = problem()
    quant = parse_scheme("fp4-e2m1-gchannel").weights
    bias = float(floats.bias_of(w.abs().amax(), E2M1))
    errors = [
        float(rounding_error(w, gram, quant, grid_of(w, quant, search_bounds(w, gram, quant, offsets=o))))
        for o in (tuple(published_offsets(bias)), OFFSETS)
    ]
    assert errors[1] < 1.02 * errors[0]


def test_candidates_are_compared_on_the_whole_gram_matrix():
    """Inputs that share one direction: errors that cancel along it cost nothing, which the diagonal does not see."""
    w = (
        randn(64, 64).float()
        * torch.logspace(-1, 1, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    )
    direction = torch.rand(64, generator=torch.Generator().manual_seed(4))
    x = randn(400, 1, seed=1) * direction + 0.05 * randn(400, 64, seed=2)
    gram = (x.T @ x).float()
    for text in ("fp4-e1m2-g32", "fp4-e2m1-g32", "fp4-e3m0-g32"):
        quant = parse_scheme(text).weights
        bounds = search_bounds(w, gram, quant), search_bounds(w, torch.diag(gram.diagonal()), quant)
        full, diagonal = (float(rounding_error(w, gram, quant, grid_of(w, quant, b))) for b in bounds)
        assert full < 0.1 * diagonal


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp4")
    text_file(folder / "text.txt")
    tiny(folder / "llama", torch_dtype="bfloat16", intermediate_size=128, num_key_value_heads=4)
    return folder


def words(place: Path, method: str, *more: str | Path) -> list[str | Path]:
    run = ["quantize", place / "llama", "--method", method, "--samples", "8", "--seq-len", "32", *more]
    return [*run, "--dataset", place / "text.txt", "--out", place / "run", "--overwrite"]


def output_errors(folder: Path) -> float:
    return sum(entry.relative_error or 0.0 for entry in read_record(folder).linears)


@pytest.mark.parametrize("scheme", ["fp4-e2m1-g32", "mxfp4", "nvfp4"])
def test_gptq_goes_on_from_the_chosen_scales(place, scheme):
    errors = {}
    for method in ("fp4", "gptq", "fp4+gptq"):
        done(*words(place, method, "--scheme", scheme, "--format", "native"))
        errors[method] = output_errors(place / "run")
    assert errors["fp4+gptq"] < 0.9 * errors["fp4"] and errors["fp4+gptq"] < errors["gptq"]


def test_formats_are_chosen_per_linear(place):
    """The default scheme of fp4 is fp4-e2m1-g128; a format per linear ends in the file and the notes."""
    assert "multiple of group size 128" in refused(*words(place, "fp4", "--scheme", "fp4-e2m1-g128"))
    done(*words(place, "fp4", "--scheme", "fp4-e3m0-g32"))
    found = {str(q.scheme) for q in codes(place / "run").values()}
    assert found <= {"fp4-e3m0-g32", "fp4-e2m1-g32", "fp4-e1m2-g32"} and "fp4-e2m1-g32" in found
    for linear in read_record(place / "run").linears:  # the chosen one has the least error
        errors = {name: e for name, e in linear.notes.items() if name.startswith("fp4.")}
        assert len(errors) == 3 and min(errors, key=errors.__getitem__).removeprefix("fp4.") in str(linear.scheme)
    recipe = place / "keep.toml"
    recipe.write_text('[[pass]]\nname = "fp4"\nformats = false\n')
    run = words(place, "fp4")
    run[2:4] = ["--recipe", recipe]
    done(*run, "--scheme", "fp4-e3m0-g32")
    assert {str(q.scheme) for q in codes(place / "run").values()} == {"fp4-e3m0-g32"}


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4"])
def test_exports_load_in_transformers_with_our_logits(place, scheme):
    out = done(*words(place, "fp4+gptq", "--scheme", scheme))
    assert "compressed-tensors" in out
    theirs = plain_model(place / "run", torch.bfloat16)
    ours = load_model(place / "run", dtype=torch.bfloat16).model
    with torch.no_grad():
        found, expected = ours(IDS).logits.float(), theirs(IDS).logits.float()
    assert (found - expected).abs().max() <= 1e-2 * expected.abs().max()
    done("export", place / "run", "--format", "native", "--out", place / "native", "--overwrite")
    done("export", place / "native", "--format", "compressed-tensors", "--out", place / "again", "--overwrite")
    assert (place / "again" / "model.safetensors").read_bytes() == (place / "run" / "model.safetensors").read_bytes()


def test_refusals(place):
    message = refused(*words(place, "fp4", "--scheme", "w4a16-g32"))
    assert "fp4 chooses among floats" in message and "fp4-e2m1-g128" in message
    message = refused(*words(place, "fp4", "--scheme", "fp4-e2m1-g32", "--format", "compressed-tensors"))
    assert "no place for fp4-e2m1-g32" in message and "nvfp4" in message
