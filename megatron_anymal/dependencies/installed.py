"""What is installed, found out without importing it. Needs only the standard library."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Literal


def is_importable(module: str) -> bool:
    """Whether a top-level module is installed."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def version_of(distribution: str) -> str:
    """The installed version of a distribution, or ""."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def has_nvidia_driver() -> bool:
    """Whether the driver of an NVIDIA GPU is loaded, on Linux or in its Windows subsystem."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))


def apex_kind() -> Literal["", "nvidia", "foreign"]:
    """Which package named apex is installed, if any. The one on PyPI is an unrelated authentication toolkit."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return ""
    # Only look for files: importing the unrelated package would run its code.
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    return "nvidia" if any((folder / "optimizers" / "__init__.py").is_file() for folder in folders) else "foreign"


def has_transformer_engine_extension() -> bool:
    """Whether Transformer Engine, which is installed, has its torch extension in one of the folders it looks in.

    A build from source leaves it beside the package or in it; PyPI's packages have it in a folder from which it cannot
    be imported by its name.
    """
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None or spec.origin is None:
        return False
    package = Path(spec.origin).parent
    folders = (package.parent, package, package / "wheel_lib")
    return any(any(folder.glob("transformer_engine_torch*.so")) for folder in folders)
