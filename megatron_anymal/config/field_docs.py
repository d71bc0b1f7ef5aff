"""Documentation of configuration fields: the string literal below each one."""

from __future__ import annotations

import ast
import inspect
import sys
from dataclasses import fields, is_dataclass
from functools import cache


@cache
def _docs_of_module(module: str) -> dict[str, dict[str, str]]:
    """Class -> field -> its documentation in one line; empty if the source is not there."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except OSError:
        return {}
    return {node.name: _docs_of_class(node) for node in tree.body if isinstance(node, ast.ClassDef)}


def _docs_of_class(node: ast.ClassDef) -> dict[str, str]:
    docs = {}
    for statement, following in zip(node.body, node.body[1:]):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            value = following.value if isinstance(following, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                docs[statement.target.id] = " ".join(value.value.split())
    return docs


def field_docs(section: type) -> dict[str, str]:
    """Field -> documentation of a configuration dataclass; fields without one are missing."""
    return _docs_of_module(section.__module__).get(section.__name__, {})


def add_field_docs(module: str) -> None:
    """Append the fields of every dataclass of a module to the class's docstring, for `help()`."""
    for section in vars(sys.modules[module]).values():
        if isinstance(section, type) and section.__module__ == module and is_dataclass(section) and section.__doc__:
            docs = field_docs(section)
            lines = [f"    {field.name}: {docs[field.name]}" for field in fields(section) if field.name in docs]
            section.__doc__ = "\n".join([section.__doc__.rstrip(), "", "Fields:", *lines, ""])
