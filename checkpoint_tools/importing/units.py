"""Files that an import writes: one per layer, one for the embedding, one for the final norm and the output layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig

from checkpoint_tools.importing.spans import ByteSpan, chunks_of, parts_of, read_ahead
from megatron_anymal.checkpoint.tensor_stream import StoredFile, StreamWriter
from megatron_anymal.hf_weights import HFWeights
from megatron_anymal.model.hf_llama import (
    EMBEDDING,
    checkpoint_position,
    hf_names,
    whole_names,
    whole_shape,
)
from megatron_anymal.safetensors_io import TensorFileError


@dataclass(frozen=True)
class Unit:
    """A checkpoint file and the names of the whole weights in it."""

    file: str
    names: tuple[str, ...]

    def size(self, hf: LlamaConfig, source: HFWeights) -> int:
        """Size of its weights in bytes."""
        return sum(source.entry(hf_name).size for name in self.names for hf_name in hf_names(name, hf))


def units_of(hf: LlamaConfig) -> list[Unit]:
    """All units in the order in which workers take them: the large embedding and output layer first."""
    layers = [
        Unit(f"layer_{number:05d}.distcp", tuple(whole_names(hf, [number]))) for number in range(hf.num_hidden_layers)
    ]
    head = tuple(name for name in whole_names(hf) if checkpoint_position(name)[1] is None and name != EMBEDDING)
    return [Unit("embedding.distcp", (EMBEDDING,)), Unit("head.distcp", head), *layers]


def write_unit(
    unit: Unit, hf: LlamaConfig, source: HFWeights, folder: Path, advance: Callable[[int], None]
) -> StoredFile:
    """Write a unit's file, with only a few megabytes of it in memory at a time.

    Args:
        advance: called with the size of each part written, in bytes.

    Raises:
        OSError: the disk is full.
        TensorFileError: a tensor cannot be read, or contains non-finite values.
    """
    chunks = [(name, first, parts_of(spans)) for name in unit.names for first, spans in chunks_of(name, hf, source)]
    file = StreamWriter(folder / unit.file)
    # One reader for the whole file, so that it also reads ahead across chunk boundaries.
    with closing(read_ahead([part for *_, parts in chunks for part in parts], source)) as values:
        try:
            for name, first, parts in chunks:
                key, layer = checkpoint_position(name)
                shape, dtype = whole_shape(name, hf), source.entry(parts[0].name).dtype
                row = math.prod(shape[1:]) * dtype.itemsize
                offset = (first, *[0] * (len(shape) - 1))
                size = (sum(part.size for part in parts) // row, *shape[1:])
                if layer is not None:
                    shape, offset, size = (hf.num_hidden_layers, *shape), (layer, *offset), (1, *size)
                file.add_values(key, dtype, shape, offset, size, _checked(values, parts, source, advance))
        except BaseException:
            file.abandon()
            raise
    return file.close()


def _checked(
    values: Iterator[memoryview], parts: list[ByteSpan], source: HFWeights, advance: Callable[[int], None]
) -> Iterator[memoryview]:
    """Yield the values of one chunk's parts, checked to be finite."""
    for part, value in zip(parts, values):
        if not all_finite(torch.frombuffer(value, dtype=source.entry(part.name).dtype)):
            raise TensorFileError(
                f"The tensor {part.name!r} in {str(source.folder / source.file_of(part.name))!r} holds NaN or infinite "
                "values. Download the file again."
            )
        yield value
        advance(part.size)


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; aminmax returns NaN for both ends if any value is NaN."""
    return all(bool(torch.isfinite(end)) for end in values.aminmax())
