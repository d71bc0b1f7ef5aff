"""Load a checkpoint without running code that its files may contain.

megatron-core and torch read `.metadata` and entries that are not tensors with an unrestricted unpickler, which calls
anything the file names. Every pickle of a checkpoint is therefore first read here, by unpicklers that only allow the
classes a checkpoint consists of. A pickle that passes refers to nothing else and is safe for their readers too.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch

from megatron_anymal.checkpoint.metadata import read_metadata
from megatron_anymal.checkpoint.store import CheckpointError

COMMON, FORMAT = "common.pt", "metadata.json"
# megatron-core's other formats have their own readers, with other pickles.
BACKENDS = {"sharded_backend": "torch_dist", "common_backend": "torch"}


def load(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`megatron.core.dist_checkpointing.load`, preceded by `check_pickles`. Collective.

    Args:
        wanted: a sharded state dict.

    Raises:
        CheckpointError: as `check_pickles`.
    """
    from megatron.core import dist_checkpointing

    check_pickles(folder)
    return dist_checkpointing.load(wanted, str(folder))


def check_pickles(folder: Path) -> None:
    """Refuse a checkpoint with a pickle that could run code: `.metadata`, common.pt, entries that are not tensors.

    Raises:
        CheckpointError: there is such a pickle (the message names the file and the object it refers to), a file is
            missing or damaged, or the format is not torch_dist.
    """
    _check_format(folder)
    contents = read_metadata(folder)
    _check_data(folder / COMMON, 0, None, COMMON)
    for name, span in contents.objects.items():
        _check_data(folder / span.file, span.begin, span.length, name)


def _check_format(folder: Path) -> None:
    try:
        content = json.loads((folder / FORMAT).read_text())
        stated = {key: content[key] for key in BACKENDS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{str(folder / FORMAT)!r} cannot be read ({error}).") from None
    if stated != BACKENDS:
        raise CheckpointError(f"{str(folder / FORMAT)!r}: the format is {stated}; only {BACKENDS} is supported.")


def _check_data(path: Path, start: int, length: int | None, name: str) -> None:
    try:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read() if length is None else file.read(length)
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read ({error}).") from None
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        # torch wraps its unpickler's error in advice on how to trust the file.
        text = str(error.__context__ or error)
        reason = text.splitlines()[0].partition(" Please use ")[0].rstrip(".") if text else type(error).__name__
        raise CheckpointError(
            f"{str(path)!r}: {name!r} is damaged, or holds more than data ({reason}). No code in it was run."
        ) from None
