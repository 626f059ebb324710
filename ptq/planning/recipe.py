"""Recipes: which passes with which settings, and which scheme for which linear. TOML or ``--method`` to dataclasses.

.. code-block:: toml

    scheme = "w3a16-g128-sym"       # for everything no rule below names
    format = "compressed-tensors"   # optional

    [[pass]]
    name = "awq"
    grid = 20

    [[pass]]
    name = "gptq"
    order = "group"

    [[rule]]                        # first match wins
    match = "*.down_proj"
    scheme = "w4a16-g64-sym"        # or "float" to leave it alone

Unknown keys are errors. Defaults live once, in the dataclass of the pass.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from calibration.errors import ToolkitError, nearest, unknown_value
from calibration.model.reading import read_toml
from calibration.recorded import RecipeFacts
from calibration.walk.passes import Pass, Phase
from ptq.methods import COMBINATIONS
from ptq.scheme import Kind, QuantScheme, parse_scheme
from ptq.scheme_names import names_group
from ptq.sparse.methods import METHODS, all_methods, check_target

DEFAULT_SCHEME = "w4a16-g128"
FLOAT = "float"


@dataclass(frozen=True)
class Rule:
    """``match`` is a shell pattern over full linear names; scheme None leaves the linear in float. With ``any_group``
    nobody named a group size: it becomes one that divides, see `ptq.planning.groups`."""

    match: str
    scheme: QuantScheme | None
    any_group: bool = False

    def matches(self, name: str) -> bool:
        return fnmatch.fnmatchcase(name, self.match)


@dataclass(frozen=True)
class Recipe:
    """Passes in order, and rules of which the first match decides; the last rule matches everything."""

    passes: tuple[Pass, ...]
    rules: tuple[Rule, ...]
    format: str | None = None

    @property
    def method(self) -> str:
        """``awq+gptq``"""
        return "+".join(p.name for p in self.passes)

    def to_json(self) -> RecipeFacts:
        """Everything that decides the result, defaults included."""
        return {
            "method": self.method,
            "passes": [{"name": p.name, **_settings(p)} for p in self.passes],
            "schemes": [{"match": r.match, "scheme": FLOAT if r.scheme is None else str(r.scheme)} for r in self.rules],
        }


def _settings(instance: Any) -> dict[str, Any]:
    return {f.name: getattr(instance, f.name) for f in dataclasses.fields(instance)}


def parse_method(text: str, target: float | str | None = None) -> tuple[Pass, ...]:
    """``awq+gptq`` to passes with default settings, but for the ``target`` of sparsifying ones.

    Raises:
        ToolkitError: a name that is no method, with the nearest one; a target that is none, or has no pass to go to.
    """
    check_target(text, target)
    methods = all_methods(target)
    passes: list[Pass] = []
    combined = False
    for name in (name.strip() for name in text.split("+")):
        if name not in methods and name not in COMBINATIONS:
            raise unknown_value("--method", name, [*methods, *COMBINATIONS])
        known = COMBINATIONS.get(name, (name,))
        made = [methods[part]() for part in known]
        if combined and len(made) == 1 and Phase.ROUND in made[0].phases:
            passes.pop()  # the rounding that the combination ends with
        passes += made
        combined = len(made) > 1
    return with_rounding(passes)


def with_rounding(passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """Append ``rtn`` where no pass rounds, behind the last one that comes before rounding."""
    if any(Phase.ROUND in p.phases for p in passes):
        return tuple(passes)
    before = sum(p.phases[-1] < Phase.ROUND for p in passes)
    return (*passes[:before], METHODS["rtn"](), *passes[before:])


def default_kind(format_name: str | None) -> Kind:
    """Symmetric, but for AWQ files, whose readers expect zero points."""
    return "asym" if format_name == "awq" else "sym"


def method_recipe(
    method: str, scheme: str | None, format_name: str | None, target: float | str | None = None
) -> Recipe:
    """The recipe that ``--method``, ``--scheme`` and ``--target`` stand for."""
    passes = parse_method(method, target)
    return Recipe(passes, (_usual_rule(scheme, passes, default_kind(format_name)),), format_name)


def _usual_rule(scheme: str | None, passes: Sequence[Pass], kind: Kind) -> Rule:
    """The last rule: the scheme that was named, or the default of the passes."""
    parsed = parse_scheme(scheme or _default_scheme(passes), kind)
    return Rule("*", parsed, scheme is None or not names_group(scheme))


def _default_scheme(passes: Sequence[Pass]) -> str:
    return next((p.default_scheme for p in passes if p.default_scheme is not None), DEFAULT_SCHEME)


def read_recipe(path: Path, scheme: str | None = None, format_name: str | None = None) -> Recipe:
    """A recipe file; ``scheme`` and ``format_name`` from the command line take the place of its own.

    Raises:
        ToolkitError: missing, not TOML, unknown keys or values.
    """
    data = read_toml(path)
    _only_keys(path, "", data, ("method", "scheme", "format", "pass", "rule"))
    for key in ("method", "scheme", "format"):
        _checked(f"{path}: {key}", data.get(key, ""), str)
    for key in ("pass", "rule"):
        if not isinstance(data.get(key, []), list) or not all(isinstance(t, dict) for t in data.get(key, [])):
            raise ToolkitError(f"{path}: '{key}' is not a list of tables", f"write each one under [[{key}]]")
    if ("method" in data) == ("pass" in data):
        raise ToolkitError(f"{path}: needs either 'method' or [[pass]] tables", 'write method = "awq+gptq"')
    passes = (
        with_rounding([_read_pass(path, t) for t in data["pass"]]) if "pass" in data else parse_method(data["method"])
    )
    format_name = format_name or data.get("format")
    kind = default_kind(format_name)
    rules = [_read_rule(path, table, kind) for table in data.get("rule", [])]
    rules.append(_usual_rule(scheme or data.get("scheme"), passes, kind))
    return Recipe(passes, tuple(rules), format_name)


def _only_keys(path: Path, where: str, table: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in table:
        if key not in known:
            raise ToolkitError(
                f"{path}: unknown key '{where}{key}'", f"{nearest(key, known)}known keys: {', '.join(known)}"
            )


def _read_rule(path: Path, table: Mapping[str, Any], kind: Kind) -> Rule:
    _only_keys(path, "rule.", table, ("match", "scheme"))
    if not isinstance(table.get("match"), str) or not isinstance(table.get("scheme"), str):
        raise ToolkitError(
            f"{path}: a [[rule]] needs match and scheme", 'write match = "*.down_proj" and scheme = "w8a16-g128"'
        )
    if table["scheme"] == FLOAT:
        return Rule(table["match"], None)
    return Rule(table["match"], parse_scheme(table["scheme"], kind), not names_group(table["scheme"]))


def _read_pass(path: Path, table: Mapping[str, Any]) -> Pass:
    name = str(table.get("name"))
    if name not in METHODS:
        raise unknown_value(f"{path}: pass.name", name, METHODS)
    method = METHODS[name]
    types = get_type_hints(method)
    fields = [f.name for f in dataclasses.fields(method)]  # type: ignore[arg-type]
    _only_keys(path, f"{name}.", table, ("name", *fields))
    settings = {k: _checked(f"{path}: {name}.{k}", v, types[k]) for k, v in table.items() if k != "name"}
    return method(**settings)


def _checked(where: str, value: Any, kind: Any) -> Any:
    """A TOML value against the type of the dataclass field."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise unknown_value(where, str(value), get_args(kind))
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ToolkitError(f"{where}: {value!r} is not of type {kind.__name__}", f"write a {kind.__name__}")
    return value
