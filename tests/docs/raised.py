"""Exceptions that a function raises, as far as the source shows, read with `ast`.

Raise statements count if they are in the body, or in functions, methods and constructors of the package that it calls,
minus those that an enclosing `try` or `suppress` catches; from other modules, only the package's own exceptions count.
Methods are followed if called on `self`, `cls` or the name of their class.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

from docstring_rules import Function, modules, tree


@cache
def ancestors() -> dict[str, set[str]]:
    """Exception class -> its base classes, itself included: those of the package and Python's own."""
    bases = {
        node.name: [ast.unparse(base).rpartition(".")[2] for base in node.bases]
        for module in modules()
        for node in tree(module).body
        if isinstance(node, ast.ClassDef)
    }
    builtin_ancestors = {
        name: {x.__name__ for x in value.__mro__}
        for name, value in vars(builtins).items()
        if isinstance(value, type) and issubclass(value, BaseException)
    }

    def chain(name: str) -> set[str]:
        return builtin_ancestors.get(name) or {name}.union(*(chain(base) for base in bases.get(name, ())))

    return builtin_ancestors | {name: chain(name) for name in bases if "BaseException" in chain(name)}


@dataclass(frozen=True)
class _Scope:
    """Where a statement stands."""

    # Class of the method; "" in a function.
    owner: str
    # Functions on the call path to it.
    calls: frozenset[str]
    # Name of a caught exception -> its types, and those of the handler around the statement.
    caught: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    handled: tuple[str, ...] = ()


class Raised:
    """What the functions of one module raise."""

    def __init__(self, module: str) -> None:
        self._module = module
        # Name -> what it is imported as, with its module, from the package.
        self._imports = {
            name.asname or name.name: f"{node.module}.{name.name}"
            for node in ast.walk(tree(module))
            if isinstance(node, ast.ImportFrom)
            for name in node.names
        }
        self.functions: dict[str, Function] = {}
        # Names of tuples of exceptions.
        self._groups: dict[str, ast.Tuple] = {}
        for node in tree(module).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
                self._groups[ast.unparse(node.targets[0])] = node.value
            for x in node.body if isinstance(node, ast.ClassDef) else [node]:
                if isinstance(x, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
                    self.functions[f"{owner}{x.name}"] = x

    @staticmethod
    @cache
    def of(module: str) -> Raised:
        """The functions of a module, which is read once."""
        return Raised(module)

    def by(self, name: str, calls: frozenset[str] = frozenset()) -> set[str]:
        """Names of the exceptions that a function, or a method as "Class.method", lets out."""
        call = f"{self._module}.{name}"
        if call in calls:
            return set()
        return self._in(self.functions[name].body, _Scope(name.rpartition(".")[0], calls | {call}))

    def _find(self, name: str) -> tuple[Raised, str] | None:
        """Module and name of the function, method or constructor that is called as `name` here."""
        for called in (name, f"{name}.__init__"):
            if called in self.functions:
                return self, called
        first, _, rest = name.partition(".")
        full = self._imports.get(first, "")
        if full in modules():
            return Raised.of(full)._find(rest)
        module, _, imported = full.rpartition(".")
        return Raised.of(module)._find(f"{imported}.{rest}".rstrip(".")) if module in modules() else None

    def _in(self, nodes: Iterable[ast.AST], scope: _Scope) -> set[str]:
        return set().union(*(self._by_statement(node, scope) for node in nodes))

    def _by_statement(self, node: ast.AST, scope: _Scope) -> set[str]:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda() | ast.ClassDef():
                return set()
            case ast.Try():
                return self._by_try(node, scope)
            case ast.With():
                calls = [x.context_expr for x in node.items if isinstance(x.context_expr, ast.Call)]
                hidden = {ast.unparse(a) for c in calls if ast.unparse(c.func).endswith("suppress") for a in c.args}
                return _less(self._in(node.items, scope) | self._in(node.body, scope), hidden)
            case ast.If(test=ast.Call(func=ast.Name("isinstance"), args=[ast.Name(x), kind])) if x in scope.caught:
                narrowed = dataclasses.replace(scope, handled=self._types(kind))
                return self._in(node.body, narrowed) | self._in(node.orelse, scope)
        errors = self._in(ast.iter_child_nodes(node), scope)
        if isinstance(node, ast.Raise):
            errors |= self._raised(node.exc, scope)
        if isinstance(node, ast.Call):
            errors |= self._by_call(re.sub(r"^(?:self|cls)\.", f"{scope.owner}.", ast.unparse(node.func)), scope)
        return errors

    def _by_call(self, name: str, scope: _Scope) -> set[str]:
        if (callee := self._find(name)) is None:
            return set()
        source, called = callee
        errors = source.by(called, scope.calls)
        return errors if source is self else {error for error in errors if not hasattr(builtins, error)}

    def _by_try(self, node: ast.Try, scope: _Scope) -> set[str]:
        errors = self._in(node.body, scope)
        for handler in node.handlers:
            types = self._types(handler.type)
            names = {**scope.caught, **({handler.name: types} if handler.name else {})}
            within = self._in(handler.body, dataclasses.replace(scope, caught=names, handled=types))
            errors = _less(errors, set(types)) | within
        return errors | self._in([*node.orelse, *node.finalbody], scope)

    def _raised(self, exc: ast.expr | None, scope: _Scope) -> set[str]:
        """Types that `raise exc` raises, if known; if a function makes the exception, its annotated return type."""
        if exc is None:
            return set(scope.handled) & ancestors().keys()
        name = ast.unparse(exc.func if isinstance(exc, ast.Call) else exc).rpartition(".")[2]
        if name in scope.caught:
            return set(scope.caught[name]) & ancestors().keys()
        maker = self.functions.get(f"{scope.owner}.{name}", self.functions.get(name))
        if isinstance(exc, ast.Call) and maker and maker.returns:
            name = ast.unparse(maker.returns)
        return {name} & ancestors().keys()

    def _types(self, node: ast.expr | None) -> tuple[str, ...]:
        """Names of the exceptions in an `except` clause or an isinstance."""
        if isinstance(node, ast.Tuple):
            return tuple(name for x in node.elts for name in self._types(x))
        if isinstance(node, ast.Starred):
            return self._types(node.value)
        name = ast.unparse(node) if node else "BaseException"
        return self._types(self._groups[name]) if name in self._groups else (name.rpartition(".")[2],)


def _less(errors: set[str], caught: set[str]) -> set[str]:
    return {name for name in errors if not ancestors()[name] & caught}
