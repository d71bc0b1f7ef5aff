"""Distribution of a pack's tokens over context-parallel ranks.

Each document (each span, if pairs share a prompt: data/shared_prompts.py) is cut into 2 x size equal chunks and rank r
holds chunks r and 2 x size - 1 - r, which balances the work of causal attention (the order of Transformer Engine and
Megatron-Core for packed sequences).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_anymal.data.records import DataError

if TYPE_CHECKING:
    from torch import Tensor


def document_multiple(context_size: int) -> int:
    """The number that each document's length in a pack must be a multiple of."""
    return 2 * context_size if context_size > 1 else 1


def padded(length: Any, multiple: int) -> Any:
    """Round a length, or an array of lengths, up to a multiple."""
    return -(-length // multiple) * multiple


def held_chunks(length: int, context_rank: int, context_size: int) -> list[tuple[int, int]]:
    """[start, stop) of the chunks of one document that a rank holds, in their order on the rank.

    Raises:
        DataError: the document is not padded for this many ranks.
    """
    if context_size == 1:
        return [(0, length)]
    chunk, rest = divmod(length, document_multiple(context_size))
    if rest:
        raise DataError(
            f"A document of {length} tokens cannot be split over {context_size} context-parallel ranks: its length in "
            f"the pack must be a multiple of {document_multiple(context_size)}. Pad it, or set "
            "model.context_parallel_size=1."
        )
    return [(k * chunk, (k + 1) * chunk) for k in (context_rank, 2 * context_size - 1 - context_rank)]


def held_tokens(lengths: Sequence[int], context_rank: int, context_size: int) -> Tensor:
    """[T / size] int64: indices of the pack's tokens that a rank holds, in their order on the rank.

    Raises:
        DataError: a document is not padded for this many ranks.
    """
    import torch

    chunks, offset = [], 0
    for length in lengths:
        for start, stop in held_chunks(length, context_rank, context_size):
            chunks.append(torch.arange(offset + start, offset + stop))
        offset += length
    return torch.cat(chunks)
