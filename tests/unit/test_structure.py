"""Imports follow one direction: a module imports only from its own layer and the layers before it."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "megatron_anymal"

# First layer to last; modules of one row may import each other.
ORDER = [
    ("child_processes", "config", "log_filters", "step_lines", "telemetry", "safetensors_io", "hf_weights"),
    ("backend", "cpu_shim", "environment"),
    ("parallel",),
    ("modalities",),
    ("data",),
    ("model",),
    ("hf",),
    ("resilience",),
    ("checkpoint",),
    ("train",),
    ("dry_run",),
    ("generation",),
    ("launcher",),
    ("nemo",),
    ("cli",),
]
RANK = {name: rank for rank, row in enumerate(ORDER) for name in row}


def imports_of(path: Path) -> set[str]:
    """Top-level modules of the package that a file imports, including imports inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("megatron_anymal.")}
    return found & RANK.keys()


def test_every_module_has_its_place() -> None:
    present = {p.stem for p in PACKAGE.glob("*.py")} | {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert present - {"__init__", "__main__"} == RANK.keys()


def test_imports_go_backwards_only() -> None:
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        top = module.split(".")[0]
        if top in RANK:
            wrong += [f"{module} imports {name}" for name in imports_of(path) if RANK[name] > RANK[top]]
    assert not wrong


def test_the_shim_is_imported_in_one_place() -> None:
    users = {p.name for p in PACKAGE.rglob("*.py") if "cpu_shim" in imports_of(p)}
    assert users == {"parallel.py"}


def test_no_circle_between_folders() -> None:
    """Folders import each other in at most one direction, including nested folders and their parents."""
    edges = set()
    for path in PACKAGE.rglob("*.py"):
        folder = path.parent.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("megatron_anymal."):
                parts = node.module.split(".")[1:]
                target = PACKAGE.joinpath(*parts)
                other = (target if target.is_dir() else target.parent).relative_to(PACKAGE).as_posix()
                if "." not in (folder, other) and folder != other:
                    edges.add((folder, other))
    assert not [f"{a} <-> {b}" for a, b in edges if (b, a) in edges and a < b]


def test_functions_fit_a_screen() -> None:
    long = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > 60:
                    long.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}: {lines} lines")
    assert not long
