"""What an import writes: one file per layer, one for the embedding, one for the final norm and the head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig

from megatron_anymal.checkpoint.stream import StoredFile, StreamWriter
from megatron_anymal.model.hf_llama import (
    EMBEDDING,
    checkpoint_place,
    chunks_from_hf,
    hf_names,
    whole_names,
    whole_shape,
)
from megatron_anymal.tensor_files import HFWeights, TensorFileError


@dataclass(frozen=True)
class Unit:
    """A file of the checkpoint and the whole weights in it."""

    file: str
    names: tuple[str, ...]

    def size(self, hf: LlamaConfig, source: HFWeights) -> int:
        """Bytes of its weights."""
        return sum(source.entry(hf_name).size for name in self.names for hf_name in hf_names(name, hf))


def units_of(hf: LlamaConfig) -> list[Unit]:
    """All units, the largest first where they are not alike: they are shared out in this order."""
    layers = [
        Unit(f"layer_{number:05d}.distcp", tuple(whole_names(hf, [number]))) for number in range(hf.num_hidden_layers)
    ]
    head = tuple(name for name in whole_names(hf) if checkpoint_place(name)[1] is None and name != EMBEDDING)
    return [Unit("embedding.distcp", (EMBEDDING,)), Unit("head.distcp", head), *layers]


def write_unit(
    unit: Unit, hf: LlamaConfig, source: HFWeights, folder: Path, advance: Callable[[int], None]
) -> StoredFile:
    """Write a unit's file.

    Args:
        advance: told the bytes of each tensor written.

    Raises:
        OSError: the disk is full.
        TensorFileError: a tensor cannot be read, or holds values that are not finite.
    """

    def read(hf_name: str) -> Tensor:
        tensor = source[hf_name]
        if not all_finite(tensor):
            raise TensorFileError(
                f"The tensor {hf_name!r} in {str(source.folder / source.file_of(hf_name))!r} holds NaN or infinite "
                "values. Download the file again."
            )
        return tensor

    file = StreamWriter(folder / unit.file)
    try:
        for name in unit.names:
            key, layer = checkpoint_place(name)
            shape = whole_shape(name, hf)
            for row, piece in chunks_from_hf(name, hf, read):
                place = (row, *[0] * (len(shape) - 1))
                if layer is None:
                    file.add(key, shape, place, piece)
                else:
                    file.add(key, (hf.num_hidden_layers, *shape), (layer, *place), piece[None])
                advance(piece.nbytes)
                # Before the next one is read: two of them would be in memory.
                del piece
    except BaseException:
        file.abandon()
        raise
    return file.close()


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite.

    Such a value makes the sum one; a sum may also overflow, then the values are looked at one by one.
    """
    if bool(torch.isfinite(tensor.sum())):
        return True
    return all(bool(torch.isfinite(piece).all()) for piece in tensor.reshape(-1).split(1 << 20))
