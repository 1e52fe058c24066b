"""The parts may only know what is below them, no module what knows it, and all of them are installed."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"codegen": "fuser.codegen", "search": "fuser.search", "runtime": "fuser.runtime", "kernels": "fuser.kernels"}
FOLDERS |= {"templates": "fuser.templates", "fuser": "fuser"}

MAY_IMPORT = {
    "fuser.ir": set[str](),
    "fuser.templates": set[str](),
    "fuser.runtime": {"fuser.ir.target", "fuser.ir.errors", "fuser.ir.extents"},
    "fuser.kernels": {"fuser.ir"},
    "fuser.codegen": {"fuser.ir", "fuser.kernels", "fuser.runtime", "fuser.templates"},
    "fuser.search": {"fuser.ir", "fuser.kernels", "fuser.runtime", "fuser.codegen"},
}
"""For every part the parts below it; what is missing here (the face, ``fuser`` itself) may import everything."""


def modules() -> Iterator[tuple[str, Path]]:
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), path


def imports(module: str, path: Path) -> Iterator[tuple[str, int]]:
    """Names of our own modules that a file imports, anywhere in it, with the line."""
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], base]).rstrip(".")
            # `from fuser.ir import target` names a module, `from fuser.ir.target import Target` a value of one.
            yield from (
                (f"{base}.{alias.name}" if _is_module(f"{base}.{alias.name}") else base, node.lineno)
                for alias in node.names
            )


@functools.cache
def _names() -> frozenset[str]:
    return frozenset(module for module, _ in modules())


def _is_module(name: str) -> bool:
    return name in _names()


def part_of(module: str) -> str | None:
    return next((part for part in MAY_IMPORT if module == part or module.startswith(f"{part}.")), None)


def within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_run_downwards(part: str) -> None:
    found = [(module, path) for module, path in modules() if part_of(module) == part]
    assert found
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for module, path in found
        for name, line in imports(module, path)
        if within(name, "fuser") and not any(within(name, allowed) for allowed in {part, *MAY_IMPORT[part]})
    ]
    assert wrong == []


def test_there_is_no_circle_of_modules() -> None:
    # Imports in functions and for type checkers count: they hide a circle, and do not open it.
    graph = nx.DiGraph(
        (module, name) for module, path in modules() for name, _ in imports(module, path) if _is_module(name)
    )
    assert graph.number_of_edges() > 500
    assert [sorted(circle) for circle in nx.strongly_connected_components(graph) if len(circle) > 1] == []
    assert list(nx.selfloop_edges(graph)) == []


def test_every_package_is_installed() -> None:
    # Python 3.10 has no reader of TOML.
    listing = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert listing is not None
    listed = re.findall(r'"([\w.]+)"', listing[1])
    there = sorted(module for module, path in modules() if path.stem == "__init__")
    assert sorted(listed) == there
