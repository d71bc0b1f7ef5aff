"""Retention of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Optional

from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.store import CheckpointError, Manifest
from megatron_anymal.config import CheckpointConfig


def retain(checkpoints: Path, rules: CheckpointConfig, newest: int) -> list[Path]:
    """Delete the checkpoints that the rules do not keep.

    Args:
        newest: step of the checkpoint committed last. It is always kept. So are checkpoints of later steps, which a run
            that went back to an older checkpoint will replace.

    Returns:
        The deleted folders.

    Raises:
        OSError: one could not be deleted; the others were.
    """
    if not rules.keep_last:
        return []
    folders = {store.step_of(folder): folder for folder in store.committed(checkpoints)}
    readable = {}
    for step, folder in folders.items():
        # A folder with a damaged manifest does not count, so that it cannot displace a good one.
        if step <= newest and (manifest := _manifest(folder)) is not None:
            readable[step] = manifest
    stay = kept_steps(readable, rules) | {newest}
    gone = [folder for step, folder in sorted(folders.items()) if step < newest and step not in stay]
    failure: Optional[OSError] = None
    for folder in gone:
        try:
            store.delete(folder)
        except OSError as error:
            failure = failure or error
    if failure:
        raise failure
    return gone


def kept_steps(manifests: Mapping[int, Manifest], rules: CheckpointConfig) -> set[int]:
    """Return the steps that the rules keep.

    Args:
        manifests: step -> manifest of all readable checkpoints.
    """
    stay = set(sorted(manifests)[-rules.keep_last :])
    if rules.keep_every_n_steps:
        stay |= {step for step in manifests if step % rules.keep_every_n_steps == 0}
    measured = {
        step: manifest.metrics[rules.keep_best_metric]
        for step, manifest in manifests.items()
        if rules.keep_best_metric in manifest.metrics
    }
    sign = 1 if rules.keep_best_mode == "min" else -1
    # NaN sorts last; among equal values the later step is better.
    order = sorted(measured, key=lambda step: (measured[step] != measured[step], sign * measured[step], -step))
    return stay | set(order[: rules.keep_best])


def _manifest(folder: Path) -> Optional[Manifest]:
    try:
        return store.read_manifest(folder)
    except CheckpointError:
        return None
