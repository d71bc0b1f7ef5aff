"""Identity encoder: the modality's pieces are the features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_anymal.config import ConfigError, EncoderConfig
from megatron_anymal.model.encoders.base import Encoder, register_encoder


@register_encoder("identity")
class IdentityEncoder(Encoder):
    """Returns a piece [..., width] as features: the last dimension is their width, the others are flattened.

    Raises:
        ConfigError: a path or shape is configured, or pieces have fewer than two dimensions.
    """

    def __init__(self, config: EncoderConfig, piece_shape: tuple[int, ...]) -> None:
        super().__init__(config, piece_shape)
        if config.path or config.config:
            raise ConfigError(
                "The identity encoder has neither weights nor a shape. Leave encoder.path and encoder.config empty."
            )
        if len(piece_shape) < 2:
            raise ConfigError(f"The identity encoder needs pieces of two dimensions or more, not {tuple(piece_shape)}.")
        self.width = piece_shape[-1]
        self.feature_tokens = math.prod(piece_shape[:-1])
        # Without weights, this buffer records the dtype set by `.to(dtype)`.
        self.register_buffer("marker", torch.empty(0), persistent=False)

    def forward(self, pieces: Tensor) -> Tensor:
        """[n, *piece_shape] to [n, feature_tokens, width]."""
        return pieces.to(self.dtype).reshape(pieces.shape[0], self.feature_tokens, self.width)

    def flops_per_piece(self) -> float:
        """0 operations: there are no matrix products."""
        return 0.0
