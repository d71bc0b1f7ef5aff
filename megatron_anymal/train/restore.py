"""Load a run's weights: from its own newest checkpoint, another run's, or the SFT run that is DPO's reference."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Optional

from megatron_anymal.checkpoint import state as checkpoint_state
from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.compatibility import check_changes
from megatron_anymal.checkpoint.newest_valid import find_newest_valid
from megatron_anymal.checkpoint.store import CheckpointError, Manifest
from megatron_anymal.config import ConfigError, ExpManagerConfig
from megatron_anymal.model.lora import keep_reference
from megatron_anymal.parallel import ParallelLayout
from megatron_anymal.train.build import TrainState
from megatron_anymal.train.reference_logprobs import ReferenceAnswers

Say = Callable[[str], None]


def find_checkpoint(checkpoints: Path, manager: ExpManagerConfig, layout: ParallelLayout, say: Say) -> Optional[Path]:
    """Return the newest valid checkpoint of a run; None for a new run. Cleans up after earlier jobs. Collective.

    Raises:
        CheckpointError: checkpoints exist but none is valid, or one is required and none exists.
    """
    folder, problems = find_newest_valid(checkpoints) if manager.resume_if_exists else (None, [])
    if layout.reports:
        _clean(checkpoints, say)
    for problem in problems:
        say(f"warning: {problem} Going back to an older checkpoint.")
    if folder is None and manager.resume_if_exists and not manager.resume_ignore_no_checkpoint:
        raise CheckpointError(
            f"There is no checkpoint in {str(checkpoints)!r}, and exp_manager.resume_ignore_no_checkpoint is false."
        )
    return folder


def _clean(checkpoints: Path, say: Say) -> None:
    """Remove checkpoints that an earlier job left half written or half deleted."""
    try:
        leftovers = store.clean(checkpoints)
    except OSError as error:
        say(f"warning: cannot remove the leftovers of an earlier job from {checkpoints} ({error}).")
        return
    if leftovers:
        say(f"removed the leftovers of an earlier job from {checkpoints}: {', '.join(leftovers)}")


def resume(state: TrainState, folder: Path, present: Manifest, say: Say) -> None:
    """Load a checkpoint of this run into `state`. Collective.

    Args:
        present: the manifest that this run would write now; any difference must be allowed.

    Raises:
        ConfigError, CheckpointError: the checkpoint belongs to another run, or is damaged.
    """
    manifest = store.read_manifest(folder)
    checkpoint_state.check_lora(state.config.model.lora, manifest, folder)
    check_changes(manifest, present, state.config.resilience.allow_changes, say)
    if manifest.reference != present.reference:
        raise ConfigError(
            f"{str(folder)!r} was trained against another reference than model.restore_from_path="
            f"{state.config.model.restore_from_path!r} gives now. Name the checkpoint that the run started from, or "
            "start a new run."
        )
    state.step = checkpoint_state.load(state, folder)
    say(f"resumed from {folder} at step {state.step}")


def weights_of(state: TrainState, path: str, base_hash: str, say: Say) -> Manifest:
    """Load the trained weights of another run's checkpoint and return its manifest. Collective.

    Raises:
        CheckpointError: there is no valid checkpoint, or it does not fit the model.
    """
    folder = store.resolve(path)
    manifest = store.read_manifest(folder)
    missing = checkpoint_state.restore(state, folder, base_hash, state.optimizer)
    new = [name for name in missing if ".lora." not in name]
    note = f"; not in it, so newly initialized: {', '.join(new[:3])} and others" if new else ""
    note += "; the adapters are newly initialized" if len(new) < len(missing) else ""
    say(f"weights from {folder}{note}")
    return manifest


def read_reference(state: TrainState, base_hash: str, run_dir: Path, say: Say) -> str:
    """Load the SFT model that is a DPO run's initial policy and, also after a resume, its reference. Collective.

    Returns:
        A hash of the checkpoint.

    Raises:
        ConfigError: the checkpoint has no adapters.
        CheckpointError: as in `weights_of`.
    """
    config = state.config
    manifest = weights_of(state, config.model.restore_from_path, base_hash, say)
    if not manifest.config["model"].get("lora", {}).get("r"):
        raise ConfigError(
            f"model.restore_from_path={config.model.restore_from_path!r} was trained without adapters, but job=dpo "
            "continues an SFT run's adapters. Name an SFT run with model.lora.r above 0."
        )
    reference_hash = hashlib.sha256(json.dumps(manifest.files, sort_keys=True).encode()).hexdigest()
    keep_reference(state.models)
    kept = run_dir / "reference" if config.model.dpo.reference == "cached" else None
    # The base hash is that of the unquantized base.
    formats = f"{config.trainer.precision} {config.model.base_quantization}".strip()
    identity = [reference_hash, manifest.base_hash, formats]
    state.reference = ReferenceAnswers(kept, identity, state.layout.device)
    return reference_hash
