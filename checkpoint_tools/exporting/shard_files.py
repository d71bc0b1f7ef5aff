"""Writer for HuggingFace's sharded safetensors and their index, one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from megatron_anymal.hf_weights import INDEX, SINGLE
from megatron_anymal.safetensors_io import SafetensorsWriter
from megatron_anymal.telemetry import Progress

_MB = 1_000_000

Entries = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def write_shards(
    folder: Path,
    entries: Entries,
    tensors: Iterable[tuple[str, Tensor]],
    max_bytes: int,
) -> dict[str, str]:
    """Write model.safetensors, or model-00001-of-N.safetensors and an index if one file would be too large.

    Args:
        entries: name -> dtype and shape of every tensor, in order.
        tensors: names and values, in the same order.
        max_bytes: maximum size of a file; a larger tensor gets a file of its own.

    Returns:
        File name -> SHA-256.

    Raises:
        OSError: the disk is full.
        TensorFileError: the tensors do not match `entries`.
    """
    shards = _cut(entries, max_bytes)
    names = [SINGLE] if len(shards) == 1 else [_shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    digests = {}
    total, moved = sum(_size(entry) for entry in entries.values()), 0
    progress = Progress("exporting", total // _MB, "MB")
    with closing(_one_ahead(tensors)) as source:
        for name, shard in zip(names, shards):
            with SafetensorsWriter(folder / name, shard, {"format": "pt"}) as writer:
                for _ in shard:
                    tensor_name, tensor = next(source)
                    writer.append(tensor_name, tensor)
                    moved += tensor.nbytes
                    progress.advance(moved // _MB - (moved - tensor.nbytes) // _MB)
                    # Release it now, or three tensors would be in memory during the next read-ahead.
                    del tensor
            digests[name] = writer.digest
        # Exhaust the source: its final check may raise.
        assert next(source, None) is None
    progress.finish()
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return digests


def _one_ahead(tensors: Iterable[tuple[str, Tensor]]) -> Generator[tuple[str, Tensor], None, None]:
    """Yield the same items; a thread reads the next one while the current one is written."""
    source = iter(tensors)
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, source, None)
        while (item := coming.result()) is not None:
            coming = reader.submit(next, source, None)
            yield item
            del item


def _cut(entries: Entries, max_bytes: int) -> list[dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    filled = 0
    for name, entry in entries.items():
        if shards[-1] and filled + _size(entry) > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = entry
        filled += _size(entry)
    return shards


def _size(entry: tuple[torch.dtype, tuple[int, ...]]) -> int:
    dtype, shape = entry
    return math.prod(shape) * dtype.itemsize


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"
