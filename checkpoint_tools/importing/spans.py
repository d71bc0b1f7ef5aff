"""Where the bytes of our weights lie in HuggingFace's files, and how they are read: in small parts, ahead of their use.

Every weight of ours is made of whole rows of HuggingFace's, so that an import only moves bytes.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from transformers import LlamaConfig

from megatron_anymal.hf_weights import HFWeights
from megatron_anymal.model.hf_llama import hf_names

# Bytes read at a time; two such parts are in memory.
_PART = 1 << 23


@dataclass(frozen=True)
class Span:
    """Bytes behind one another in a HuggingFace tensor."""

    name: str
    begin: int
    size: int


def chunks_of(name: str, hf: LlamaConfig, source: HFWeights) -> list[tuple[int, list[Span]]]:
    """One of our whole weights as a checkpoint's chunks: the first row of each, and where its bytes are, in order.

    They are those of `megatron_anymal.model.hf_llama.chunks_from_hf`.
    """
    names = hf_names(name, hf)
    if name.endswith("linear_qkv.weight"):
        groups = hf.num_key_value_heads
        sizes = [source.entry(part).size // groups for part in names]
        # Of each group its query heads, its key head and its value head.
        return [
            (0, [Span(part, group * size, size) for group in range(groups) for part, size in zip(names, sizes)]),
        ]
    chunks, row = [], 0
    for part in names:
        entry = source.entry(part)
        chunks.append((row, [Span(part, 0, entry.size)]))
        row += entry.shape[0]
    return chunks


def parts_of(spans: Sequence[Span]) -> list[Span]:
    """The same bytes in parts that are read at once."""
    return [
        Span(span.name, begin, min(_PART, span.begin + span.size - begin))
        for span in spans
        for begin in range(span.begin, span.begin + span.size, _PART)
    ]


def read_ahead(parts: Sequence[Span], source: HFWeights) -> Generator[memoryview, None, None]:
    """The bytes of each part; while one is used, a thread reads the next. A part lasts until the next is asked for.

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
        coming = reader.submit(read, 0) if parts else None
        for number in range(len(parts)):
            assert coming is not None
            values = coming.result()
            coming = reader.submit(read, number + 1) if number + 1 < len(parts) else None
            yield values
