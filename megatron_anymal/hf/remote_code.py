"""The code of an exported folder: this package's own files, so that an export computes what was trained.

From the three files that transformers asks for, imports inside the package are followed to all that they need. Each
file goes into the folder under one flat name (`anymal_modalities_image.py` for `megatron_anymal.modalities.image`) with
these imports made relative. transformers copies the files that a root file names, in version 4 those alone, so each
root names all of them.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
# What a folder must do without: its users have none of it.
_FORBIDDEN = ("megatron", "nemo", "lightning", "hydra", "omegaconf", "webdataset")


@dataclass(frozen=True)
class _Module:
    """A file to copy."""

    # Its name in the folder, without .py.
    name: str
    # What messages and its header call it.
    origin: str
    source: str
    tree: ast.Module

    @property
    def imports(self) -> Iterator[ast.ImportFrom]:
        """Imports from this package."""
        for node in _reached(self.tree):
            if isinstance(node, ast.ImportFrom) and _top(node.module) == _PACKAGE:
                yield node


def write_code(folder: Path, plugins: Sequence[Path] = ()) -> list[str]:
    """Write the code of an exported folder.

    Args:
        folder: exists already.
        plugins: files of `model.plugins`; they register their modalities and encoders there, too.

    Returns:
        Names of the written files.

    Raises:
        ConfigError: a plug-in that is missing, that imports what an export must do without, or two of one name.
    """
    files = _code(plugins)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return sorted(files)


def _code(plugins: Sequence[Path] = ()) -> dict[str, str]:
    """File name -> text."""
    added = [_plugin(Path(path).expanduser()) for path in plugins]
    if len({module.name for module in added}) < len(added):
        raise ConfigError(f"model.plugins: two of {[str(path) for path in plugins]} have one name. Rename a file.")
    files = {}
    for name in _ROOTS:
        root = _read(f"{_PACKAGE}.hf.{name}")
        # Plug-ins bring modalities, which the configuration alone does not build.
        needed = _closure([root] if name == "configuration_anymal" else [root, *added])
        del needed[name]
        files.update({module.name: _text(module) for module in needed.values() if module.name not in _ROOTS})
        files[name] = _text(root) + _naming(list(needed))
    return {f"{name}.py": text for name, text in files.items()}


def foreign_code(folder: Path) -> list[str]:
    """What an exported folder would have transformers run that is not exactly this package's code, without plug-ins:
    its Python files, and the keys `auto_map` in its settings, which may name other repositories."""
    own = _code()
    found = []
    for path in sorted(folder.rglob("*.py")):
        name = str(path.relative_to(folder))
        if name not in own or path.read_bytes() != own[name].encode():
            found.append(name)
    maps = {"config.json": CONFIG_AUTO_MAP, "processor_config.json": PROCESSOR_AUTO_MAP}
    for path in sorted(folder.glob("*.json")):
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            # transformers cannot read it either.
            continue
        if isinstance(settings, dict) and settings.get("auto_map") not in (None, maps.get(path.name)):
            found.append(f"the auto_map in {path.name}")
    return found


def _read(dotted: str) -> _Module:
    """A module of this package."""
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
    """The modules and all that they need, by name; each comes after what it needs."""
    found: dict[str, _Module] = {}
    seen = set()

    def visit(module: _Module) -> None:
        if module.name in seen:
            return
        seen.add(module.name)
        _check(module)
        for node in module.imports:
            visit(_read(str(node.module)))
        found[module.name] = module

    for module in modules:
        visit(module)
    return found


def _check(module: _Module) -> None:
    """Refuse imports that cannot work in an exported folder."""
    for node in _reached(module.tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            if any(_top(name) == _PACKAGE for name in names):
                raise ConfigError(
                    f"{module.origin}, line {node.lineno}: an export can hold `from {_PACKAGE}... import NAME` alone."
                )
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ConfigError(f"{module.origin}, line {node.lineno}: an export cannot hold a relative import.")
            names = [str(node.module)]
            if _top(node.module) == _PACKAGE:
                _check_names(module, node)
        for name in names:
            if _top(name) in _FORBIDDEN:
                raise ConfigError(
                    f"{module.origin}, line {node.lineno}, imports {name}, which an exported model must do without."
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
    """All nodes but what is for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if not _for_checkers(node):
            yield node
            yield from _reached(node)


def _for_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _top(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _text(module: _Module) -> str:
    """The file as it goes into the folder."""
    lines = module.source.splitlines()
    for node in module.imports:
        flat = _read(str(node.module)).name
        place = node.lineno - 1
        lines[place] = lines[place].replace(f"from {node.module} import", f"from .{flat} import", 1)
    for block in filter(_for_checkers, ast.walk(module.tree)):
        assert isinstance(block, ast.If) and block.end_lineno is not None
        lines[block.lineno - 1 : block.end_lineno] = [""] * (block.end_lineno - block.lineno + 1)
    header = [
        f"# Of {_PACKAGE} {megatron_anymal.__version__}: {module.origin}, copied by the export of this model. Only its",
        "# imports differ.",
    ]
    return "\n".join([*header, *lines]) + "\n"


def _naming(files: Sequence[str]) -> str:
    """Lines that name files, in the order of their imports."""
    lines = [f"from .{name} import __name__ as _  # noqa: E402, F401" for name in files]
    return "\n".join(["", "# All that this file needs: transformers copies what is named here.", *lines]) + "\n"
