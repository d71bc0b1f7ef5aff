"""Random numbers without random state: a hash of what they are for.

A number depends on integers that name its use (seed, step, sample, token, channel), never on what was drawn before.
So it is the same under every layout and packing, on CPU and GPU, after a resume, and when a layer is recomputed.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from megatron_anymal.data.global_order import mix64

# Hashed at a time: 8 bytes each, about three times.
_CHUNK = 2**22
# Keeps NEFTune's numbers apart from whatever else is drawn for a seed and a step.
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
    """What NEFTune adds to the language model's input embeddings in training: uniform(-1, 1) times
    alpha / sqrt(L d), with L the document's length and d the hidden size (Jain et al. 2023, Algorithm 1).

    AnyMAL applies it "to the language model" (section E.3), which can be read in two ways. Algorithm 1 adds noise to
    the whole embedded sequence, which here is text and soft tokens alike: the default. Implementations hook the
    table of word embeddings, so that soft tokens put in afterwards stay clean: `where` then leaves these out. L is the
    length of the whole document under both.

    L counts the document's own tokens. Implementations that pad documents to one length take the padded length;
    a document's noise would then depend on which others it is batched with.

    The two answers of a preference pair are two documents, and their noise is drawn apart, as DPO trainers do, which
    run them as two rows of one batch: give them different ids. With one id they would share the numbers wherever they
    have a token at the same place (but not their scale, which follows each one's own L). The reference model is not
    trained: it gets none.

    Args:
        seed, step: of the run; another step draws other noise.
        sample_ids: [T] int64, each token's sample as its place in the global batch; < 0 for padding, which gets 0.
        positions: [T] int64, each token's place in its document.
        document_lengths: [T] int64, tokens of each token's document, padding not counted; anything for padding.
        alpha: NEFTune's scale (AnyMAL: 10).
        hidden_size: d, and the width of the result.
        where: [T] bool, which tokens get noise; None: all but the padding.

    Returns:
        [T, d]. A token's row depends on its own entries alone, so a rank may ask for the tokens that it holds. Besides
        the result, memory is needed for a fixed number of elements at a time.
    """
    noisy = sample_ids >= 0
    if where is not None:
        noisy = noisy & where
    # In double precision, so that rounding to single leaves nothing to how a device takes roots.
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
    """Uniform on [-1, 1): multiples of 2^-23, each exact in single precision.

    Args:
        counters: int64, broadcast together; later ones may be wider at no cost for those before.

    Returns:
        float32 of the counters' common shape.
    """
    return hash64(seed, *counters).bitwise_right_shift_(40).to(torch.float32).mul_(2.0**-23)


def hash64(seed: int, *counters: Tensor) -> Tensor:
    """`mix64(seed, *counters)` of every element of the counters (int64, at least one, broadcast together): the same
    64 bits, as int64.
    """
    state: Any = signed(mix64(seed))
    for counter in counters:
        assert counter.dtype == torch.int64
        state = scramble((counter ^ state).add_(GOLDEN))
    return state


def signed(number: int) -> int:
    """The same 64 bits as torch's int64 holds them."""
    return number - 2**64 if number >= 2**63 else number


GOLDEN, _FIRST, _SECOND = map(signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def scramble(state: Tensor) -> Tensor:
    """SplitMix64's finaliser of each int64; products wrap around."""
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        # torch shifts the sign in: the mask takes it out again.
        state = (state >> shift).bitwise_and_(2 ** (64 - shift) - 1).bitwise_xor_(state).mul_(factor)
    return (state >> 31).bitwise_and_(2**33 - 1).bitwise_xor_(state)
