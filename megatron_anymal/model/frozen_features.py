"""Features of media from a frozen encoder, a cache or another pipeline stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Optional, Protocol

import torch
from torch import Tensor

from megatron_anymal.data.feature_cache import PieceKey
from megatron_anymal.data.micro_batch import MediaBatch

# Name of the timer of encoders' forward passes within those of the model (train/pass_times.py).
ENCODING = "media-encoding"

# Takes a modality's name, the keys of pieces [n], and their features [n, F, w].
StoreFeatures = Callable[[str, Sequence[Optional[PieceKey]], Tensor], None]


def store_nowhere(name: str, keys: Sequence[Optional[PieceKey]], features: Tensor) -> None:
    """Drop the features [n, F, w]: without a cache."""


class Timer(Protocol):
    """Counts the time between `start` and `stop`, as megatron-core's timers do."""

    def start(self) -> None:
        """Begin a section."""

    def stop(self) -> None:
        """End the section."""


def encode(encoder: Any, pieces: Tensor, pieces_per_call: int, timer: Optional[Timer] = None) -> Tensor:
    """Encode pieces [n, *piece_shape] in calls of bounded size.

    Args:
        timer: of the encoder's forward passes.

    Returns:
        [n, F, w].
    """
    if timer is not None:
        timer.start()
    encoded = torch.cat([encoder(chunk) for chunk in pieces.split(pieces_per_call)])
    if timer is not None:
        timer.stop()
    return encoded


@torch.no_grad()
def frozen_features(
    name: str,
    encoder: Any,
    media: MediaBatch,
    pieces_per_call: int,
    store: StoreFeatures = store_nowhere,
    timer: Optional[Timer] = None,
) -> Tensor:
    """Features of this rank's share of the pieces; those that are known already are not encoded.

    Args:
        name: the modality's name.
        media: on the encoder's device.
        pieces_per_call: maximum number of pieces per encoder call.
        store: gets the features of pieces that a cache lacks.
        timer: of the encoder's forward passes.

    Returns:
        [own share, F, w] in the encoder's dtype.
    """
    if media.encoded is not None:
        return media.encoded
    cached = media.features
    if not len(media.pieces):
        nothing = media.pieces.new_empty(0, encoder.feature_tokens, encoder.width, dtype=encoder.dtype)
        return nothing if cached is None else cached.rows
    encoded = encode(encoder, media.pieces, pieces_per_call, timer)
    if cached is None:
        return encoded
    store(name, cached.keys, encoded)
    return cached.with_encoded(encoded)
