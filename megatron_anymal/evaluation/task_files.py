"""The tasks that exist: those shipped in evaluation/tasks/ and those of users' own folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_anymal.config import ConfigError
from megatron_anymal.evaluation.task import Task, read_task, require_known

SHIPPED = Path(__file__).resolve().parent / "tasks"


def task_paths(folders: Sequence[str] = ()) -> dict[str, Path]:
    """Name -> file of every task; a task in a later folder replaces one of the same name.

    Args:
        folders: users' own folders of task files.

    Raises:
        ConfigError: a folder does not exist or has no task files.
    """
    paths: dict[str, Path] = {}
    for folder in (SHIPPED, *map(Path, folders)):
        files = sorted(folder.glob("*.yaml"))
        if not files:
            raise ConfigError(f"--task-folder {str(folder)!r} holds no task files (*.yaml). Correct the path.")
        paths.update({file.stem: file for file in files})
    return paths


def find_task(name: str, folders: Sequence[str] = ()) -> Task:
    """Read the task of this name.

    Raises:
        ConfigError: there is none (naming the nearest), or its file cannot be used.
    """
    paths = task_paths(folders)
    require_known(name, tuple(paths), "--task")
    return read_task(paths[name])
