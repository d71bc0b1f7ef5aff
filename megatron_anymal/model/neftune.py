"""Counter-based random numbers (without RNG state), and NEFTune's noise.

A number is a hash of integers that identify its use (seed, step, sample, token, channel); it never depends on earlier
draws. So it is the same under every layout and packing, on CPU and GPU, after a resume, and when a layer is recomputed.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from megatron_anymal.data.global_order import mix64

# Elements hashed at a time; each takes about three times 8 bytes.
_CHUNK = 2**22
# Separates NEFTune's numbers from others drawn for the same seed and step.
_NEFTUNE = int.from_bytes(b"NEFTune", "big")


def neftune_noise(
    seed: int,
    step: int,
    sample_ids: Tensor,
    positions: Tensor,
    document_lengths: Tensor,
    alpha: float,
    hidden_size: int,
    dtype: torch.dtype,
    where: Optional[Tensor] = None,
) -> Tensor:
    """Compute NEFTune's noise for the language model's input embeddings in training: uniform(-1, 1) times
    alpha / sqrt(L d), with L the document's length and d the hidden size (Jain et al. 2023, Algorithm 1).

    AnyMAL applies it "to the language model" (section E.3), which can be read in two ways. Algorithm 1 adds noise to
    the whole embedded sequence, which here comprises text and soft tokens: the default. Existing implementations hook
    the word embedding table, so that soft tokens inserted later stay clean: `where` then excludes them. L is the length
    of the whole document in both cases.

    L counts the document's own tokens. Implementations that pad documents to one length use the padded length, which
    makes a document's noise depend on the others in its batch.

    The two answers of a preference pair are two documents with independent noise, as in DPO trainers, which run them as
    two rows of one batch: give them different ids. With the same id they would share the numbers at equal positions
    (but not the scale, which depends on each document's L). The reference model is not trained and gets no noise.

    Args:
        seed: of the run.
        step: every step draws different noise.
        sample_ids: [T] int64, position of each token's sample in the global batch; < 0 for padding, which gets 0.
        positions: [T] int64, each token's position in its document.
        document_lengths: [T] int64, length of each token's document without padding; arbitrary for padding tokens.
        alpha: NEFTune's scale (AnyMAL: 10).
        hidden_size: d, and the width of the result.
        where: [T] bool, tokens that get noise; None for all except padding.

    Returns:
        [T, d]. A token's row depends only on its own entries, so a rank may pass just the tokens that it holds. Working
        memory beyond the result is bounded by a fixed number of elements.
    """
    noisy = sample_ids >= 0
    if where is not None:
        noisy = noisy & where
    # In double precision, so that rounding to single hides device differences in the square root.
    scale = alpha / (document_lengths * hidden_size).double().sqrt()
    scale = torch.where(noisy, scale, 0.0).float().unsqueeze(1)
    channels = torch.arange(hidden_size, device=sample_ids.device)
    key = mix64(seed, step, _NEFTUNE)
    noise = torch.empty(len(sample_ids), hidden_size, dtype=dtype, device=sample_ids.device)
    rows = max(1, _CHUNK // hidden_size)
    for start in range(0, len(noise), rows):
        part = slice(start, start + rows)
        drawn = uniform(key, sample_ids[part, None], positions[part, None], channels)
        noise[part] = drawn.mul_(scale[part])
    return noise


def uniform(seed: int, *counters: Tensor) -> Tensor:
    """Draw uniformly from [-1, 1): multiples of 2^-23, each exact in single precision.

    Args:
        counters: int64 of any shape, broadcast together; narrow ones come first, since each is hashed at the width
            reached so far.

    Returns:
        float32, the shape of the broadcast counters.
    """
    return hash64(seed, *counters).bitwise_right_shift_(40).to(torch.float32).mul_(2.0**-23)


def hash64(seed: int, *counters: Tensor) -> Tensor:
    """Compute `mix64(seed, *counters)` elementwise; the same 64 bits, as int64.

    Args:
        counters: int64 of any shape, at least one, broadcast together.

    Returns:
        int64, the shape of the broadcast counters.
    """
    state: Any = signed(mix64(seed))
    for counter in counters:
        assert counter.dtype == torch.int64
        state = scramble((counter ^ state).add_(GOLDEN))
    return state


def signed(number: int) -> int:
    """Reinterpret an unsigned 64-bit integer as torch's int64."""
    return number - 2**64 if number >= 2**63 else number


GOLDEN, _FIRST, _SECOND = map(signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def scramble(state: Tensor) -> Tensor:
    """Apply SplitMix64's finalizer to each int64, in any shape; products wrap around."""
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        # torch shifts arithmetically: the mask removes the sign bits.
        state = (state >> shift).bitwise_and_(2 ** (64 - shift) - 1).bitwise_xor_(state).mul_(factor)
    return (state >> 31).bitwise_and_(2**33 - 1).bitwise_xor_(state)
