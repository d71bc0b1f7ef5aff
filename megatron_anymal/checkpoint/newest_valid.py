"""Find the checkpoint a run resumes from; all ranks share the work of verifying its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import torch.distributed as dist

from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.store import CheckpointError


def find_newest_valid(checkpoints: Path) -> tuple[Optional[Path], list[str]]:
    """As `store.newest_valid`, with the files of each checkpoint divided among the ranks. Collective.

    The result is the same on every rank.
    """
    folders: list[Any] = [store.committed(checkpoints) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folders, src=0)
    problems: list[str] = []
    for folder in folders[0]:
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, _problem(folder))
        # If the manifest cannot be read, all ranks report the same problem.
        folder_problems = list(dict.fromkeys(problem for problem in gathered if problem))
        if not folder_problems:
            return folder, problems
        problems += folder_problems
    if folders[0]:
        raise store.none_left(problems)
    return None, problems


def _problem(folder: Path) -> str:
    """First problem with this rank's share of a checkpoint's files; empty if there is none."""
    try:
        files = sorted(store.read_manifest(folder).files.items())
        for name, expected in files[dist.get_rank() :: dist.get_world_size()]:
            store.verify_file(folder, name, expected)
    except CheckpointError as error:
        return str(error)
    return ""
