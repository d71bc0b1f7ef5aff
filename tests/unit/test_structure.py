"""Imports follow one direction: a module imports only from its own layer and the layers before it. Functions are short,
and take the section of the configuration that they read."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_anymal"

# First layer to last; modules of one row may import each other.
ORDER = [
    (
        "config",
        "dependencies",
        "log_filters",
        "processes",
        "step_lines",
        "telemetry",
        "safetensors_io",
        "hf_weights",
    ),
    ("backend", "cpu_shim", "environment", "lean_imports", "object_storage"),
    ("parallel",),
    ("modalities",),
    ("data",),
    ("model",),
    ("hf",),
    ("resilience",),
    ("checkpoint",),
    ("peer_memory",),
    ("train",),
    ("dry_run",),
    ("generation",),
    ("integrity",),
    ("evaluation",),
    ("harnesses",),
    ("judgement",),
    ("serving",),
    ("synthesis",),
    ("launcher",),
    ("planning",),
    ("nemo",),
    ("cli",),
]
# The files outside any package. A new module belongs into a package.
ROOT_FILES = {
    "__init__",
    "__main__",
    "backend",
    "cpu_shim",
    "environment",
    "hf_weights",
    "log_filters",
    "parallel",
    "safetensors_io",
    "step_lines",
    "telemetry",
}
RANK = {name: rank for rank, row in enumerate(ORDER) for name in row}


def imports_of(path: Path) -> set[str]:
    """Top-level modules of the package that a file imports, including imports inside functions."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        modules |= {n.split(".")[1] for n in names if n.startswith("megatron_anymal.")}
    return modules & RANK.keys()


def test_every_module_has_its_place() -> None:
    present = {p.stem for p in PACKAGE.glob("*.py")} | {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert present - {"__init__", "__main__"} == RANK.keys()


def test_only_these_files_are_outside_a_package() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == ROOT_FILES


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


def test_no_circle_between_files() -> None:
    """Imports inside functions and imports for annotations count too."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    needed = {}
    for file in files:
        names = set()
        for node in ast.walk(ast.parse(ROOT.joinpath(*file.split(".")).with_suffix(".py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        needed[file] = names & files
    TopologicalSorter(needed).prepare()


def test_functions_fit_a_screen() -> None:
    long = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > 60:
                    long.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}: {lines} lines")
    assert not long


# Modules, classes and functions that take or hold a whole RunConfig, and why. Everything else takes the sections or
# values that it reads.
WHOLE_RUN = {
    "megatron_anymal.config.validation": "checks sections against each other",
    "megatron_anymal.config.layout_validation": "checks sections against each other",
    "megatron_anymal.config.compose.Composed": "what a command line composes",
    "megatron_anymal.parallel.initialize": "checks the configuration before it joins the job",
    "megatron_anymal.train.build.check_run": "checks a run",
    "megatron_anymal.train.build.build": "builds a run",
    "megatron_anymal.train.build.batch_layout": "the job, the model, the precision and the number of replicas decide",
    "megatron_anymal.train.build.build_data": "reads the data, the model, the job and the number of replicas",
    "megatron_anymal.train.build.TrainState": "a run in memory",
    "megatron_anymal.train.encode_ahead": "encodes a run's data in several processes",
    "megatron_anymal.dry_run.simulate.examine": "builds a run without its weights",
    "megatron_anymal.dry_run.simulate.DryRun": "a run that was examined",
    "megatron_anymal.dry_run.report.print_dry_run": "examines a run",
    "megatron_anymal.dry_run.report._job": "prints the sizes of the whole job",
    "megatron_anymal.dry_run.checkpoint_size.bytes_needed": "examines a run",
    "megatron_anymal.generation.checkpoint_generator.NativeGenerator.of_checkpoint": "builds a run's model and inputs",
    "megatron_anymal.launcher.preflight.command.Preflight": "checks a run on its nodes",
    "megatron_anymal.planning.layouts": "compares layouts of a run",
    "megatron_anymal.cli.layout_search._write": "writes a run's configuration",
    "megatron_anymal.nemo.entry.run": "trains a run",
    "megatron_anymal.nemo.entry._run": "trains a run",
    "megatron_anymal.nemo.model": "NeMo's model is made from a run's configuration",
    "megatron_anymal.nemo.archive": "stores a run's configuration",
    "megatron_anymal.cli.inspection": "the run whose data are inspected",
    "megatron_anymal.cli.inspection_page": "the run whose data are shown",
    "checkpoint_tools.exporting.export._write": "part of the export",
    "checkpoint_tools.verifying.comparison.verify": "builds a run's model",
    "checkpoint_tools.verifying.native_logits": "builds a run's model on one process",
}


def takers_of_the_whole(path: Path) -> Iterator[str]:
    """Full names of a file's functions with a parameter, and of its classes with a field, annotated as RunConfig."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)

    def search(node: ast.AST, name: str) -> Iterator[str]:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            name = f"{name}.{node.name}"
            arguments = node.args
            named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            hints = [argument.annotation for argument in (*named, arguments.vararg, arguments.kwarg) if argument]
        elif isinstance(node, ast.ClassDef):
            name = f"{name}.{node.name}"
            hints = [line.annotation for line in node.body if isinstance(line, ast.AnnAssign)]
        else:
            hints = []
        if any("RunConfig" in ast.unparse(hint) for hint in hints if hint):
            yield name
        for child in ast.iter_child_nodes(node):
            yield from search(child, name)

    yield from search(ast.parse(path.read_text()), module)


def test_builders_take_the_section_they_read() -> None:
    folders = (PACKAGE, ROOT / "checkpoint_tools", ROOT / "examples")
    takers = {name for folder in folders for path in folder.rglob("*.py") for name in takers_of_the_whole(path)}
    reasons = {name: {entry for entry in WHOLE_RUN if f"{name}.".startswith(f"{entry}.")} for name in takers}
    assert not sorted(name for name, entries in reasons.items() if not entries)
    # No entry remains after its last function.
    assert set().union(*reasons.values()) == WHOLE_RUN.keys()


def test_classes_have_names_of_their_own() -> None:
    """One name for one thing: a reader who searches for a class finds one."""
    folders = (PACKAGE, ROOT / "checkpoint_tools", ROOT / "examples", ROOT / "benchmarks")
    trees = (ast.parse(path.read_text()) for folder in folders for path in folder.rglob("*.py"))
    names = Counter(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert not [name for name, count in names.items() if count > 1]


def test_test_files_have_names_of_their_own() -> None:
    """pytest imports them by their names: two files of the same name are an error, but only if both are collected."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, count in names.items() if count > 1]
