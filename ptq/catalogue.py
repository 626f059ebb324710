"""Every pass by name, phase and summary, read from the source of its class, so that ``--help`` needs no torch.

The registries are ``METHODS`` of `ptq.methods` and `sparsity.methods`; nothing here names a method.
"""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
REGISTRIES = ("ptq.methods", "sparsity.methods")
PASSES = "calibration.walk.passes"


@dataclass(frozen=True)
class Entry:
    """What the class of a pass says of itself; see `calibration.walk.passes.Pass`.

    Attributes:
        phases: in lower case, in order.
    """

    name: str
    title: str
    summary: str
    phases: tuple[str, ...]
    default_scheme: str | None
    expected_errors: str | None


@functools.cache
def methods() -> tuple[Entry, ...]:
    """All passes by phase, as listed in the registries within one."""
    order = phases()
    found = [_entry(registry, name) for registry in REGISTRIES for name in _classes(registry)]
    return tuple(sorted(found, key=lambda entry: order.index(entry.phases[0])))


@functools.cache
def phases() -> tuple[str, ...]:
    """Names of the phases in order, in lower case."""
    body = next(n.body for n in _tree(PASSES).body if isinstance(n, ast.ClassDef) and n.name == "Phase")
    names = [n.targets[0] for n in body if isinstance(n, ast.Assign)]
    return tuple(n.id.lower() for n in names if isinstance(n, ast.Name))


def combinations() -> dict[str, tuple[str, ...]]:
    """Names in the literature for passes in a row."""
    assigned = _assigned(_tree(REGISTRIES[0]).body, "COMBINATIONS")
    assert assigned is not None, "ptq.methods has COMBINATIONS"
    found: dict[str, tuple[str, ...]] = ast.literal_eval(assigned)
    return found


def fit_methods() -> tuple[str, ...]:
    """What `ptq fit` takes: passes whose errors it may expect, one that rounds, or learns rounding, alone or behind one
    that prepares it."""
    known = [entry for entry in methods() if entry.expected_errors is not None]
    rounding = [entry.name for entry in known if {"round", "repair"} & {*entry.phases}]
    before = [entry.name for entry in known if entry.name not in rounding]
    return (*rounding, *before, *(f"{name}+{last}" for name in before for last in rounding if last != "rtn"))


def named(name: str) -> Entry | None:
    """The pass of that name, None where there is none."""
    return next((entry for entry in methods() if entry.name == name), None)


def markdown() -> str:
    """The table of docs/methods.md."""
    rows = ["| method | phase | what it does | default scheme |", "| --- | --- | --- | --- |"]
    for entry in methods():
        scheme = f"`{entry.default_scheme}`" if entry.default_scheme else ""
        rows.append(f"| `{entry.name}` | {', '.join(entry.phases)} | {entry.summary} | {scheme} |")
    for name, members in combinations().items():
        rows.append(f"| `{name}` | | `{'+'.join(members)}` | |")
    return "\n".join(rows) + "\n"


@functools.cache
def _tree(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def _assigned(body: list[ast.stmt], name: str) -> ast.expr | None:
    """The expression that a body of statements gives to a name."""
    for statement in body:
        targets = [statement.target] if isinstance(statement, ast.AnnAssign) else getattr(statement, "targets", [])
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            value: ast.expr | None = getattr(statement, "value", None)
            return value
    return None


def _classes(registry: str) -> list[str]:
    table = _assigned(_tree(registry).body, "METHODS")
    assert isinstance(table, ast.Dict), f"{registry}.METHODS is a literal dict"
    return [value.id for value in table.values if isinstance(value, ast.Name)]


def _attribute(module: str, name: str, attribute: str) -> ast.expr | None:
    """What the body of a class, or of the nearest base that is ours, gives to an attribute."""
    tree = _tree(module)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            ours = node.module is not None and (ROOT / node.module.split(".")[0]).is_dir()
            return _attribute(str(node.module), name, attribute) if ours else None
        if isinstance(node, ast.ClassDef) and node.name == name:
            found = [_assigned(node.body, attribute)]
            found += [_attribute(module, base.id, attribute) for base in node.bases if isinstance(base, ast.Name)]
            return next((value for value in found if value is not None), None)
    return None


def _entry(module: str, cls: str) -> Entry:
    def text(attribute: str) -> str | None:
        value = _attribute(module, cls, attribute)
        return None if value is None else ast.literal_eval(value)

    name, stages = text("name"), _attribute(module, cls, "phases")
    assert name is not None and isinstance(stages, ast.Tuple), f"{module}.{cls} has a name and phases"
    chosen = tuple(stage.attr.lower() for stage in stages.elts if isinstance(stage, ast.Attribute))
    return Entry(
        name, text("title") or name, text("summary") or "", chosen, text("default_scheme"), text("expected_errors")
    )
