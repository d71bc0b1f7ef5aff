"""Counter-based noise against its scalar counterpart, transformers' NEFTune, and statistical tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.neftune import neftune_post_forward_hook

from megatron_anymal.data.global_order import mix64
from megatron_anymal.model import neftune as neftune_module
from megatron_anymal.model.neftune import hash64, neftune_noise, signed, uniform

WIDE = 2**20
# Sample -> length. All statistics below use fixed numbers: no test depends on chance.
LENGTHS = {4: 9, 1: 1, 6: 14}
# Key of the noise that `neftune` below draws.
KEY = mix64(7, 11, int.from_bytes(b"NEFTune", "big"))


def places(lengths: dict[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Sample, position and document length of each token of concatenated documents."""
    samples = torch.cat([torch.full((n,), sample) for sample, n in lengths.items()])
    positions = torch.cat([torch.arange(n) for n in lengths.values()])
    of_document = torch.cat([torch.full((n,), n) for n in lengths.values()])
    return samples, positions, of_document


def neftune(tokens: Sequence[Tensor], hidden_size: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    sample_ids, positions, document_lengths = tokens
    return neftune_noise(7, 11, sample_ids, positions, document_lengths, 10.0, hidden_size, dtype)


def correlation(x: Tensor, y: Tensor) -> float:
    """Correlation in standard deviations of that of independent numbers."""
    assert x.numel() == y.numel()
    return float((x.double() * y.double()).mean() * 3 * math.sqrt(x.numel()))


def chi_square(bins: Tensor, count: int) -> float:
    """Chi-square statistic in standard deviations of that of uniform numbers."""
    expected = bins.numel() / count
    statistic = ((torch.bincount(bins, minlength=count) - expected).square() / expected).sum()
    return float((statistic - (count - 1)) / math.sqrt(2 * (count - 1)))


# ------------------------------------------------------------------------------------------------ the hash


@pytest.mark.parametrize("seed", [0, 7, -3, 2**64 - 1])
def test_hash_is_the_scalar_one_of_each_element(seed: int) -> None:
    first = torch.tensor([0, 1, -1, 5, 2**62, -(2**63)])
    second = torch.tensor([0, 3, 2**63 - 1])
    hashes = hash64(seed, first[:, None], second)
    assert hashes.tolist() == [[signed(mix64(seed, a, b)) for b in second.tolist()] for a in first.tolist()]


def test_uniform_is_the_upper_24_bits() -> None:
    counters = torch.arange(1000)
    expected = []
    for k in range(1000):
        upper = mix64(3, k) >> 40
        expected.append((upper - 2**24 if upper >= 2**23 else upper) / 2**23)
    numbers = uniform(3, counters)
    assert numbers.dtype == torch.float32
    assert numbers.double().tolist() == expected


def test_counters_are_left_as_they_are() -> None:
    counters = torch.arange(5)
    hash64(1, counters, counters)
    assert counters.tolist() == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------------------------------------- statistics


MANY, FEW, NONE = torch.arange(WIDE), torch.arange(2**10), torch.zeros((), dtype=torch.int64)
# Consecutive numbers along each of the counters.
STREAMS: dict[str, Callable[[], Tensor]] = {
    "along the first": lambda: uniform(0, MANY, NONE, NONE),
    "along the second": lambda: uniform(0, NONE, MANY, NONE),
    "along the last": lambda: uniform(0, NONE, NONE, MANY),
    "along both": lambda: uniform(0, FEW[:, None], FEW).flatten(),
    "along even numbers": lambda: uniform(0, MANY * 2),
    "along multiples of 2^32": lambda: uniform(0, MANY * 2**32),
    "along seeds": lambda: torch.stack([uniform(seed, FEW) for seed in range(2**10)]).flatten(),
    "along steps": lambda: torch.stack([uniform(mix64(7, step), FEW) for step in range(2**10)]).flatten(),
}


@pytest.mark.parametrize("name", list(STREAMS))
def test_numbers_are_even_and_do_not_follow_from_their_neighbours(name: str) -> None:
    x = STREAMS[name]().double()
    assert x.numel() == WIDE and -1 <= x.min() < -0.9999 and 0.9999 < x.max() < 1
    assert abs(x.mean()) < 4 * math.sqrt(1 / 3 / WIDE)
    assert abs(x.var() - 1 / 3) < 4 * math.sqrt(4 / 45 / WIDE)
    whole = (x * 2**23).long() + 2**23
    assert abs(chi_square(whole >> 16, 256)) < 4
    assert abs(chi_square(whole & 255, 256)) < 4
    for distance in (1, 2, 3, 64, 1024):
        assert abs(correlation(x[:-distance], x[distance:])) < 4
        pairs = (whole[:-distance] >> 20) * 16 + (whole[distance:] >> 20)
        assert abs(chi_square(pairs, 256)) < 4


def test_every_counter_bit_changes_half_of_the_bits() -> None:
    counters = torch.arange(2000)
    base = hash64(5, counters, counters)
    for bit in range(63):
        for changed in (hash64(5, counters ^ (1 << bit), counters), hash64(5, counters, counters ^ (1 << bit))):
            flipped = torch.stack([(base ^ changed) >> k & 1 for k in range(64)]).double().mean(1)
            assert (flipped - 0.5).abs().max() < 5 * 0.5 / math.sqrt(2000)


def test_seeds_steps_and_swapped_counters_are_unrelated() -> None:
    a, b = torch.arange(1024)[:, None], torch.arange(1024)
    base = uniform(0, a, b)
    for other in (uniform(1, a, b), uniform(2**32, a, b), uniform(0, b, a), uniform(mix64(0, 1), a, b)):
        # Swapping the counters leaves the diagonal unchanged by design.
        assert abs(correlation(base.triu(1), other.triu(1))) < 4
    tokens = torch.arange(64)
    samples, lengths = torch.zeros(64, dtype=torch.int64), torch.full((64,), 64)
    draws = [
        neftune_noise(seed, step, samples + sample, tokens, lengths, 512.0, 4096, torch.float32)
        for seed, step, sample in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]
    ]
    for k, one in enumerate(draws):
        # alpha = sqrt(L d): the raw noise
        assert abs(correlation(one, one) / 512 - 1) < 0.01
        assert all(abs(correlation(one, other)) < 4 for other in draws[:k])


# ------------------------------------------------------------------------------------------------ NEFTune


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    samples, positions, lengths = places(LENGTHS)
    noise = neftune((samples, positions, lengths), 48, dtype)
    assert noise.dtype == dtype and noise.shape == (24, 48)
    numbers = uniform(KEY, samples[:, None], positions[:, None], torch.arange(48)).double()
    expected = []
    for document, n in zip(numbers.split(list(LENGTHS.values())), LENGTHS.values()):
        monkeypatch.setattr(Tensor, "uniform_", drawn(document))
        module: Any = SimpleNamespace(training=True, neftune_noise_alpha=10.0)
        expected.append(neftune_post_forward_hook(module, None, torch.zeros(1, n, 48, dtype=torch.float64))[0])
    torch.testing.assert_close(noise.double(), torch.cat(expected), rtol=1e-6, atol=0)


def drawn(numbers: Tensor) -> Any:
    """Stands in for torch's uniform_ and uses the given numbers in [-1, 1)."""
    assert 0.9 < numbers.abs().max() <= 1

    def uniform_(self: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return self.copy_((numbers + 1) / 2 * (high - low) + low)

    return uniform_


def test_each_number_comes_from_its_own_place() -> None:
    noise = neftune(places(LENGTHS), 48)
    for row, sample, position, channel in [(0, 4, 0, 0), (8, 4, 8, 47), (9, 1, 0, 3), (23, 6, 13, 20)]:
        number = (signed(mix64(KEY, sample, position, channel)) >> 40) / 2**23
        scale = 10 / math.sqrt(LENGTHS[sample] * 48)
        assert float(noise[row, channel]) == pytest.approx(number * scale, rel=2e-7)


def test_padding_and_tokens_left_out_get_nothing() -> None:
    samples, positions, lengths = places(LENGTHS)
    # Padding inside a document and after the last one; its document length is unknown.
    padding = torch.tensor([8, 22, 23])
    samples[padding], lengths[padding] = -1, 0
    noise = neftune((samples, positions, lengths), dtype=torch.bfloat16)
    assert noise.dtype == torch.bfloat16 and noise.isfinite().all()
    assert (noise[padding] == 0).all() and (noise != 0).any(1).sum() == 21
    text = torch.arange(24) % 3 > 0
    masked = neftune_noise(7, 11, samples, positions, lengths, 10.0, 16, torch.bfloat16, where=text)
    assert torch.equal(masked, torch.where(text[:, None], noise, 0))


@pytest.mark.parametrize("chunk", [1, 100, 2**22])
def test_noise_does_not_depend_on_split_order_or_chunks(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    tokens = places({**LENGTHS, 2: 40})
    whole = neftune(tokens)
    monkeypatch.setattr(neftune_module, "_CHUNK", chunk)
    assert torch.equal(neftune(tokens), whole)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for held in (order, torch.arange(10, 30), torch.arange(0, 64, 7), torch.arange(0)):
        part = neftune([x[held] for x in tokens])
        assert torch.equal(part, whole[held])


def test_noise_neither_reads_nor_moves_a_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = neftune(places(LENGTHS))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(neftune(places(LENGTHS)), one)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_gives_the_same_numbers(dtype: torch.dtype) -> None:
    tokens = places({0: 700, 1: 1, 2: 323})
    on_gpu = neftune([x.cuda() for x in tokens], 8192, dtype)
    assert torch.equal(on_gpu.cpu(), neftune(tokens, 8192, dtype))
