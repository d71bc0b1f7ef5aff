"""Attention kernels for packed sequences: each document attends only to itself, and to the prompt that it continues.

A kernel is built once per pass from the documents' lengths and then called in every layer. A rank computes a list of
segments, each with some consecutive tokens of a document as queries and the document up to the last of them as keys.
Without context parallelism a segment is a whole document; with it every document has two (data/context_parallel.py).

Two answers can continue the same prompt, which the pack holds once (data/shared_prompts.py): the keys of a segment are
then the prompt and the answer up to the last query. This is the attention of the whole document, prompt and answer in a
row, for the answer's queries only, so a kernel needs no more than a causal mask that is aligned to the last key.

Shapes: T tokens of the pack, Q of them on this rank, n heads, g key/value groups, d head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import Any, Optional, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_anymal.data.context_parallel import held_chunks
from megatron_anymal.data.records import PackedPrompt
from megatron_anymal.data.shared_prompts import NO_PROMPTS

_NO_PROMPT = PackedPrompt(0, 0)


class Attend(Protocol):
    """Attention within the documents of one pack."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: Optional[float]) -> Tensor:
        """query [Q, n, d], key and value [T, g, d] of the whole pack -> [Q, n, d]."""
        ...


@dataclass(frozen=True)
class Segment:
    """`queries` tokens from `first_query` on (in this rank's order) attend causally to the prompt, if there is one, and
    `keys` tokens from `first_key` on (both in pack order): the last query attends to all of them."""

    # First query token, in the order of this rank's tokens.
    first_query: int
    # Number of query tokens.
    queries: int
    # First key token after the prompt, in the order of the pack.
    first_key: int
    # Number of key tokens after the prompt.
    keys: int
    # The prompt; of length 0 without one.
    prompt: PackedPrompt

    @property
    def all_keys(self) -> int:
        """Number of keys, those of the prompt included."""
        return self.prompt.length + self.keys

    def key_index(self) -> Tensor:
        """[all_keys] int64: indices of the keys in the pack."""
        first, length = self.prompt
        return torch.cat(
            [torch.arange(first, first + length), torch.arange(self.first_key, self.first_key + self.keys)]
        )


@dataclass(frozen=True)
class PackedDocuments:
    """The documents of a pack, of which this rank computes a share under context parallelism."""

    # Tokens of each document, in order.
    lengths: Sequence[int]
    # Rank in the context-parallel group.
    context_rank: int = 0
    # Size of the context-parallel group.
    context_size: int = 1
    # Documents, by their position, that continue a prompt within the pack.
    prompts: Mapping[int, PackedPrompt] = field(default_factory=lambda: NO_PROMPTS)

    def prompt(self, number: int) -> PackedPrompt:
        """The prompt that a document continues; of length 0 without one."""
        return self.prompts.get(number, _NO_PROMPT)

    def segments(self) -> list[Segment]:
        """The segments that this rank computes.

        Raises:
            DataError: a document is not padded for `context_size` ranks.
        """
        segments, query = [], 0
        for number, (length, first_key) in enumerate(zip(self.lengths, accumulate(self.lengths, initial=0))):
            for start, stop in held_chunks(length, self.context_rank, self.context_size):
                segments.append(Segment(query, stop - start, first_key, stop, self.prompt(number)))
                query += stop - start
        return segments


class Kernel(Attend, Protocol):
    """An implementation of `Attend`, made for these documents."""

    def __init__(self, documents: PackedDocuments, device: torch.device) -> None: ...


class SdpaKernel:
    """torch's scaled dot-product attention, which runs on every device.

    Segments of similar size are gathered into a batch and padded at the end. Whole documents use `is_causal`, under
    which a document's tokens never attend to the padding after them; chunks of documents, and answers that continue a
    prompt, get masks of their own size.

    Raises:
        DataError: a document is not padded for `context_size` ranks.
    """

    def __init__(self, documents: PackedDocuments, device: torch.device) -> None:
        groups: dict[tuple[int, int, bool], list[Segment]] = {}
        segments = documents.segments()
        for segment in segments:
            size = ((segment.queries - 1).bit_length(), (segment.all_keys - 1).bit_length())
            groups.setdefault((*size, segment.prompt.length > 0), []).append(segment)
        self._buckets = [_Bucket.of(group, device) for group in groups.values()]
        positions, offset = torch.empty(sum(s.queries for s in segments), dtype=torch.int64), 0
        for group, bucket in zip(groups.values(), self._buckets):
            width = bucket.queries.size(1)
            for row, segment in enumerate(group):
                first = offset + row * width
                positions[segment.first_query : segment.first_query + segment.queries] = torch.arange(
                    first, first + segment.queries
                )
            offset += bucket.queries.numel()
        # [Q]: index of each of this rank's tokens in the concatenated buckets.
        self._from_buckets = positions.to(device)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: Optional[float]) -> Tensor:
        """query [Q, n, d], key and value [T, g, d] of the whole pack -> [Q, n, d]."""
        grouped = query.size(1) != key.size(1)
        outputs = []
        for bucket in self._buckets:
            q = _take(query, bucket.queries)
            k, v = (_take(x, bucket.keys) for x in (key, value))
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=bucket.mask, is_causal=bucket.mask is None, scale=scale, enable_gqa=grouped
            )
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        concatenated = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return concatenated.index_select(0, self._from_buckets)


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    """Gather rows of [T, heads, d] by an index [D, L], as [D, heads, L, d]."""
    return tokens.index_select(0, index.flatten()).view(*index.shape, *tokens.shape[1:]).transpose(1, 2)


@dataclass(frozen=True)
class _Bucket:
    """A batch of segments, each padded to the longest by repeating its last token."""

    # [D, Lq] and [D, Lk] int64: indices of the rank's query tokens and of the pack's key tokens.
    queries: Tensor
    keys: Tensor
    # [D, 1, Lq, Lk] bool: the keys that each query attends to; None for `is_causal`.
    mask: Optional[Tensor]

    @staticmethod
    def of(segments: Sequence[Segment], device: torch.device) -> _Bucket:
        first_query, queries, first_key, keys, first_prompt, prompt = torch.tensor(
            [(s.first_query, s.queries, s.first_key, s.all_keys, *s.prompt) for s in segments]
        ).T.unsqueeze(2)
        query_offsets = torch.arange(max(s.queries for s in segments))
        key_offsets = torch.arange(max(s.all_keys for s in segments))
        mask = None
        if any(s.queries != s.all_keys for s in segments):
            sees = (query_offsets + keys - queries)[:, :, None] >= key_offsets
            mask = sees[:, None].to(device)
        offsets = key_offsets.minimum(keys - 1)
        return _Bucket(
            (first_query + query_offsets.minimum(queries - 1)).to(device),
            torch.where(offsets < prompt, first_prompt + offsets, first_key - prompt + offsets).to(device),
            mask,
        )


class FlashKernel:
    """flash-attn's varlen kernel, whose causal mask is aligned to the last key, just like a segment.

    Raises:
        DataError: a document is not padded for `context_size` ranks.
    """

    def __init__(self, documents: PackedDocuments, device: torch.device) -> None:
        segments = documents.segments()
        self._cu_queries = _cumulative([s.queries for s in segments], device)
        self._cu_keys = _cumulative([s.all_keys for s in segments], device)
        self._longest = max(s.queries for s in segments), max(s.all_keys for s in segments)
        # Whole documents are already contiguous; a chunk also needs the keys from its document's beginning, and an
        # answer those of its prompt.
        self._keys: Optional[Tensor] = None
        if documents.context_size > 1 or documents.prompts:
            self._keys = torch.cat([segment.key_index() for segment in segments]).to(device)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: Optional[float]) -> Tensor:
        """query [Q, n, d], key and value [T, g, d] of the whole pack -> [Q, n, d]."""
        from flash_attn import flash_attn_varlen_func

        if self._keys is not None:
            key, value = key[self._keys], value[self._keys]
        return flash_attn_varlen_func(
            query,
            key,
            value,
            cu_seqlens_q=self._cu_queries,
            cu_seqlens_k=self._cu_keys,
            max_seqlen_q=self._longest[0],
            max_seqlen_k=self._longest[1],
            softmax_scale=scale,
            causal=True,
            # Its usual backward pass adds in any order, so that a resumed run would differ.
            deterministic=True,
        )


class FlexKernel:
    """torch's flex attention, which skips blocks of the pack without any document in common.

    Raises:
        DataError: a document is not padded for `context_size` ranks.
    """

    def __init__(self, documents: PackedDocuments, device: torch.device) -> None:
        from torch.nn.attention.flex_attention import create_block_mask

        segments = documents.segments()
        document_of = torch.repeat_interleave(torch.tensor(documents.lengths)).to(device)
        # [T]: where the prompt that a token's document continues begins and ends; both 0 without one.
        prompts = [documents.prompt(number) for number in range(len(documents.lengths))]
        first = torch.tensor([prompt.first for prompt in prompts], device=device)[document_of]
        stop = torch.tensor([prompt.first + prompt.length for prompt in prompts], device=device)[document_of]
        # Position of each query in the pack: a segment's last query is its last key.
        positions = torch.cat(
            [torch.arange(s.first_key + s.keys - s.queries, s.first_key + s.keys) for s in segments]
        ).to(device)

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            position = positions[query]
            in_prompt = (first[position] <= key) & (key < stop[position])
            return ((document_of[position] == document_of[key]) & (position >= key)) | in_prompt

        self._mask = create_block_mask(sees, None, None, len(positions), len(document_of), device=str(device))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: Optional[float]) -> Tensor:
        """query [Q, n, d], key and value [T, g, d] of the whole pack -> [Q, n, d]."""
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        out = _flex()(q, k, v, block_mask=self._mask, scale=scale, enable_gqa=query.size(1) != key.size(1))
        return out.squeeze(0).transpose(0, 1)


@cache
def _flex() -> Any:
    """Return flex attention compiled, because the eager version would materialize the whole score matrix."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _cumulative(sizes: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(accumulate(sizes, initial=0)), dtype=torch.int32, device=device)


KERNELS: dict[str, type[Kernel]] = {"sdpa": SdpaKernel, "flash_attn": FlashKernel, "flex": FlexKernel}
