"""Schemes and recipes: text to dataclasses and back, and errors that name the nearest known thing and a fix."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from calibration.architectures import ArchitectureSpec, BlockSpec
from calibration.errors import ToolkitError
from calibration.walk.passes import Phase, PlanView, check_order, forwards_per_block, stream_of
from ptq.linears import ModelLayout
from ptq.methods import METHODS, Awq, Gptq, Rtn
from ptq.planning.recipe import method_recipe, parse_method, read_recipe
from ptq.scheme import BITS, GROUP_SIZES, QUANTIZERS, Grouping, QuantScheme, TensorQuant, parse_scheme

NOTHING = ArchitectureSpec("none", "model.layers", 0, "rms", block=lambda index: BlockSpec((), ()))
EMPTY = PlanView(ModelLayout({}, (), (), "model.layers", False, "float32"), NOTHING, None, (), 10**6)


@pytest.fixture
def recipe(tmp_path):
    """Text of a recipe -> Recipe."""

    def read(text: str, **options):
        path = tmp_path / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return read_recipe(path, **options)

    return read


def names(passes) -> str:
    return "+".join(p.name for p in passes)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("bits", BITS)
def test_schemes_round_trip(bits, quantizer):
    for grouping in (Grouping("channel"), *(Grouping("group", g) for g in GROUP_SIZES)):
        scheme = QuantScheme(TensorQuant(bits, grouping, quantizer))
        assert parse_scheme(str(scheme)) == scheme
        assert QuantScheme.from_json(json.loads(json.dumps(scheme.to_json()))) == scheme


def test_what_a_scheme_leaves_out():
    assert str(parse_scheme("w4a16")) == "w4a16-g128-sym" == str(parse_scheme(" W4A16-G128 "))
    assert str(parse_scheme("w4a16", "asym")) == "w4a16-g128-asym"
    assert str(parse_scheme("w3a16-sym", "asym")) == "w3a16-g128-sym"
    w = parse_scheme("w8a16-gchannel-asym").weights
    assert (w.bits, w.levels, w.symmetric) == (8, 255, False)
    assert (w.grouping.width(96), w.grouping.count(96)) == (96, 1)
    assert (parse_scheme("w2a16-g32").weights.grouping.count(96), parse_scheme("w2a16").weights.symmetric) == (3, True)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("w7a16-g128", "7-bit weights"),
        ("w4a16-g48-sym", "group 'g48'"),
        ("w4a16-gfoo", "group 'gfoo'"),
        ("w4a16-g128-symm", "not a weight scheme"),
        ("4bit", "not a weight scheme"),
        ("", "not a weight scheme"),
    ],
)
def test_bad_schemes_name_the_choices(text, reason):
    with pytest.raises(ToolkitError) as caught:
        parse_scheme(text)
    assert reason in caught.value.message and f"'{text}'" in caught.value.message
    assert "w{2,3,4,5,6,8}a16-{g32,g64,g128,gchannel}[-sym|-asym]" in caught.value.fix


def test_near_misses_of_schemes_name_the_nearest():
    for text, nearest in (("w4b16-g128-sym", "w4a16-g128-sym"), ("w4a16-g128-symm", "w4a16-g128-sym")):
        with pytest.raises(ToolkitError, match=f"did you mean '{nearest}'"):
            parse_scheme(text)


@pytest.mark.parametrize(
    ("text", "expanded"),
    [("rtn", "rtn"), ("gptq", "gptq"), ("awq", "awq+rtn"), ("awq+gptq", "awq+gptq"), (" awq + rtn ", "awq+rtn")],
)
def test_methods_end_in_exactly_one_rounding_pass(text, expanded):
    passes = parse_method(text)
    assert names(passes) == expanded and not list(check_order(passes))
    assert sum(Phase.ROUND in p.phases for p in passes) == 1
    assert method_recipe(text, None, None).method == expanded


@pytest.mark.parametrize("text", ["gptq+awq", "rtn+awq"])
def test_phases_must_not_go_back(text):
    """The refusal names both passes and phases, and its fix, applied, is accepted."""
    (problem,) = check_order(parse_method(text))
    first, last = text.split("+")
    assert f"'{last}' (BALANCE) cannot follow '{first}' (ROUND)" in problem.reason
    fixed = re.fullmatch(r"write (\S+)", problem.fix)[1]
    assert fixed == f"{last}+{first}" and not list(check_order(parse_method(fixed)))


@pytest.mark.parametrize("text", ["rtn+gptq", "gptq+rtn", "awq+gptq+rtn"])
def test_two_rounding_passes_are_refused(text):
    (problem,) = check_order(parse_method(text))
    assert "more than one pass rounds" in problem.reason and problem.fix in (
        "keep one of rtn, gptq",
        "keep one of gptq, rtn",
    )


def test_streams_and_forwards():
    table = {"rtn": ("none", 0), "awq": ("either", 1), "gptq": ("quantized", 2), "awq+gptq": ("quantized", 2)}
    for text, expected in table.items():
        passes = parse_method(text)
        assert (stream_of(passes), forwards_per_block(passes)) == expected
    assert forwards_per_block((Awq(), Gptq(true_sequential=True))) == 5


def test_unknown_methods_name_the_nearest():
    with pytest.raises(ToolkitError) as caught:
        parse_method("awq+gtpq")
    assert "unknown value 'gtpq'" in caught.value.message
    assert "did you mean 'gptq'?" in caught.value.fix and ", ".join(METHODS) in caught.value.fix


def test_default_grid_follows_the_format():
    assert str(method_recipe("rtn", None, None).rules[0].scheme) == "w4a16-g128-sym"
    assert str(method_recipe("rtn", None, "awq").rules[0].scheme) == "w4a16-g128-asym"
    assert str(method_recipe("rtn", "w3a16-g64-sym", "awq").rules[0].scheme) == "w3a16-g64-sym"


def test_a_recipe_in_full(recipe):
    r = recipe("""
        scheme = "w3a16-g128-sym"
        format = "compressed-tensors"
        [[pass]]
        name = "awq"
        grid = 10
        clip = false
        clip_shrink = 0
        [[pass]]
        name = "gptq"
        order = "group"
        [[rule]]
        match = "*.layers.1.*"
        scheme = "float"
        [[rule]]
        match = "*.down_proj"
        scheme = "w4a16-g64"
        """)
    assert r.passes == (Awq(grid=10, clip=False, clip_shrink=0.0), Gptq(order="group"))
    assert isinstance(r.passes[0].clip_shrink, float) and r.format == "compressed-tensors" and r.method == "awq+gptq"

    def scheme(name: str) -> str:
        return str(next(rule for rule in r.rules if rule.matches(name)).scheme)

    assert scheme("model.layers.0.mlp.down_proj") == "w4a16-g64-sym"
    assert scheme("model.layers.1.mlp.down_proj") == "None"  # the first match wins
    assert scheme("model.layers.10.mlp.up_proj") == "w3a16-g128-sym"
    assert r.rules[-1].match == "*" and not r.rules[1].matches("model.layers.0.mlp.Down_proj")


def test_short_recipes_and_command_line(recipe):
    r = recipe('method = "awq"')
    assert (r.method, str(r.rules[0].scheme), r.format) == ("awq+rtn", "w4a16-g128-sym", None)
    assert recipe('[[pass]]\nname = "awq"').passes == (Awq(), Rtn())
    text = 'method = "rtn"\nscheme = "w2a16"\nformat = "native"\n[[rule]]\nmatch = "*q_proj"\nscheme = "w8a16"'
    r = recipe(text, scheme="w3a16", format_name="awq")
    assert [str(rule.scheme) for rule in r.rules] == ["w8a16-g128-asym", "w3a16-g128-asym"] and r.format == "awq"


@pytest.mark.parametrize(
    ("text", "message", "fix"),
    [
        ('metod = "awq"', "unknown key 'metod'", "did you mean 'method'?"),
        ('[[pass]]\nname = "gptq"\ndampning = 0.1', "unknown key 'gptq.dampning'", "did you mean 'damping'?"),
        ('[[pass]]\nname = "gpqt"', "pass.name: unknown value 'gpqt'", "did you mean 'gptq'?"),
        ("[[pass]]\ngrid = 3", "pass.name: unknown value 'None'", f"use one of: {', '.join(METHODS)}"),
        ('[[pass]]\nname = "gptq"\norder = "groups"', "gptq.order: unknown value 'groups'", "did you mean 'group'?"),
        ('[[pass]]\nname = "gptq"\ndamping = "low"', "gptq.damping: 'low' is not of type float", "write a float"),
        ('[[pass]]\nname = "gptq"\ndamping = true', "gptq.damping: True is not of type float", "write a float"),
        ('[[pass]]\nname = "awq"\ngrid = true', "awq.grid: True is not of type int", "write a int"),
        ('[[pass]]\nname = "awq"\ngrid = 2.5', "awq.grid: 2.5 is not of type int", "write a int"),
        ('[[pass]]\nname = "awq"\nclip = 1', "awq.clip: 1 is not of type bool", "write a bool"),
        ('[[pass]]\nname = "rtn"\nphases = 1', "unknown key 'rtn.phases'", "known keys: name"),
        ('method = "awq"\n[[pass]]\nname = "awq"', "either 'method' or [[pass]]", 'write method = "awq+gptq"'),
        ('scheme = "w4a16"', "either 'method' or [[pass]]", 'write method = "awq+gptq"'),
        ('method = "rtn"\n[[rule]]\nmatch = "*"', "a [[rule]] needs match and scheme", "scheme ="),
        ('method = "rtn"\n[[rule]]\nmtach = "*"', "unknown key 'rule.mtach'", "did you mean 'match'?"),
        ('method = "rtn"\n[[rule]]\nmatch = "*"\nscheme = "w9a16"', "9-bit weights", "use one of"),
        ('method = "rtn"\nscheme = 4', "scheme: 4 is not of type str", "write a str"),
        ("method = 4", "method: 4 is not of type str", "write a str"),
        ('[pass]\nname = "awq"', "'pass' is not a list of tables", "[[pass]]"),
        ('method = "rtn"\n[rule]\nmatch = "*"', "'rule' is not a list of tables", "[[rule]]"),
        ("method = ", "not readable as TOML", "mend the line"),
    ],
)
def test_bad_recipes_say_what_and_how_to_mend(recipe, text, message, fix):
    with pytest.raises(ToolkitError) as caught:
        recipe(text)
    assert message in caught.value.message and fix in caught.value.fix
    assert "recipe.toml" in caught.value.message or "scheme: 'w9a16'" in caught.value.message


def test_missing_recipe(tmp_path):
    with pytest.raises(ToolkitError, match=r"nothing\.toml"):
        read_recipe(tmp_path / "nothing.toml")


@pytest.mark.parametrize("name", METHODS)
def test_settings_survive_json_and_toml(name, recipe):
    """Records hold every setting, defaults included, and a recipe written from a record reads back the same."""
    r = method_recipe(name, "w3a16-g64-asym_minmax", None)
    data = json.loads(json.dumps(r.to_json()))
    assert data["method"] == r.method
    assert data["schemes"] == [{"match": "*", "scheme": "w3a16-g64-asym_minmax"}]
    assert len(data["passes"]) == len(r.passes)
    for settings, step in zip(data["passes"], r.passes, strict=True):
        defaults = {f.name: f.default for f in dataclasses.fields(METHODS[step.name])}
        assert settings == {"name": step.name, **defaults}
    tables = ["\n".join(f"{k} = {json.dumps(v)}" for k, v in table.items()) for table in data["passes"]]
    text = f'scheme = "{data["schemes"][0]["scheme"]}"\n' + "".join(f"[[pass]]\n{table}\n" for table in tables)
    assert recipe(text) == r


@pytest.mark.parametrize("method", METHODS.values(), ids=str)
def test_passes_say_what_they_are(method):
    """The class attributes that recipes, plan and walk rely on; the configuration is a frozen dataclass."""
    step = method()
    assert METHODS[step.name] is method and list(step.phases) == sorted(step.phases)
    assert step.stream != "none" or (step.statistics == () and step.references == ())
    assert re.fullmatch(r"[a-z].*[^.]", step.summary), "a few words behind the name, no sentence"
    assert not list(step.check(EMPTY))
    for field in dataclasses.fields(step):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(step, field.name, field.default)
