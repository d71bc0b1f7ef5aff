"""Byte ranges of the trainer's weights in HuggingFace files, and a reader that prefetches them in small parts.

Every weight of the trainer consists of whole rows of HuggingFace tensors, so an import only moves bytes.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from transformers import LlamaConfig

from megatron_anymal.hf_weights import HFWeights
from megatron_anymal.model.hf_llama import hf_names

# Bytes per read; two such parts are in memory.
_PART = 1 << 23


@dataclass(frozen=True)
class ByteSpan:
    """Contiguous bytes of a HuggingFace tensor."""

    name: str
    begin: int
    size: int


def chunks_of(name: str, hf: LlamaConfig, source: HFWeights) -> list[tuple[int, list[ByteSpan]]]:
    """Checkpoint chunks of one of the trainer's whole weights: the first row of each, and its byte spans in order.

    The chunks match those of `megatron_anymal.model.hf_llama.chunks_from_hf`.
    """
    names = hf_names(name, hf)
    if name.endswith("linear_qkv.weight"):
        groups = hf.num_key_value_heads
        sizes = [source.entry(part).size // groups for part in names]
        # Per group: query heads, key head, value head.
        return [
            (0, [ByteSpan(part, group * size, size) for group in range(groups) for part, size in zip(names, sizes)]),
        ]
    chunks, row = [], 0
    for part in names:
        entry = source.entry(part)
        chunks.append((row, [ByteSpan(part, 0, entry.size)]))
        row += entry.shape[0]
    return chunks


def parts_of(spans: Sequence[ByteSpan]) -> list[ByteSpan]:
    """Split spans into parts of at most `_PART` bytes."""
    return [
        ByteSpan(span.name, begin, min(_PART, span.begin + span.size - begin))
        for span in spans
        for begin in range(span.begin, span.begin + span.size, _PART)
    ]


def read_ahead(parts: Sequence[ByteSpan], source: HFWeights) -> Generator[memoryview, None, None]:
    """Yield the bytes of each part while a thread reads the next; a buffer is valid until the next is requested.

    Raises:
        TensorFileError: a file is damaged or cannot be read.
    """
    largest = max((part.size for part in parts), default=0)
    buffers = [memoryview(bytearray(largest)) for _ in range(2)]

    def read(number: int) -> memoryview:
        part = parts[number]
        target = buffers[number % 2][: part.size]
        source.read_into(part.name, part.begin, target)
        return target

    with ThreadPoolExecutor(1) as reader:
        pending = reader.submit(read, 0) if parts else None
        for number in range(len(parts)):
            assert pending is not None
            values = pending.result()
            pending = reader.submit(read, number + 1) if number + 1 < len(parts) else None
            yield values
