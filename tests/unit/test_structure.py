"""Data flows one way: a module imports only what lies before it."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "megatron_anymal"

# From the first to the last; modules of one row may import each other.
ORDER = [
    ("child_processes", "config", "log_filters", "step_lines", "telemetry", "safetensors_io", "hf_weights"),
    ("backend", "cpu_shim"),
    ("parallel",),
    ("modalities",),
    ("data",),
    ("model",),
    ("hf",),
    ("checkpoint", "resilience"),
    ("train",),
    ("dry_run",),
    ("generation",),
    ("launcher",),
    ("nemo",),
    ("cli",),
]
RANK = {name: rank for rank, row in enumerate(ORDER) for name in row}
ALLOWED = {
    ("config.validation", "resilience"),
    ("launcher.preflight.node_checks", "cli"),
}


def imports_of(path: Path) -> set[str]:
    """Top-level names inside the package that a file imports, in functions too."""
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
            wrong += [
                f"{module} imports {name}"
                for name in imports_of(path)
                if RANK[name] > RANK[top] and (module, name) not in ALLOWED
            ]
    assert not wrong


def test_the_shim_is_imported_in_one_place() -> None:
    users = {p.name for p in PACKAGE.rglob("*.py") if "cpu_shim" in imports_of(p)}
    assert users == {"parallel.py"}
