"""Every attention kernel, for every context-parallel rank, against attention with an explicit mask."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_anymal.data.context_parallel import held_tokens
from megatron_anymal.data.records import DataError, PackedPrompt
from megatron_anymal.data.shared_prompts import NO_PROMPTS
from megatron_anymal.model import attention_kernels
from megatron_anymal.model.attention_kernels import PackedDocuments

HEAD = 16
PACKS = [[8], [16, 8, 40], [64, 8, 8, 24], [8] * 7]


# Lengths of spans, and which of them continue a prompt; with context parallelism prompts are padded.
PAIRS: list[tuple[list[int], dict[int, PackedPrompt]]] = [
    ([24, 8, 16], {1: PackedPrompt(0, 24), 2: PackedPrompt(0, 24)}),
    ([16, 40, 8, 8, 16], {2: PackedPrompt(16, 37), 3: PackedPrompt(16, 37)}),
    (
        [8, 8, 8, 64, 16, 8, 24],
        {1: PackedPrompt(0, 1), 2: PackedPrompt(0, 1), 4: PackedPrompt(24, 60), 5: PackedPrompt(24, 60)},
    ),
]


def by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    scale: float | None,
    prompts: Mapping[int, PackedPrompt] = NO_PROMPTS,
) -> Tensor:
    """[T, n, d]: softmax over the current and earlier tokens of the same document, and the prompt that it continues."""
    document = torch.repeat_interleave(torch.tensor(lengths))
    positions = torch.arange(len(document))
    unseen = (document[:, None] != document) | (positions[:, None] < positions)
    for number, (first, length) in prompts.items():
        unseen[(document == number).nonzero(), torch.arange(first, first + length)] = False
    repeat = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = torch.einsum("ihd,jhd->hij", query, key) * (scale or 1 / math.sqrt(HEAD))
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(unseen, -math.inf).softmax(-1), value)


def flash_by_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    causal: bool,
    deterministic: bool,
) -> Tensor:
    """flash_attn_varlen_func as documented: with `causal`, the mask is aligned to the bottom right."""
    assert causal and deterministic and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    outputs, repeat = [], q.size(1) // k.size(1)
    queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert max_seqlen_q == max(b - a for a, b in itertools.pairwise(queries))
    assert max_seqlen_k == max(b - a for a, b in itertools.pairwise(keys))
    for a, b, c, d in zip(queries, queries[1:], keys, keys[1:]):
        key, value = k[c:d].repeat_interleave(repeat, 1), v[c:d].repeat_interleave(repeat, 1)
        scores = torch.einsum("ihd,jhd->hij", q[a:b], key) * (softmax_scale or 1 / math.sqrt(q.size(-1)))
        unseen = torch.arange(d - c) > torch.arange(b - a)[:, None] + (d - c) - (b - a)
        outputs.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(unseen, -math.inf).softmax(-1), value))
    return torch.cat(outputs)


@pytest.fixture(params=["sdpa", "flash_attn", "flex"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Kernel name; flash-attn is replaced by its definition, flex attention runs uncompiled."""
    if request.param == "flash_attn":
        module: Any = ModuleType("flash_attn")
        module.flash_attn_varlen_func = flash_by_definition
        monkeypatch.setitem(sys.modules, "flash_attn", module)
    if request.param == "flex":
        from torch.nn.attention.flex_attention import flex_attention

        monkeypatch.setattr(attention_kernels, "_flex", lambda: flex_attention)
    return request.param


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("lengths", PACKS, ids=lambda lengths: "-".join(map(str, lengths)))
@pytest.mark.parametrize(("heads", "groups", "scale"), [(4, 4, None), (4, 2, 0.3)])
def test_outputs(kernel: str, size: int, lengths: list[int], heads: int, groups: int, scale: float | None) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    query, key, value = (torch.randn(sum(lengths), n, HEAD, generator=generator) for n in (heads, groups, groups))
    expected = by_definition(query, key, value, lengths, scale)
    for rank in range(size):
        held = held_tokens(lengths, rank, size)
        attend = attention_kernels.KERNELS[kernel](PackedDocuments(lengths, rank, size), torch.device("cpu"))
        torch.testing.assert_close(attend(query[held], key, value, scale), expected[held], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("lengths, prompts", PAIRS)
def test_answers_see_their_prompt_and_themselves(
    kernel: str, size: int, lengths: list[int], prompts: dict[int, PackedPrompt]
) -> None:
    query, key, value = (torch.randn(sum(lengths), n, HEAD) for n in (4, 2, 2))
    expected = by_definition(query, key, value, lengths, None, prompts)
    for rank in range(size):
        held = held_tokens(lengths, rank, size)
        attend = attention_kernels.KERNELS[kernel](PackedDocuments(lengths, rank, size, prompts), torch.device("cpu"))
        torch.testing.assert_close(attend(query[held], key, value, None), expected[held], rtol=1e-5, atol=1e-5)


def test_an_answer_and_its_prompt_are_one_document() -> None:
    """Attention of the whole documents, prompt and answer in a row, is the oracle."""
    prompt, chosen, rejected = 24, 8, 16
    parts = [torch.randn(prompt + chosen + rejected, n, HEAD, dtype=torch.float64) for n in (4, 2, 2)]
    prompts = {1: PackedPrompt(0, prompt), 2: PackedPrompt(0, prompt)}
    documents = PackedDocuments([prompt, chosen, rejected], prompts=prompts)
    kernel = attention_kernels.SdpaKernel(documents, torch.device("cpu"))
    shared = kernel(*parts, None).split([prompt, chosen, rejected])
    for number, answer in ((1, slice(prompt, prompt + chosen)), (2, slice(prompt + chosen, None))):
        whole = [torch.cat([x[:prompt], x[answer]]) for x in parts]
        alone = by_definition(*whole, [len(whole[0])], None)
        torch.testing.assert_close(torch.cat([shared[0], shared[number]]), alone)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("lengths, prompts", [*((lengths, NO_PROMPTS) for lengths in PACKS), *PAIRS])
def test_gradients_of_all_ranks_add_up(size: int, lengths: list[int], prompts: Mapping[int, PackedPrompt]) -> None:
    whole = [torch.randn(sum(lengths), n, HEAD, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2)]
    direction = torch.randn(sum(lengths), 4, HEAD, dtype=torch.float64)
    by_definition(*whole, lengths, None, prompts).backward(direction)
    expected = [x.grad for x in whole]
    split = [x.detach().clone().requires_grad_() for x in whole]
    for rank in range(size):
        held = held_tokens(lengths, rank, size)
        attend = attention_kernels.SdpaKernel(PackedDocuments(lengths, rank, size, prompts), torch.device("cpu"))
        attend(split[0][held], split[1], split[2], None).backward(direction[held])
    for mine, theirs in zip(split, expected):
        torch.testing.assert_close(mine.grad, theirs)


@pytest.mark.parametrize("lengths", PACKS, ids=lambda lengths: "-".join(map(str, lengths)))
def test_ranks_have_the_same_work(lengths: list[int]) -> None:
    def work(rank: int) -> int:
        # Query-key pairs that a rank computes.
        return sum(
            s.queries * (s.keys - s.queries) + s.queries * (s.queries + 1) // 2
            for s in PackedDocuments(lengths, rank, 4).segments()
        )

    assert len({work(rank) for rank in range(4)}) == 1
    assert sum(work(rank) for rank in range(4)) == sum(n * (n + 1) // 2 for n in lengths)


def test_masks_are_never_as_large_as_the_pack() -> None:
    lengths = [256] * 16
    kernel = attention_kernels.SdpaKernel(PackedDocuments(lengths, 0, 2), torch.device("cpu"))
    masks = sum(bucket.mask.numel() for bucket in kernel._buckets if bucket.mask is not None)
    # Half of each document's queries with all of its keys; a mask over the pack would have 4096 x 4096 pairs.
    assert masks <= 16 * 64 * 256 * 2
    whole = attention_kernels.SdpaKernel(PackedDocuments(lengths), torch.device("cpu"))
    assert all(bucket.mask is None for bucket in whole._buckets)


def test_a_pack_that_is_not_padded_for_context_parallelism_is_refused() -> None:
    with pytest.raises(DataError, match=r"document of 10 tokens .* 4 context-parallel ranks.*multiple of 8"):
        attention_kernels.SdpaKernel(PackedDocuments([16, 10], 0, 4), torch.device("cpu"))
