"""Exceptions that a function raises, as far as the source of its module shows, read with `ast`.

Counted are raise statements in the body and in the private functions and methods of the same module that it calls,
less those that an enclosing `try` or `suppress` catches.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterable
from functools import cache

from docstring_rules import Function, modules, tree


@cache
def ancestors() -> dict[str, set[str]]:
    """Exception class -> its base classes, itself included: those of the package and Python's own."""
    bases = {
        node.name: [ast.unparse(base).rpartition(".")[2] for base in node.bases]
        for module in modules()
        for node in ast.walk(tree(module))
        if isinstance(node, ast.ClassDef)
    }
    found = {
        name: {x.__name__ for x in value.__mro__}
        for name, value in vars(builtins).items()
        if isinstance(value, type) and issubclass(value, BaseException)
    }

    def chain(name: str) -> set[str]:
        return found.get(name) or {name}.union(*(chain(base) for base in bases.get(name, ())))

    return found | {name: chain(name) for name in bases if "Exception" in chain(name)}


class Raised:
    """What the functions of one module raise."""

    def __init__(self, module: str) -> None:
        self.functions: dict[str, Function] = {}
        # Names of tuples of exceptions.
        self.groups: dict[str, ast.Tuple] = {}
        for node in tree(module).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
                self.groups[ast.unparse(node.targets[0])] = node.value
            for x in node.body if isinstance(node, ast.ClassDef) else [node]:
                if isinstance(x, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
                    self.functions[f"{owner}{x.name}"] = x

    @staticmethod
    @cache
    def of(module: str) -> Raised:
        """The functions of a module, which is read once."""
        return Raised(module)

    def by(self, name: str, seen: frozenset[str] = frozenset()) -> set[str]:
        """Names of the exceptions that a function, or a method as "Class.method", lets out."""
        if name in seen:
            return set()
        owner = name.rpartition(".")[0]
        return self._of(self.functions[name].body, owner, {}, (), seen | {name})

    def _of(
        self, nodes: Iterable[ast.AST], owner: str, caught: dict[str, set[str]], current: tuple[str, ...], seen: frozenset[str]
    ) -> set[str]:
        found: set[str] = set()
        for node in nodes:
            match node:
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda() | ast.ClassDef():
                    continue
                case ast.Try():
                    inside = self._of(node.body, owner, caught, current, seen)
                    for handler in node.handlers:
                        types = self._types(handler.type)
                        inside = {x for x in inside if not ancestors()[x] & set(types)}
                        names = caught | ({handler.name: set(types)} if handler.name else {})
                        found |= self._of(handler.body, owner, names, types, seen)
                    found |= inside | self._of([*node.orelse, *node.finalbody], owner, caught, current, seen)
                case ast.With():
                    inside = self._of([*node.items, *node.body], owner, caught, current, seen)
                    calls = [x.context_expr for x in node.items if isinstance(x.context_expr, ast.Call)]
                    hidden = {ast.unparse(a) for c in calls if ast.unparse(c.func).endswith("suppress") for a in c.args}
                    found |= {x for x in inside if not ancestors()[x] & hidden}
                case ast.If(test=ast.Call(func=ast.Name("isinstance"), args=[ast.Name(name), kind])) if name in caught:
                    found |= self._of(node.body, owner, caught, self._types(kind), seen)
                    found |= self._of(node.orelse, owner, caught, current, seen)
                case ast.Raise():
                    found |= self._raised(node.exc, owner, caught, current)
                    found |= self._of(ast.iter_child_nodes(node), owner, caught, current, seen)
                case _:
                    if isinstance(node, ast.Call):
                        found |= self._called(node, owner, seen)
                    found |= self._of(ast.iter_child_nodes(node), owner, caught, current, seen)
        return found

    def _raised(self, exc: ast.expr | None, owner: str, caught: dict[str, set[str]], current: tuple[str, ...]) -> set[str]:
        if exc is None:
            return set(current) & ancestors().keys()
        function = exc.func if isinstance(exc, ast.Call) else exc
        name = ast.unparse(function).rpartition(".")[2]
        if name in ancestors():
            return {name}
        if name in caught:
            return caught[name] & ancestors().keys()
        maker = self.functions.get(name) or self.functions.get(f"{owner}.{name}")
        returned = ast.unparse(maker.returns) if isinstance(exc, ast.Call) and maker and maker.returns else ""
        return {returned} & ancestors().keys()

    def _called(self, call: ast.Call, owner: str, seen: frozenset[str]) -> set[str]:
        name = ast.unparse(call.func)
        name = name.replace("self.", f"{owner}.").replace("cls.", f"{owner}.")
        private = name.rpartition(".")[2].startswith("_")
        return self.by(name, seen) if private and name in self.functions else set()

    def _types(self, node: ast.expr | None) -> tuple[str, ...]:
        """Names of the exceptions that a handler names."""
        if isinstance(node, ast.Tuple):
            return tuple(name for x in node.elts for name in self._types(x))
        if isinstance(node, ast.Starred):
            return self._types(node.value)
        name = ast.unparse(node) if node else "BaseException"
        return self._types(self.groups[name]) if name in self.groups else (name.rpartition(".")[2],)
