"""Who may import whom (docs/architecture.md), read from the source; and that ``ptq --help`` starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import environment

ROOT = Path(__file__).parents[1]
PACKAGES = ("calibration", "ptq", "sparsity", "cli")
MAY_IMPORT = {
    "calibration": {"calibration"},
    "ptq": {"ptq", "sparsity", "calibration"},
    "sparsity": {"sparsity", "calibration"},
    "cli": {"cli", "ptq", "sparsity", "calibration"},
}
BELOW = ("model", "architectures")  # one room's worth: a class is opened by its entry, an entry derived from its class
CALIBRATION_MAY_IMPORT = {
    "model": BELOW,
    "architectures": BELOW,
    "text": (*BELOW, "text"),
    "walk": (*BELOW, "text", "walk"),
    "scoring": (*BELOW, "text", "scoring"),
}
NUMERICS_MAY_IMPORT = (
    *("ptq.numerics", "ptq.scheme", "ptq.float_formats", "ptq.activations", "torch", "triton", "math"),
    "calibration.threads",  # how many threads an operation of torch takes
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(p): p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))}


def imports(tree: ast.AST, everywhere: bool) -> Iterator[str]:
    """Modules that a file imports; without ``everywhere`` only those that importing the file imports."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in FILES else node.module
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            if everywhere:
                yield from imports(node, everywhere)
        elif everywhere or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from imports(node, everywhere)


def of(name: str, everywhere: bool = True) -> set[str]:
    return set(imports(ast.parse(FILES[name].read_text(encoding="utf-8")), everywhere))


@pytest.mark.parametrize("package", PACKAGES)
def test_import_directions(package):
    for name in (n for n in FILES if n.split(".")[0] == package):
        tops = {m.split(".")[0] for m in of(name)}
        wrong = sorted(tops & {*PACKAGES, "tests"} - MAY_IMPORT[package])
        assert not wrong, f"{name} imports {', '.join(wrong)}"


@pytest.mark.parametrize("room", CALIBRATION_MAY_IMPORT)
def test_rooms_of_calibration_import_downwards(room):
    others = {f"calibration.{other}" for other in set(CALIBRATION_MAY_IMPORT) - set(CALIBRATION_MAY_IMPORT[room])}
    for name in (n for n in FILES if n.startswith(f"calibration.{room}")):
        wrong = sorted(m for m in of(name) if any(f"{m}.".startswith(f"{other}.") for other in others))
        assert not wrong, f"{name} imports {', '.join(wrong)}"


def test_numerics_know_only_torch_and_schemes():
    for name in (n for n in FILES if n.startswith("ptq.numerics")):
        wrong = sorted(
            m
            for m in of(name)
            if not m.startswith(NUMERICS_MAY_IMPORT) and m.split(".")[0] not in sys.stdlib_module_names
        )
        assert not wrong, f"{name} imports {', '.join(wrong)}"


def test_no_cycles_between_modules():
    graph = {name: {m for m in of(name, everywhere=False) if m in FILES and m != name} for name in FILES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_only_the_command_prints():
    for name, path in FILES.items():
        if name.split(".")[0] != "cli":
            calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
            printing = [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
            assert not printing, f"{name}, lines {printing}"


@pytest.mark.parametrize(
    ("words", "printed"),
    [(["--help"], "quantize"), (["quantize", "--help"], "smoothquant"), (["methods"], "smoothquant")],
    ids=" ".join,
)
def test_help_is_instant(words, printed):
    code = (
        f"import sys; sys.argv = ['ptq', *{words}]\n"
        "from cli.main import main\n"
        "try:\n    main()\n"
        "finally:\n    print([m for m in ('torch', 'transformers', 'datasets', 'numpy') if m in sys.modules])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment(), cwd=ROOT
    )
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == "[]", result.stdout + result.stderr
    assert printed in result.stdout
