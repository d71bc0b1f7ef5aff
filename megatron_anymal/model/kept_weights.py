"""Frozen weights that a process keeps while it changes from one job to the next (launcher/rejoining.py).

They are what a new process would read, as long as nothing has changed that they depend on: `source` says what that is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

from torch import nn

from megatron_anymal.config import ModelConfig
from megatron_anymal.model.encoders import Encoder
from megatron_anymal.parallel import ParallelLayout

_LLAMA = "language_model."


@dataclass(frozen=True)
class KeptWeights:
    """Frozen weights of this rank."""

    # Frozen encoders by modality.
    encoders: Mapping[str, Encoder] = field(default_factory=dict)
    # The Llama's weights by name, for each model chunk; empty: not all of them are frozen, or there are none.
    llama: Sequence[Mapping[str, nn.Parameter]] = ()


NOTHING = KeptWeights()
_kept: Optional[tuple[str, KeptWeights]] = None


def source(model: ModelConfig, precision: str, layout: ParallelLayout) -> str:
    """Everything that the values of this rank's frozen weights depend on: settings, place in the layout, and the times
    and sizes of the files.

    Args:
        model: with its `language_model` resolved (checkpoint/frozen_base.py).
        precision: `trainer.precision`.
    """
    folders = [model.language_model.path, model.language_model.checkpoint]
    folders += [section.encoder.path for section in model.modalities.values()]
    rank = {**asdict(layout), "device": str(layout.device)}
    return json.dumps([asdict(model), precision, rank, [_stamps(Path(folder)) for folder in folders if folder]])


def keep(source: str, models: Sequence[Any], encoders: Mapping[str, Encoder]) -> None:
    """Keep the frozen weights of models that are given up.

    Args:
        source: `source` before they were read.
        models: this rank's chunks.
        encoders: of this rank, by modality.
    """
    global _kept
    frozen = {name: encoder for name, encoder in encoders.items() if _all_frozen(encoder.parameters())}
    llama = [
        {name: weight for name, weight in chunk.named_parameters() if name.startswith(_LLAMA) and ".lora." not in name}
        for chunk in models
    ]
    whole = _all_frozen(weight for chunk in llama for weight in chunk.values())
    _kept = source, KeptWeights(frozen, llama if whole else ())


def take(source: str) -> KeptWeights:
    """Return what was kept and has this source, once; everything else is let go."""
    global _kept
    kept, _kept = _kept, None
    return kept[1] if kept is not None and kept[0] == source else NOTHING


def set_llama(models: Sequence[nn.Module], kept: KeptWeights) -> None:
    """Put the Llama's kept weights in the place of those of new models."""
    for chunk, weights in zip(models, kept.llama, strict=True):
        for name, weight in weights.items():
            owner, _, leaf = name.rpartition(".")
            setattr(chunk.get_submodule(owner), leaf, weight)


def _all_frozen(weights: Any) -> bool:
    return not any(weight.requires_grad for weight in weights)


def _stamps(folder: Path) -> list[tuple[str, int, int]]:
    """Name, time of the last change in ns, and size in bytes, of the files of a folder."""
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    return [(str(path), (status := path.stat()).st_mtime_ns, status.st_size) for path in files]
