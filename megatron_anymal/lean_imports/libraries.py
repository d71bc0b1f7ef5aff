"""What is kept out of the libraries' imports.

    torch's compiler     Lightning, transformers and torch's optimizers import its front end, to ask whether a module is
                         compiled or to exclude a function; megatron-core passes functions to torch.compile on import,
                         which loads its backend. Without a GPU nothing is compiled.
    wandb                megatron-core imports it to check that it is there. Hidden until that import is over; a run
                         that logs to wandb imports it afterwards.
    torchmetrics         Lightning needs its base class; the package imports every metric, with scipy and transformers.
    nemo.collections     exp_manager needs two callbacks; the package imports tokenizers and losses.
    pandas               for one of NeMo's loggers.
    scipy.optimize       for one of transformers' losses.

transformers reads the source of all its models, twice: the second read is avoided.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.metadata
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Optional

from megatron_anymal.dependencies.installed import has_nvidia_driver
from megatron_anymal.lean_imports.deferral import Deferral, Later, has_run, when_run

_COMPILER = "torch._dynamo"
# Its decorators that return the function itself.
_MARKS = ("allow_in_graph", "assume_constant_result")


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for functions that have no effect as long as nothing is compiled."""


def _marked_later(mark: str, function: Any) -> Any:
    """Apply a decorator that only marks functions for the compiler, once there is one."""
    when_run(_COMPILER, lambda: getattr(sys.modules[_COMPILER], mark)(function))
    return function


def _excluded_later(
    exclude: Callable[..., Any], function: Optional[Callable[..., Any]] = None, *args: Any, **kwargs: Any
) -> Callable[..., Any]:
    """Apply a decorator that excludes functions from compilation, once there is a compiler."""
    if function is None:
        return lambda function: _excluded_later(exclude, function, *args, **kwargs)
    if not inspect.isroutine(function):
        return exclude(function, *args, **kwargs)

    @functools.cache
    def excluded() -> Callable[..., Any]:
        return exclude(function, *args, **kwargs)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (excluded() if has_run(_COMPILER) else function)(*args, **kwargs)

    return call


DEFERRED = {
    "torchmetrics": Deferral(
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
    "nemo.collections.common": Deferral(("nemo.collections.common.callbacks",)),
    "pandas": Deferral(),
    "scipy.optimize": Deferral(
        values={"linear_sum_assignment": lambda: Later("scipy.optimize", "linear_sum_assignment")}
    ),
}
# Where a GPU may be, functions are compiled, and all of this is as usual.
_DEFERRED_WITHOUT_GPU = {
    _COMPILER: Deferral(
        # With transformers.masking_utils and checkpointed functions; neither imports anything of the package.
        (f"{_COMPILER}._trace_wrapped_higher_order_op", f"{_COMPILER}.config"),
        values={
            "config": lambda: importlib.import_module(f"{_COMPILER}.config"),
            "OptimizedModule": lambda: Later(_COMPILER, "OptimizedModule"),
            **{mark: functools.partial(functools.partial, _marked_later, mark) for mark in _MARKS},
            "disable": lambda: functools.partial(_excluded_later, Later(_COMPILER, "disable")),
            # At the start and the end of an optimizer's step.
            "graph_break": lambda: _nothing,
            # When process groups are created.
            "trace_rules": lambda: Later(_COMPILER, "trace_rules", clear_lru_cache=_nothing),
        },
    ),
}


def _without(*packages: str) -> Callable[[ModuleType], Any]:
    """Make a module run as if packages were not installed, unless they have been imported."""

    @contextmanager
    def without(module: ModuleType) -> Iterator[None]:
        hidden = [name for name in packages if name not in sys.modules]
        # An import of a module that is None here fails.
        sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
        try:
            yield
        finally:
            for name in hidden:
                del sys.modules[name]

    return without


def _replace(module: ModuleType, name: str, replacement: Callable[[Any], Any]) -> None:
    """Replace a function of a module, unless this version of it has none of that name."""
    if name in vars(module):
        setattr(module, name, replacement(vars(module)[name]))


@contextmanager
def _compiling_later(module: ModuleType) -> Iterator[None]:
    """Replace the decorator of megatron-core's fused functions."""
    yield
    _replace(module, "jit_fuser", lambda fuse: functools.partial(_compiled_later, fuse))


@contextmanager
def _decorating_later(module: ModuleType) -> Iterator[None]:
    """Keep a module of megatron-core 0.19 that decorates a function with torch.compile from importing the compiler.

    With a GPU it is imported anyway.
    """
    if has_nvidia_driver():
        yield
        return
    import torch

    compiler: Any = torch.compile

    @functools.wraps(compiler)
    def compile_later(function: Any = None, *args: Any, **options: Any) -> Any:
        # Only what the module decorates: others that it imports or calls are to get what they ask for.
        if getattr(function, "__module__", None) != module.__name__:
            return compiler(function, *args, **options)
        return _compiled_later(functools.partial(compiler, **options), function)

    replaced: Any = torch
    replaced.compile = compile_later
    try:
        yield
    finally:
        replaced.compile = compiler


def _compiled_later(fuse: Callable[[Any], Any], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.cache
    def chosen() -> Callable[..., Any]:
        import torch

        return fuse(function) if torch.cuda.is_available() else function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return chosen()(*args, **kwargs)

    return call


@contextmanager
def _reading_once(module: ModuleType) -> Iterator[None]:
    """Keep what transformers reads of the folder of its models."""
    yield
    _replace(module, "create_import_structure_from_path", _read_once)


def _read_once(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    kept: dict[str, Any] = {}
    reading: list[str] = []

    @functools.wraps(read)
    def structure(module_path: Any) -> Any:
        folder = os.fspath(module_path)
        folder = os.path.dirname(folder) if os.path.isfile(folder) else folder
        # It calls itself for the folders inside.
        if reading:
            return read(folder)
        if folder not in kept:
            reading.append(folder)
            try:
                kept[folder] = read(folder)
            finally:
                reading.clear()
        return copy.deepcopy(kept[folder])

    return structure


@contextmanager
def _whole_or_missing(module: ModuleType) -> Iterator[None]:
    """Make half an installation of Transformer Engine count as none.

    megatron-core 0.16.1 expects ImportError alone. Version 2.11 raises FileNotFoundError without its torch extension,
    RuntimeError without its core, AssertionError for parts of different versions, and OSError for a library of CUDA
    that is missing.
    """
    try:
        yield
    except (OSError, RuntimeError, AssertionError) as error:
        raise ImportError(
            f"{' '.join(str(error).split()) or type(error).__name__}; pip install --no-build-isolation -e '.[te]' "
            "installs all parts of Transformer Engine, or uninstall it"
        ) from error


@contextmanager
def _asking_local_folders_first(module: ModuleType) -> Iterator[None]:
    """Lightning imports every installed package for object storage to tell whether a local folder is in one."""
    yield
    _replace(module, "_is_object_storage", lambda ask: functools.partial(_is_object_storage, ask))


def _is_object_storage(ask: Callable[[Any], bool], fs: Any) -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return not isinstance(fs, LocalFileSystem) and ask(fs)


# Module -> what happens around its execution.
AROUND: dict[str, Callable[[ModuleType], Any]] = {
    "lightning.fabric.utilities.cloud_io": _asking_local_folders_first,
    "megatron.core": _without("wandb"),
    "megatron.core.jit": _compiling_later,
    "megatron.core.transformer.moe.router": _decorating_later,
    # For event files on S3; those of a run are in its folder.
    "tensorboard.compat.tensorflow_stub.io.gfile": _without("boto3", "botocore"),
    "transformer_engine": _whole_or_missing,
    "transformer_engine.pytorch": _whole_or_missing,
    "transformers.utils.import_utils": _reading_once,
}


@functools.cache
def deferred() -> Mapping[str, Deferral]:
    """Package -> its parts that do not need the package's own code."""
    return DEFERRED if has_nvidia_driver() else {**DEFERRED, **_DEFERRED_WITHOUT_GPU}
