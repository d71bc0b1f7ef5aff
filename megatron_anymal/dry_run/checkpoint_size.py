"""How much disk a run's checkpoints will take yet."""

from __future__ import annotations

from pathlib import Path

from megatron_anymal.checkpoint.store import committed
from megatron_anymal.config import RunConfig

# Bytes for a number that trains: an fp32 weight, its bf16 copy at most, and Adam's two fp32 moments.
_TRAINED, _CARRIED = 16, 4


def bytes_needed(config: RunConfig) -> int:
    """Bytes for all checkpoints kept at once and the one being written, less those that are there.

    Raises:
        ConfigError, DataError, CheckpointError: what would stop the run too.
    """
    there = committed(config.run_dir / "checkpoints")
    rules = config.exp_manager.checkpoint
    # 0 keeps all: nobody can tell how many; two let it begin.
    kept = (rules.keep_last + rules.keep_best if rules.keep_last else 2) + 1
    one = _size(there[0]) if there else _estimate(config)
    # One more is always needed: it is written before an old one goes.
    return one * max(1, kept - len(there))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _estimate(config: RunConfig) -> int:
    from megatron_anymal.dry_run.simulate import examine

    weights = examine(config).weights
    trained = sum(numbers for numbers, trains in weights.values() if trains)
    carried = sum(
        numbers for name, (numbers, trains) in weights.items() if not trains and name.startswith("projectors.")
    )
    return _TRAINED * trained + _CARRIED * carried
