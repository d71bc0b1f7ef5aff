"""Packages whose own code runs only when something is asked for that is not listed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Deferral:
    """The parts of a package that do not need the package's own code."""

    # Submodules, with everything below them.
    submodules: tuple[str, ...] = ()
    # Attribute of the package -> submodules to import in this order; the last one defines it.
    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # Attribute of the package -> how to create it.
    values: Mapping[str, Callable[[], Any]] = field(default_factory=dict)


# Attributes that the import system and introspection look for; a package that lacks them has not been asked for more.
_LOOKED_FOR = {"__path__", "__file__", "__cached__", "__spec__", "__loader__", "__wrapped__", "__warningregistry__"}


class DeferredModule(ModuleType):
    """A package whose code runs when something is asked for that its deferral does not list.

    It has no attributes of its own, since they would hide the package's.

    Raises:
        AttributeError: the package has no such attribute.
    """

    def __getattr__(self, name: str) -> Any:
        pending = _pending.get(self.__name__)
        if pending is None or name in _LOOKED_FOR:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if name in pending.deferral.values:
            value = pending.deferral.values[name]()
        elif name in pending.deferral.attributes:
            value = _part(self, name, pending.deferral.attributes[name])
        else:
            run(self.__name__)
            return getattr(self, name)
        setattr(self, name, value)
        return value


@dataclass
class _Pending:
    """A deferred package that has been imported."""

    deferral: Deferral
    # Runs the package's own code.
    run: Callable[[], None]
    # To be called afterwards.
    actions: list[Callable[[], None]] = field(default_factory=list)


# By the name of the package.
_pending: dict[str, _Pending] = {}


def defer(package: DeferredModule, deferral: Deferral, run: Callable[[], None]) -> None:
    """Set what a package consists of until its own code is run, and how to run it."""
    _pending[package.__name__] = _Pending(deferral, run)


def run(package: str) -> None:
    """Import a package and, if it is deferred, run its own code."""
    importlib.import_module(package)
    pending = _pending.pop(package, None)
    if pending is not None:
        pending.run()
        for action in pending.actions:
            action()


def run_for(fullname: str) -> None:
    """Run the deferred packages around a submodule that needs them."""
    for name, pending in list(_pending.items()):
        listed = any(fullname == one or fullname.startswith(f"{one}.") for one in pending.deferral.submodules)
        if fullname.startswith(f"{name}.") and not listed:
            run(name)


def has_run(package: str) -> bool:
    """Whether a package has been imported and is not deferred."""
    return package in sys.modules and package not in _pending


def when_run(package: str, action: Callable[[], None]) -> None:
    """Call a function once the code of a package that has been imported has run."""
    if package in _pending:
        _pending[package].actions.append(action)
    else:
        action()


def _part(package: DeferredModule, name: str, submodules: Sequence[str]) -> Any:
    try:
        *_, last = [importlib.import_module(submodule) for submodule in submodules]
        return getattr(last, name)
    except (ImportError, AttributeError):
        # A version that is built differently: start over, with the package's code first.
        for loaded in [loaded for loaded in sys.modules if loaded.startswith(f"{package.__name__}.")]:
            del sys.modules[loaded]
        run(package.__name__)
        return getattr(package, name)


class Later:
    """Stands for an attribute of a deferred package: when it is used, the package runs and the attribute takes over.

    It has no instances before the package has run, so that asking whether an object is one does not run it.

    Args:
        package: its name.
        name: of the attribute: a class, a function or a submodule.
        known: attributes of it that do not need the package.

    Raises:
        AttributeError: it has no such attribute; until the package has run, it has none with a special name.
    """

    def __init__(self, package: str, name: str, **known: Any) -> None:
        self._package, self._name, self._known = package, name, known

    def _real(self) -> Any:
        run(self._package)
        return getattr(sys.modules[self._package], self._name)

    def __getattr__(self, name: str) -> Any:
        if name in ("_package", "_name", "_known"):
            # Asked for before they are set: while this is copied.
            raise AttributeError(name)
        if not has_run(self._package):
            if name in self._known:
                return self._known[name]
            # typing looks for attributes that it gives to its own objects.
            if name.startswith("__"):
                raise AttributeError(f"{self._package}.{self._name} has no attribute {name!r} yet")
        return getattr(self._real(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)

    def __instancecheck__(self, instance: Any) -> bool:
        return has_run(self._package) and isinstance(instance, self._real())

    def __subclasscheck__(self, subclass: type) -> bool:
        return has_run(self._package) and issubclass(subclass, self._real())

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (self._real(),)
