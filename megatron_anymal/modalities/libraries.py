"""Libraries that only some kinds of media need: asked for when such media are read."""

from __future__ import annotations

import importlib
from typing import Any

# What `pip install` calls them, where it is not the module's own name.
_PACKAGES = {"PIL": "pillow"}


def library(module: str) -> Any:
    """The module of that name, for example "PIL.Image".

    Raises:
        ImportError: it is not installed, with the command that mends it.
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
