"""The checkpoint that a run continues from: every file of it read and compared, by all ranks together."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import torch.distributed as dist

from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.store import CheckpointError


def find_newest_valid(checkpoints: Path) -> tuple[Optional[Path], list[str]]:
    """As `store.newest_valid`, the files of a checkpoint shared among the ranks; the same on every rank. Collective."""
    found: list[Any] = [store.committed(checkpoints) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    problems: list[str] = []
    for folder in found[0]:
        wrong: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(wrong, _problem(folder))
        # Those who cannot read the manifest all say the same.
        of_folder = list(dict.fromkeys(problem for problem in wrong if problem))
        if not of_folder:
            return folder, problems
        problems += of_folder
    if found[0]:
        raise store.none_left(problems)
    return None, problems


def _problem(folder: Path) -> str:
    """What is wrong with this rank's share of a checkpoint's files; empty where nothing is."""
    try:
        files = sorted(store.read_manifest(folder).files.items())
        for name, expected in files[dist.get_rank() :: dist.get_world_size()]:
            store.verify_file(folder, name, expected)
    except CheckpointError as error:
        return str(error)
    return ""
