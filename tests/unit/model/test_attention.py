"""Packed attention against SDPA with an explicit block-diagonal causal mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_anymal.model.attention import DocumentPack, PackedAttention, document_pack

HEAD = 8
INV_FREQ = 100.0 ** (-torch.arange(0, HEAD, 2, dtype=torch.float64) / HEAD)


def packed(lengths: list[int], *more: str) -> DocumentPack:
    return document_pack(lengths, torch.device("cpu"), INV_FREQ, *more)


def turned(x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """RoPE as a complex product; channel i is the real part and channel i + d / 2 the imaginary part."""
    places = torch.cat([torch.arange(length, dtype=torch.float64) for length in lengths])
    angles = torch.outer(places, INV_FREQ)[:, None, None]
    real, imaginary = x.double().chunk(2, -1)
    out = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([out.real, out.imag], -1).to(x.dtype)


def attention(heads: int, groups: int, scale: float | None = None) -> PackedAttention:
    config = TransformerConfig(
        num_layers=1, hidden_size=heads * HEAD, num_attention_heads=heads, num_query_groups=groups, kv_channels=HEAD
    )
    return PackedAttention(config, layer_number=1, softmax_scale=scale)


def masked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], scale: float | None
) -> torch.Tensor:
    """[T, 1, heads * d]: SDPA with an explicit mask over all pairs of tokens."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    positions = torch.arange(len(document))
    mask = (document[:, None] == document[None]) & (positions[:, None] >= positions[None])
    query, key = turned(query, lengths), turned(key, lengths)
    repeat = query.size(2) // key.size(2)
    q, k, v = query, key.repeat_interleave(repeat, 2), value.repeat_interleave(repeat, 2)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.permute(2, 0, 1, 3).flatten(2)


LENGTHS = [
    [1],
    [7],
    [1, 1, 1],
    [3, 4, 5, 8, 9],
    [64, 1, 63, 33, 2],
    [5, 17, 1, 100, 16, 15, 1],
    *[torch.randint(1, 40, (9,), generator=torch.Generator().manual_seed(s)).tolist() for s in range(5)],
]


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: "-".join(map(str, lengths)))
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_outputs_and_gradients(lengths: list[int], heads: int, groups: int, scale: float | None) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = [(sum(lengths), 1, n, HEAD) for n in (heads, groups, groups)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    twins = [x.detach().clone().requires_grad_() for x in inputs]
    pack = packed(lengths)
    out = attention(heads, groups, scale)(*inputs, None, packed_seq_params=pack)
    expected = masked(*twins, lengths, scale)
    torch.testing.assert_close(out, expected)
    direction = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    out.backward(direction)
    expected.backward(direction)
    for mine, theirs in zip(inputs, twins):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: "-".join(map(str, lengths)))
def test_positions_restart_with_each_document(lengths: list[int]) -> None:
    pack, thd = packed(lengths), packed(lengths, "transformer_engine")
    assert pack.rotation is not None and thd.rotation is not None and thd.cu_seqlens_q is not None
    places = torch.tensor([position for length in lengths for position in range(length)], dtype=torch.float64)
    for turn in (pack.rotation, thd.rotation):
        torch.testing.assert_close(turn.cos[:, 0, : HEAD // 2], torch.outer(places, INV_FREQ).cos())
    assert (pack.qkv_format, thd.qkv_format) == ("sbhd", "thd") and thd.kernel is None
    assert thd.cu_seqlens_q.tolist() == [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    assert thd.cu_seqlens_q.dtype == torch.int32 and thd.max_seqlen_q == max(lengths)


def test_a_document_alone_gives_the_same_as_in_a_pack() -> None:
    lengths = [9, 30, 12]
    query, key, value = (torch.randn(51, 1, 2, HEAD) for _ in range(3))
    module = attention(2, 2)
    together = module(query, key, value, None, packed_seq_params=packed(lengths))
    start = 0
    for length in lengths:
        span = slice(start, start + length)
        out = module(query[span], key[span], value[span], None, packed_seq_params=packed([length]))
        torch.testing.assert_close(together[span], out)
        start += length
