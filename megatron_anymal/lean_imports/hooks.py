"""Hooks of the import system: deferred packages, and what happens around the execution of modules."""

from __future__ import annotations

import functools
import gc
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Optional

from megatron_anymal.lean_imports import deferral as packages
from megatron_anymal.lean_imports.deferral import Deferral, DeferredModule, defer, run_for
from megatron_anymal.lean_imports.frozen_objects import freeze
from megatron_anymal.lean_imports.libraries import AROUND, deferred

# Packages whose import, with everything that it imports, runs without the collector.
_LARGE = {"torch", "transformers", "lightning", "nemo", "megatron", "megatron_anymal", "checkpoint_tools"}
# An import that loads at least this many modules is part of the start: its objects live as long as the process.
_MANY = 100


def install() -> None:
    """Install the hooks for libraries that are imported later. Idempotent."""
    if not _installed():
        sys.meta_path.insert(0, Finder())


def call(target: str, *arguments: Any) -> Any:
    """Install the hooks, then import and call MODULE:FUNCTION.

    For spawned processes: they would import the function's module, with all that it imports, before they call it.
    """
    install()
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)(*arguments)


def _installed() -> bool:
    return any(isinstance(finder, Finder) for finder in sys.meta_path)


def hide_torch() -> None:
    """Keep torch out of this process, for commands that use transformers only for tokenizers and settings of encoders.

    An import of torch then fails, and transformers behaves as if it were not installed. Does nothing if torch has been
    imported.
    """
    # None makes an import fail, and importlib.util.find_spec report that there is no such module.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]


def when_run(package: str, action: Callable[[], None]) -> None:
    """Call a function once a package's own code has run: now, unless the package is deferred."""
    if _installed() and package in deferred():
        importlib.import_module(package)
    packages.when_run(package, action)


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that need a hook, and gives them one of the loaders below."""

    def find_spec(
        self, fullname: str, path: Optional[Sequence[str]], target: Optional[ModuleType] = None
    ) -> Optional[importlib.machinery.ModuleSpec]:
        """Find a module as Python does; None, which leaves it to the other finders, if it needs none of the hooks."""
        run_for(fullname)
        deferral, managers = deferred().get(fullname), []
        if fullname in AROUND:
            managers.append(AROUND[fullname])
        # While the collector is off, an outer import has turned it off.
        if gc.isenabled() and fullname.partition(".")[0] in _LARGE:
            managers.append(_collecting_later)
        if deferral is None and not managers:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        if deferral is not None:
            spec.loader = _Deferring(spec.loader, deferral)
        for manager in managers:
            spec.loader = _InContext(spec.loader, manager)
        return spec


class _Wrapper(importlib.abc.Loader):
    """Base of loaders that extend another loader; everything else is passed on to it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Optional[ModuleType]:
        return self._loader.create_module(spec)


class _InContext(_Wrapper):
    """Runs a module inside a context manager, which gets the module."""

    def __init__(self, loader: Any, manager: Callable[[ModuleType], Any]) -> None:
        super().__init__(loader)
        self._manager = manager

    def exec_module(self, module: ModuleType) -> None:
        with self._manager(module):
            self._loader.exec_module(module)


class _Deferring(_Wrapper):
    """Loads a package without running its code."""

    def __init__(self, loader: Any, deferral: Deferral) -> None:
        super().__init__(loader)
        self._deferral = deferral

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return DeferredModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        assert isinstance(module, DeferredModule)
        defer(module, self._deferral, functools.partial(self._loader.exec_module, module))


@contextmanager
def _collecting_later(module: ModuleType) -> Iterator[None]:
    """Pause the collector; what a large import has created is then left out of its passes for good."""
    before, enabled = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) - before >= _MANY:
            freeze()
        if enabled:
            gc.enable()
