"""Configurations that were composed before the processes that need them were forked.

Composing takes a process about a third of its time from its fork to its first step, and is the same work in each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megatron_anymal.config.compose import Composed, compose
from megatron_anymal.config.parsing import from_dict

# Name, folder and overrides -> the composed configuration, and its files as they were.
_Key = tuple[str, Path, tuple[str, ...]]
_known: dict[_Key, tuple[Composed, list[tuple[int, int]]]] = {}


def compose_ahead(config_name: str, config_dir: Path, overrides: Sequence[str]) -> Composed:
    """Compose as `compose` does, and keep the result for `composed` of this and of forked processes.

    Raises:
        ConfigError: as `compose`.
    """
    composition = compose(config_name, config_dir, overrides)
    # Each process has an environment of its own.
    if not composition.reads_environment:
        _known[config_name, config_dir, tuple(overrides)] = composition, _stamps(composition.files)
    return composition


def composed(config_name: str, config_dir: Path, overrides: Sequence[str]) -> Composed:
    """Return what was composed ahead if its files have not changed since; else compose.

    Raises:
        ConfigError: as `compose`.
    """
    composition, stamps = _known.get((config_name, config_dir, tuple(overrides)), (None, []))
    with suppress(OSError):
        if composition is not None and _stamps(composition.files) == stamps:
            return composition
    return compose(config_name, config_dir, overrides)


def export() -> bytes:
    """Everything that was composed ahead, for `adopt` in another process."""
    rows = [
        (name, str(folder), overrides, known.config.to_dict(), known.origins, list(map(str, known.files)), stamps)
        for (name, folder, overrides), (known, stamps) in _known.items()
    ]
    return json.dumps(rows).encode()


def adopt(exported: bytes) -> None:
    """Take over what another process has exported.

    Raises:
        ConfigError: it comes from another version of this package.
    """
    for name, folder, overrides, values, origins, files, stamps in json.loads(exported):
        composition = Composed(from_dict(values), origins, tuple(map(Path, files)), reads_environment=False)
        _known[name, Path(folder), tuple(overrides)] = composition, [(time, size) for time, size in stamps]


def _stamps(files: Sequence[Path]) -> list[tuple[int, int]]:
    """Time of the last change in ns, and size in bytes, of each file."""
    return [(status.st_mtime_ns, status.st_size) for status in (path.stat() for path in files)]
