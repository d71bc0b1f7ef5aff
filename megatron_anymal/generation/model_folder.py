"""Folders of models: a training checkpoint, its run, or an export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Optional

from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.store import CheckpointError

MODEL_TYPE = "anymal"


def exported_config(folder: Path) -> Optional[dict[str, Any]]:
    """Read an exported folder's config.json; None if the folder holds a training checkpoint.

    Raises:
        CheckpointError: it is neither.
    """
    if (folder / store.MANIFEST).is_file():
        return None
    path = folder / "config.json"
    if path.is_file():
        try:
            config = json.loads(path.read_text())
        except ValueError as error:
            raise CheckpointError(f"{str(path)!r} is damaged ({error}). Export again.") from None
        model_type = config.get("model_type") if isinstance(config, dict) else None
        if model_type != MODEL_TYPE:
            raise CheckpointError(
                f"{str(path)!r} has the model_type {model_type!r}, not {MODEL_TYPE!r}. Name a folder that this trainer "
                "exported, or a training checkpoint."
            )
        return config
    if not folder.is_dir():
        raise CheckpointError(
            f"There is no folder {str(folder)!r}. Name the folder of a checkpoint, of its run, or an exported one."
        )
    if not any(list(parent.glob("step_*")) for parent in (folder, folder / "checkpoints")):
        raise CheckpointError(
            f"There is no checkpoint in {str(folder)!r}: no {store.MANIFEST}, no step_* and no checkpoints/step_*, and "
            "no config.json of an exported folder either. Name the folder of a checkpoint, of its run, or an exported "
            "one."
        )
    return None
