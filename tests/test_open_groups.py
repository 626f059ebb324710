"""Group sizes that nobody named fit the matrices; those that were named are refused where they do not. Names of other
tools."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import done, refused, text_file, tiny

from calibration.record import read_record
from ptq.fitting.job import prepare_fit
from ptq.planning.groups import with_any_group
from ptq.planning.job import Options, prepare
from ptq.scheme import parse_scheme
from ptq.scheme_names import names_group
from ptq.study.sensitivity import prepare_sensitivity

ODD = {"hidden_size": 96, "head_dim": 24, "intermediate_size": 256}  # 32 divides 96, 128 divides 256
FAST = ("--samples", "3", "--seq-len", "24")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("groups")
    text_file(folder / "text.txt")
    tiny(folder / "odd", **ODD)
    tiny(folder / "packed", **{**ODD, "head_dim": 32})  # files with one scheme want outputs in multiples of 32
    tiny(folder / "none", hidden_size=72, head_dim=18, intermediate_size=128)
    tiny(folder / "moe", "qwen3_moe", hidden_size=128, moe_intermediate_size=96, intermediate_size=128)
    return folder


def schemes(model: Path, method: str = "rtn", **choice: str | None) -> dict[str, set[str]]:
    """Schemes by the last part of the linears' names."""
    found: dict[str, set[str]] = {}
    for linear in prepare(model, method=method, **choice).plan.layout.quantized:  # type: ignore[arg-type]
        found.setdefault(linear.name.rsplit(".", 1)[-1], set()).add(str(linear.scheme))
    return found


def test_the_largest_group_that_divides_is_taken_and_said(place: Path) -> None:
    found = schemes(place / "odd")
    assert found.pop("down_proj") == {"w4a16-g128-sym"}
    assert set(found) >= {"q_proj", "gate_proj"} and all(s == {"w4a16-g32-sym"} for s in found.values())
    out = done("quantize", place / "odd", "--method", "awq", "--dry-run")
    assert "group 32 where 128 does not divide (96 inputs): q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj" in out
    assert "down_proj" not in out.split("does not divide", 1)[1]
    assert "a step per row where 128 does not divide (72 inputs): q_proj" in done(
        "quantize", place / "none", "--method", "awq", "--dry-run"
    )
    assert "does not divide" not in done("quantize", "demo", "--method", "awq", "--dry-run")


def test_the_command_as_typed_runs(place: Path) -> None:
    done("quantize", place / "odd", "--method", "awq", "--dataset", place / "text.txt", *FAST, "--out", place / "out")
    found = {e.name.rsplit(".", 1)[-1]: e.scheme for e in read_record(place / "out").linears}
    assert found["down_proj"] == "w4a16-g128-sym" and found["v_proj"] == "w4a16-g32-sym"
    assert "perplexity" in done("eval", place / "out", "--dataset", place / "text.txt", "--seq-len", 24)


@pytest.mark.parametrize(
    ("method", "scheme", "expected"),
    [
        ("gptq", "w3a16", "w3a16-g32-sym"),
        ("gptq", "W4A16_ASYM", "w4a16-g32-asym"),
        ("fp4", None, "fp4-e2m1-g32"),
        ("rtn", "fp4-e3m0", "fp4-e3m0-g32"),
        ("smoothquant", None, "w8a8-gchannel-sym-atoken"),
        ("rtn", "w8a8-g64", None),
        ("rtn", "w4a16-g128", None),
        ("rtn", "mxfp4", "mxfp4"),
    ],
    ids=str,
)
def test_a_group_that_was_named_is_refused_where_it_does_not_divide(
    place: Path, method: str, scheme: str | None, expected: str | None
) -> None:
    words = ("quantize", place / "odd", "--method", method, "--dry-run", *(("--scheme", scheme) if scheme else ()))
    if expected is None:
        assert "96 input columns are not a multiple of group size" in refused(*words)
    else:
        assert schemes(place / "odd", method, scheme=scheme)["q_proj"] == {expected}


def test_recipes(place: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('method = "rtn"\n[[rule]]\nmatch = "*.q_proj"\nscheme = "w8a16"\n')
    found = {n.name: str(n.scheme) for n in prepare(place / "odd", recipe=recipe).plan.layout.quantized}
    assert found["model.layers.0.self_attn.q_proj"] == "w8a16-g32-sym"
    assert found["model.layers.0.mlp.down_proj"] == "w4a16-g128-sym"
    recipe.write_text('method = "rtn"\n[[rule]]\nmatch = "*.q_proj"\nscheme = "w8a16-g64"\n')
    assert "group size 64" in refused("quantize", place / "odd", "--recipe", recipe, "--dry-run")


def test_experts_share_a_size_and_files_with_one_scheme_have_one(place: Path) -> None:
    found = schemes(place / "moe")
    assert found["q_proj"] == {"w4a16-g128-sym"}
    sizes = {str(n.scheme) for n in prepare(place / "moe", method="rtn").plan.layout.quantized if n.expert is not None}
    assert sizes == {"w4a16-g32-sym"}
    for form, count in (("gptq", 1), ("awq", 1), ("compressed-tensors", 2), ("native", 2)):
        found = set().union(*schemes(place / "packed", format=form).values())
        assert len(found) == count and all("-g32-" in scheme or count == 2 for scheme in found), form


def test_offers_of_fit_and_study(place: Path) -> None:
    fit = prepare_fit(place / "odd", schemes=("w4a16", "w3a16-g64"))
    offered = {unit.names[0].rsplit(".", 1)[-1]: set(map(str, unit.options)) for unit in fit.units}
    assert offered["q_proj"] == {"w4a16-g32-sym"} and offered["down_proj"] == {"w4a16-g128-sym", "w3a16-g64-sym"}
    study = prepare_sensitivity(place / "odd", ("w2a16", "w3a16"), Options())
    assert all(len(unit.options) == 2 for unit in study.units)
    words = ("--dataset", place / "text.txt", *FAST, "--schemes", "w4a16", "--windows", 1)
    out = done("study", "sensitivity", place / "odd", "--out", place / "study", *words)
    assert "14" in out or "q_proj" in out


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("W4A16", "w4a16"),
        ("w8a8", "w8a8"),
        ("W8A16", "w8a16"),
        ("FP8", "fp8"),
        ("FP8_DYNAMIC", "fp8"),
        ("int4", "w4a16"),
        ("INT8", "w8a8"),
        ("Q4_0", "w4a16-g32-sym"),
        ("q8_0", "w8a16-g32"),
        ("NVFP4", "nvfp4"),
        ("NVFP4A16", "nvfp4"),
        ("MXFP4", "mxfp4"),
        ("W4A16_ASYM", "w4a16-g128-asym"),
        ("W4AFP8", "w4afp8"),
        ("O2", "o2"),
    ],
)
def test_names_of_other_tools(name: str, scheme: str) -> None:
    assert parse_scheme(name) == parse_scheme(scheme)
    assert parse_scheme(str(parse_scheme(name))) == parse_scheme(name)


def test_which_texts_name_a_group() -> None:
    for text in ("w4a16", "int4", "w4a16-asym", "fp4-e2m1", "w4a16-sym_gptq", "W4A16_ASYM", "w3a16-sym"):
        assert not names_group(text), text
    for text in ("w4a16-g128", "w4a16-sym-g32", "Q4_0", "mxfp4", "w8a8-wtensor", "w4a16-ic64", "w4a16-gchannel"):
        assert names_group(text), text


def test_sizes_on_offer() -> None:
    scheme = parse_scheme("w4a16")
    sizes = {n: with_any_group(scheme, (64, n)).weights.grouping.size for n in (256, 192, 96, 72)}
    assert sizes == {256: 128, 192: 64, 96: 32, 72: None}
    assert with_any_group(scheme, (64, 256), (64, 96)).weights.grouping.size == 32
    for fixed in ("mxfp4", "nvfp4", "w8a8", "w1a16-salient20"):
        assert with_any_group(parse_scheme(fixed), (64, 72)) == parse_scheme(fixed)
