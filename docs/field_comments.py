"""Griffe extension: the comment above a field or constant is its documentation on the API pages."""

from __future__ import annotations

import ast
from typing import Any

import griffe


class FieldComments(griffe.Extension):
    """Gives attributes without a docstring the comment above them; not those that methods assign to `self`."""

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Read the comment of an attribute that griffe has just found."""
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if attr.docstring is not None or not isinstance(targets[0], ast.Name):
            return
        lines = attr.lines_collection[attr.filepath]
        first = last = node.lineno - 1
        while first and lines[first - 1].strip().startswith("#"):
            first -= 1
        text = "\n".join(line.strip().removeprefix("#").removeprefix(" ") for line in lines[first:last])
        if text:
            attr.docstring = griffe.Docstring(text, lineno=first + 1, endlineno=last, parent=attr)
