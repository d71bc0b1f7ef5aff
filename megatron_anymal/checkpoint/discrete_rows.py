"""Rows of marks and codes in checkpoints: whether they have the meaning of this run's, and those that were appended."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.store import CheckpointError
from megatron_anymal.checkpoint.tensor_stream import StreamReader
from megatron_anymal.config import DiscreteConfig, ModelConfig
from megatron_anymal.data.discrete_vocabulary import DiscreteVocabulary
from megatron_anymal.model.unsharded_weights import list_weights


def saved_vocabulary(saved: Collection[str], folder: Path) -> DiscreteVocabulary:
    """Marks and codes whose rows a checkpoint holds; their ids count from 0.

    Args:
        saved: names of the checkpoint's tensors.

    Raises:
        CheckpointError: the checkpoint's manifest cannot be read.
    """
    held = any(name.startswith("discrete.") for name in saved)
    sections = store.read_manifest(folder).config["model"]["discrete"] if held else {}
    return DiscreteVocabulary(0, {name: DiscreteConfig(**section) for name, section in sections.items()})


def check_discrete_rows(model: ModelConfig, saved: Collection[str], folder: Path, *, appended: bool) -> None:
    """Refuse a checkpoint whose rows of marks and codes have other meanings than this run's, or would be lost.

    Args:
        saved: names of the checkpoint's tensors.
        appended: whether this run may have further kinds of media after those of the checkpoint.

    Raises:
        CheckpointError: `model.discrete` differs from that of the checkpoint's run, or a run that does not train these
            rows would leave some of them random.
    """
    theirs, ours = saved_vocabulary(saved, folder).layout, DiscreteVocabulary(0, model.discrete).layout
    if theirs == ours:
        return
    if not appended or theirs != ours[: len(theirs)]:
        raise CheckpointError(
            f"{str(folder)!r} has rows of marks and codes for {_described(theirs)}; with this run's "
            f"{_described(ours)} they would be lost, or assigned to other marks and codes. Set model.discrete as in "
            "that run, in the same order. To add kinds of media, append them in a new run with model.restore_from_path."
        )
    if model.discrete_rows == "none":
        raise CheckpointError(
            f"{str(folder)!r} has no rows of {_described(ours[len(theirs) :])}, and model.discrete_rows=none would "
            "leave them random. Set model.discrete_rows=new, or use a checkpoint of a run that trained them."
        )


def load_first_rows(models: Sequence[nn.Module], folder: Path) -> None:
    """Load the rows of a checkpoint that has fewer kinds of media; the others keep their values. Collective.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """
    reader = StreamReader(folder)
    count = saved_vocabulary(reader.tensors, folder).added
    for weight in (weight for model in models for weight in list_weights(model)):
        if count and weight.name.startswith("discrete."):
            whole = weight.gather()
            whole[:count] = reader.read(weight.name)[:count]
            weight.set(whole)


def _described(layout: Sequence[tuple[str, Any, list[int]]]) -> str:
    return ", ".join(f"{name} {sizes} {' '.join(marks)}" for name, marks, sizes in layout) or "none"
