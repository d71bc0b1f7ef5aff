"""Keeps out what libraries import and a rank never uses, which would be a quarter of the time that its start takes.

    torch's compiler     megatron-core passes functions to torch.compile on import, which loads the compiler's
                         backend. It is loaded at the first call instead, and without a GPU never.
    wandb                megatron-core imports it to check that it is there. Hidden until that import is over; a run
                         that logs to wandb imports it afterwards.
    torchmetrics         Lightning needs its base class; the package imports every metric, with scipy and transformers.
    nemo.collections     exp_manager needs two callbacks; the package imports tokenizers and losses.
    pandas               for one of NeMo's loggers.

The last three are deferred: the package's own code runs as soon as anything but the listed parts is asked for, so that
a version that needs more is slower, not broken.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Optional


@dataclass(frozen=True)
class _Deferral:
    """The parts of a package that do not need the package's own code."""

    # Submodules, with everything below them.
    submodules: tuple[str, ...]
    # Attribute of the package -> submodules to import in this order; the last one defines it.
    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # Attribute of the package -> how to create it.
    values: Mapping[str, Callable[[], Any]] = field(default_factory=dict)


# Attributes that the import system and introspection look for; a package that lacks them has not been asked for more.
_LOOKED_FOR = {"__path__", "__file__", "__cached__", "__spec__", "__loader__", "__wrapped__", "__warningregistry__"}

_DEFERRED = {
    "torchmetrics": _Deferral(
        ("torchmetrics.utilities", "torchmetrics.metric", "torchmetrics.collections"),
        {
            "Metric": ("torchmetrics.utilities", "torchmetrics.metric"),
            "MetricCollection": ("torchmetrics.utilities", "torchmetrics.collections"),
        },
        {
            "_logger": lambda: logging.getLogger("torchmetrics"),
            "__version__": lambda: importlib.metadata.version("torchmetrics"),
        },
    ),
    "nemo.collections.common": _Deferral(("nemo.collections.common.callbacks",)),
    "pandas": _Deferral(()),
}


def install() -> None:
    """Install the hooks for libraries that are imported later. Idempotent."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def hide_torch() -> None:
    """Keep torch out of this process, for commands that use transformers only for tokenizers and settings of encoders.

    An import of torch then fails, and transformers behaves as if it were not installed. Does nothing if torch has been
    imported.
    """
    # None makes an import fail, and importlib.util.find_spec report that there is no such module.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that this file is about and gives them a loader of this file."""

    def find_spec(
        self, fullname: str, path: Optional[Sequence[str]], target: Optional[ModuleType] = None
    ) -> Optional[importlib.machinery.ModuleSpec]:
        _run_parents(fullname)
        if fullname not in _DEFERRED and fullname not in _AROUND:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        spec.loader = _Deferring(spec.loader) if fullname in _DEFERRED else _Around(spec.loader, _AROUND[fullname])
        return spec


def _run_parents(fullname: str) -> None:
    """Run the deferred package of a submodule that needs it."""
    for name, deferral in _DEFERRED.items():
        package = sys.modules.get(name)
        listed = any(fullname == one or fullname.startswith(f"{one}.") for one in deferral.submodules)
        if isinstance(package, _Deferred) and fullname.startswith(f"{name}.") and not listed:
            package.run()


class _Wrapper(importlib.abc.Loader):
    """Base of loaders that do something beside another loader's work, and pass on what they are asked besides."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Optional[ModuleType]:
        return self._loader.create_module(spec)


class _Around(_Wrapper):
    """Runs a module inside a context manager, which gets the module."""

    def __init__(self, loader: Any, around: Callable[[ModuleType], Any]) -> None:
        super().__init__(loader)
        self._around = around

    def exec_module(self, module: ModuleType) -> None:
        with self._around(module):
            self._loader.exec_module(module)


class _Deferring(_Wrapper):
    """Loads a package without running its code."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Deferred(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        assert isinstance(module, _Deferred)
        module.__dict__["_run"] = functools.partial(self._loader.exec_module, module)


class _Deferred(ModuleType):
    """A package whose code runs when something is asked for that its deferral does not list."""

    def run(self) -> None:
        """Run the package's own code, once."""
        run = self.__dict__.pop("_run", None)
        if run is not None:
            run()

    def __getattr__(self, name: str) -> Any:
        if "_run" not in self.__dict__ or name in _LOOKED_FOR:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        deferral = _DEFERRED[self.__name__]
        if name in deferral.values:
            value = deferral.values[name]()
        elif name in deferral.attributes:
            value = self._part(name, deferral.attributes[name])
        else:
            self.run()
            return getattr(self, name)
        setattr(self, name, value)
        return value

    def _part(self, name: str, submodules: Sequence[str]) -> Any:
        try:
            *_, last = [importlib.import_module(submodule) for submodule in submodules]
            return getattr(last, name)
        except (ImportError, AttributeError):
            # A version that is built differently: begin anew, with the package's code first.
            for loaded in [loaded for loaded in sys.modules if loaded.startswith(f"{self.__name__}.")]:
                del sys.modules[loaded]
            self.run()
            return getattr(self, name)


@contextmanager
def _without_wandb(module: ModuleType) -> Iterator[None]:
    if "wandb" in sys.modules:
        yield
        return
    # An import of a module that is None here fails, as if it were not installed.
    sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["wandb"]


@contextmanager
def _compiling_later(module: ModuleType) -> Iterator[None]:
    """Replace the decorator of megatron-core's fused functions."""
    yield
    fuse = module.jit_fuser
    module.jit_fuser = functools.partial(_compiled_later, fuse)  # type: ignore[attr-defined]


def _compiled_later(fuse: Callable[[Any], Any], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.cache
    def chosen() -> Callable[..., Any]:
        import torch

        return fuse(function) if torch.cuda.is_available() else function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return chosen()(*args, **kwargs)

    return call


# Module -> what happens around its execution.
_AROUND: dict[str, Callable[[ModuleType], Any]] = {
    "megatron.core": _without_wandb,
    "megatron.core.jit": _compiling_later,
}
