"""The code of an exported folder: copies of this package's own files, so that an export computes what was trained.

Starting from the three files that transformers loads, imports inside the package are followed to everything they need.
Each file is written to the folder under a flat name (`anymal_modalities_image.py` for
`megatron_anymal.modalities.image`), with these imports made relative. transformers copies the files that a root file
imports, in version 4 only those named directly, so each root names all of them.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import megatron_anymal
from megatron_anymal.config import ConfigError

ARCHITECTURE = "AnyMALForConditionalGeneration"
CONFIG_AUTO_MAP = {
    "AutoConfig": "configuration_anymal.AnyMALConfig",
    "AutoModelForCausalLM": f"modeling_anymal.{ARCHITECTURE}",
    "AutoModelForImageTextToText": f"modeling_anymal.{ARCHITECTURE}",
}
PROCESSOR_AUTO_MAP = {"AutoProcessor": "processing_anymal.AnyMALProcessor"}

_PACKAGE = "megatron_anymal"
_ROOTS = ("configuration_anymal", "modeling_anymal", "processing_anymal")
# Packages that exported code must not import, because users of an export do not have them.
_FORBIDDEN = ("megatron", "nemo", "lightning", "hydra", "omegaconf", "webdataset")


@dataclass(frozen=True)
class _Module:
    """A file to copy."""

    # Its name in the folder, without .py.
    name: str
    # Its name in error messages and in the file's header.
    origin: str
    source: str
    tree: ast.Module

    @cached_property
    def imports(self) -> list[ast.Import | ast.ImportFrom]:
        """All imports that run."""
        return [node for node in _reached(self.tree) if isinstance(node, (ast.Import, ast.ImportFrom))]

    @cached_property
    def needs(self) -> list[ast.ImportFrom]:
        """Imports from this package."""
        return [node for node in self.imports if isinstance(node, ast.ImportFrom) and _top(node.module) == _PACKAGE]


def write_code(folder: Path, plugins: Sequence[Path] = ()) -> list[str]:
    """Write the code of an exported folder.

    Args:
        folder: an existing folder.
        plugins: files of `model.plugins`; in the export, too, they register their modalities and encoders.

    Returns:
        Names of the written files.

    Raises:
        ConfigError: a plug-in is missing or imports something that an export must not, or two have the same name.
    """
    files = _code(plugins)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return sorted(files)


def _code(plugins: Sequence[Path] = ()) -> dict[str, str]:
    """File name -> text."""
    added = [_plugin(Path(path).expanduser()) for path in plugins]
    if len({module.name for module in added}) < len(added):
        raise ConfigError(f"model.plugins: two of {[str(path) for path in plugins]} have the same name. Rename a file.")
    files: dict[str, str] = {}
    for name in _ROOTS:
        root = _read(f"{_PACKAGE}.hf.{name}")
        # Plug-ins provide modalities, which the configuration file does not build.
        needed = _closure([root] if name == "configuration_anymal" else [root, *added])
        del needed[name]
        # The roots share most files.
        new = [module for module in needed.values() if module.name not in (*_ROOTS, *files)]
        files.update({module.name: _text(module) for module in new})
        files[name] = _text(root) + _naming(list(needed))
    return {f"{name}.py": text for name, text in files.items()}


def foreign_code(folder: Path) -> list[str]:
    """List the code that transformers would run from an exported folder and that differs from this package's.

    These are Python files, including those of plug-ins, and the `auto_map` keys of its settings, which may name other
    repositories.
    """
    own = _code()
    foreign = []
    for path in sorted(folder.rglob("*.py")):
        name = str(path.relative_to(folder))
        if name not in own or path.read_bytes() != own[name].encode():
            foreign.append(name)
    maps = {"config.json": CONFIG_AUTO_MAP, "processor_config.json": PROCESSOR_AUTO_MAP}
    for path in sorted(folder.glob("*.json")):
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            # transformers cannot parse it either.
            continue
        if isinstance(settings, dict) and settings.get("auto_map") not in (None, maps.get(path.name)):
            foreign.append(f"the auto_map in {path.name}")
    return foreign


@cache
def _read(dotted: str) -> _Module:
    """Read a module of this package. Many others import it; it is parsed once."""
    file = _file_of(dotted)
    assert file is not None, f"there is no module {dotted}"
    name = dotted.removeprefix(f"{_PACKAGE}.hf.")
    if name not in _ROOTS:
        name = "anymal_" + dotted.removeprefix(f"{_PACKAGE}.").replace(".", "_")
    source = file.read_text(encoding="utf-8")
    return _Module(name, dotted, source, ast.parse(source))


def _file_of(dotted: str) -> Path | None:
    path = Path(megatron_anymal.__file__).parent.joinpath(*dotted.split(".")[1:])
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _plugin(path: Path) -> _Module:
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        raise ConfigError(f"model.plugins: {path} is not a Python file that can be copied: {error}") from error
    name = "anymal_plugin_" + re.sub(r"\W", "_", path.stem)
    return _Module(name, f"the plug-in {path.name}", source, tree)


def _closure(modules: Sequence[_Module]) -> dict[str, _Module]:
    """The modules and all their dependencies, by name; each module comes after its dependencies."""
    ordered: dict[str, _Module] = {}
    seen = set()

    def visit(module: _Module) -> None:
        if module.name in seen:
            return
        seen.add(module.name)
        _check(module)
        for node in module.needs:
            visit(_read(str(node.module)))
        ordered[module.name] = module

    for module in modules:
        visit(module)
    return ordered


def _check(module: _Module) -> None:
    """Reject imports that cannot work in an exported folder."""
    for node in module.imports:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            if any(_top(name) == _PACKAGE for name in names):
                raise ConfigError(
                    f"{module.origin}, line {node.lineno}: an export can only hold `from {_PACKAGE}... import NAME`."
                )
        else:
            if node.level:
                raise ConfigError(f"{module.origin}, line {node.lineno}: an export cannot hold a relative import.")
            names = [str(node.module)]
            if _top(node.module) == _PACKAGE:
                _check_names(module, node)
        for name in names:
            if _top(name) in _FORBIDDEN:
                raise ConfigError(
                    f"{module.origin}, line {node.lineno}, imports {name}, which an exported model must not depend on."
                )


def _check_names(module: _Module, node: ast.ImportFrom) -> None:
    if _file_of(str(node.module)) is None:
        raise ConfigError(f"{module.origin}, line {node.lineno}: there is no module {node.module}.")
    for alias in node.names:
        if _file_of(f"{node.module}.{alias.name}") is not None:
            raise ConfigError(
                f"{module.origin}, line {node.lineno}, imports the module {node.module}.{alias.name}. Import names "
                "from it instead, so that it can be copied into an export."
            )


def _reached(tree: ast.AST) -> Iterator[Any]:
    """Yield all nodes except the blocks for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if not _for_checkers(node):
            yield node
            yield from _reached(node)


def _for_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _top(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _text(module: _Module) -> str:
    """The text of the file in the folder."""
    lines = module.source.splitlines()
    for node in module.needs:
        flat = _read(str(node.module)).name
        index = node.lineno - 1
        lines[index] = lines[index].replace(f"from {node.module} import", f"from .{flat} import", 1)
    for block in filter(_for_checkers, ast.walk(module.tree)):
        assert isinstance(block, ast.If) and block.end_lineno is not None
        lines[block.lineno - 1 : block.end_lineno] = [""] * (block.end_lineno - block.lineno + 1)
    header = [
        f"# From {_PACKAGE} {megatron_anymal.__version__}: {module.origin}, copied when this model was exported. Only",
        "# its imports differ.",
    ]
    return "\n".join([*header, *lines]) + "\n"


def _naming(files: Sequence[str]) -> str:
    """Import lines that name files, dependencies first."""
    lines = [f"from .{name} import __name__ as _  # noqa: E402, F401" for name in files]
    return "\n".join(["", "# All files that this one needs: transformers copies those named here.", *lines]) + "\n"
