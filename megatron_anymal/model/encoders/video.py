"""VideoMAE: a vision transformer over tubelets of a video clip."""

from __future__ import annotations

from torch import Tensor

from megatron_anymal.config import EncoderConfig
from megatron_anymal.model.encoders.base import (
    Encoder,
    attention_flops,
    convolution_flops,
    linear_flops,
    load_transformers,
    register_encoder,
    require_shape,
    side_lengths,
)


@register_encoder("videomae")
class VideoMAEEncoder(Encoder):
    """VideoMAE (Tong et al., 2022), the architecture InternVideo builds on.

    Features are the last hidden state: frames / tubelet size x patches per frame, in temporal order.

    Raises:
        ConfigError: the folder cannot be used, or pieces do not have the encoder's frames and resolution.
    """

    def __init__(self, config: EncoderConfig, piece_shape: tuple[int, ...]) -> None:
        super().__init__(config, piece_shape)
        self.model = load_transformers(config)
        shape = self.model.config
        require_shape(config, piece_shape, (shape.num_frames, shape.num_channels, *side_lengths(shape.image_size)))
        self.width = shape.hidden_size
        self.feature_tokens = self.model.embeddings.num_patches

    def forward(self, pieces: Tensor) -> Tensor:
        """[n, T, 3, R, R] to [n, feature_tokens, width]."""
        return self.model(pixel_values=pieces.to(self.dtype)).last_hidden_state

    def flops_per_piece(self) -> float:
        """Operations: tubelet embedding + layers x (2 n x linear weights + 4 n^2 width), n = feature tokens."""
        tokens = self.feature_tokens
        attention = self.model.config.num_hidden_layers * attention_flops(tokens, tokens, self.width)
        embedding = convolution_flops(self.model.embeddings.patch_embeddings.projection, tokens)
        return embedding + linear_flops(self.model.encoder, tokens) + attention
