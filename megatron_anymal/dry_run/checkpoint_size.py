"""Estimate the disk space that a run's checkpoints still need."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_anymal.checkpoint.store import committed
from megatron_anymal.config import RunConfig

# Bytes per trainable parameter (an fp32 weight, possibly a bf16 copy, Adam's two fp32 moments), and per frozen one.
_TRAINED, _CARRIED = 16, 4


def bytes_needed(config: RunConfig) -> int:
    """Return the bytes for all checkpoints kept at once and the one being written, less the existing ones.

    Raises:
        ConfigError, DataError, CheckpointError, StorageError: errors that would also stop the run.
    """
    existing = committed(config.run_dir / "checkpoints")
    rules = config.exp_manager.checkpoint
    # keep_last=0 keeps all, an unknown number: two are enough to start.
    kept = (rules.keep_last + rules.keep_best if rules.keep_last else 2) + 1
    if existing:
        checkpoint_bytes = _size(existing[0])
    else:
        from megatron_anymal.dry_run.simulate import examine

        checkpoint_bytes = _estimate(examine(config).weights)
    # Space for one more is always needed: it is written before an old one is deleted.
    return checkpoint_bytes * max(1, kept - len(existing))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _estimate(weights: Mapping[str, tuple[int, bool]]) -> int:
    """Return the bytes of a checkpoint.

    Args:
        weights: the whole model's, as in `DryRun.weights`.
    """
    trained = sum(numbers for numbers, trains in weights.values() if trains)
    carried = sum(
        numbers for name, (numbers, trains) in weights.items() if not trains and name.startswith("projectors.")
    )
    return _TRAINED * trained + _CARRIED * carried
