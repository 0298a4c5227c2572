"""Who may import whom: the packages, and the modules of the core among each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("iasvit", "baselines", "tasks")
# Package → what it may import of this repository, itself apart.
ALLOWED = {"iasvit": set(), "baselines": {"iasvit"}, "tasks": {"iasvit"}}
# Part of the core → the parts that it may import. What stands in no list may be imported by any that comes after.
LAYERS = {
    "errors": set(),
    "files": {"errors"},
    "plugins": {"errors"},
    "quantizers": {"errors"},
    "spec": {"errors"},
    "nn": {"errors", "quantizers"},
    "models": {"errors", "plugins", "quantizers", "spec", "nn"},
}
UPPER = ("benchmark", "leaderboard", "submit", "sweep", "cli", "__main__")  # nothing below may import them


def modules() -> dict[str, Path]:
    """Dotted name → file, of all modules."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes below a node, but for those in a block `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from at_run_time(node)


def imported(name: str, *, types: bool = True) -> Iterator[str]:
    """Modules of this repository that a module imports, inside functions too; for types alone only with `types`."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    for node in ast.walk(tree) if types else at_run_time(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def part(name: str) -> str:
    """The part of the core that a module belongs to: "quantizers" of iasvit.quantizers.log2."""
    return name.split(".")[1] if "." in name else ""


def test_packages_import_what_they_may() -> None:
    for name in MODULES:
        package = name.split(".")[0]
        others = {other.split(".")[0] for other in imported(name)} - {package}
        assert others <= ALLOWED[package], name


def test_a_baseline_imports_no_other_baseline() -> None:
    for name in MODULES:
        if name.startswith("baselines."):
            assert not [other for other in imported(name) if other.startswith("baselines")], name


def test_the_core_is_layered() -> None:
    for name in MODULES:
        if not name.startswith("iasvit."):
            continue
        parts = {part(other) for other in imported(name) if other.startswith("iasvit.")} - {part(name)}
        if part(name) in LAYERS:
            assert parts <= LAYERS[part(name)], name
        if part(name) not in UPPER:
            assert not parts & set(UPPER), name


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Not even inside a function.

    A package's __init__ stands for the names that it exports, and is part of no circle that they would not be.
    """
    graph = {name: {other for other in imported(name, types=False) if other != name} for name in MODULES}
    state: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert state.get(name) != 1, " → ".join((*path[path.index(name) :], name))
        if name not in state:
            state[name] = 1
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            state[name] = 2

    for name in graph:
        visit(name, ())
