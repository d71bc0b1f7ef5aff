"""Lazy import of libraries that only some kinds of media need."""

from __future__ import annotations

import importlib
from typing import Any

# Top-level module -> package name for `pip install`, if they differ.
_PACKAGES = {"PIL": "pillow"}


def library(module: str) -> Any:
    """Import a module, for example "PIL.Image".

    Raises:
        ImportError: the module is not installed; the message contains the command to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name != top:
            raise
        package = _PACKAGES.get(top, top)
        raise ImportError(
            f"Media of this kind are read with {package}, which is not installed. Run: pip install {package}"
        ) from error
