"""CLIP's and DINOv2's vision transformers: one feature per image patch."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_anymal.config import ConfigError, EncoderConfig
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


class VisionTransformer(Encoder):
    """A ViT with a class token over images [3, R, R], or over the frames of a video [T, 3, R, R] one by one.

    Features are the patch tokens of the last hidden state, without the class token; a video's frames are concatenated
    to T x patches features.

    Raises:
        ConfigError: the modality's pieces have another shape.
    """

    def __init__(self, config: EncoderConfig, piece_shape: tuple[int, ...]) -> None:
        super().__init__(config, piece_shape)
        if len(piece_shape) not in (3, 4):
            raise ConfigError(
                f"The {config.type} encoder takes images [3, R, R] or frames [T, 3, R, R], but the modality makes "
                f"pieces of shape {tuple(piece_shape)}. Use another encoder.type."
            )
        model = load_transformers(config)
        # transformers 4 puts CLIP's tower one module deeper.
        self.model = getattr(model, "vision_model", model)
        self.frames = piece_shape[0] if len(piece_shape) == 4 else 1
        self.patches = self._patches(config, piece_shape[-3:])
        self.width = self.model.config.hidden_size
        self.feature_tokens = self.frames * self.patches
        self._drop_unused()

    def _patches(self, config: EncoderConfig, image: tuple[int, ...]) -> int:
        """Check the image shape and return the number of patches per image."""
        height, width = side_lengths(self.model.config.image_size)
        require_shape(config, image, (self.model.config.num_channels, height, width))
        patch = side_lengths(self.model.config.patch_size)
        return (height // patch[0]) * (width // patch[1])

    def _drop_unused(self) -> None:
        """Remove the weights that patch features do not depend on, which would never get a gradient in training."""
        raise NotImplementedError

    def forward(self, pieces: Tensor) -> Tensor:
        """[n, 3, R, R] or [n, T, 3, R, R] to [n, feature_tokens, width]."""
        images = pieces.to(self.dtype).reshape(-1, *self.piece_shape[-3:])
        features = self.model(pixel_values=images).last_hidden_state[:, 1:]
        return features.reshape(pieces.shape[0], self.feature_tokens, self.width)

    def flops_per_piece(self) -> float:
        """Operations: frames x (patch embedding + layers x (2 n x linear weights + 4 n^2 width)), n = patches + 1."""
        tokens = self.patches + 1
        layers = self.model.config.num_hidden_layers
        transformer = linear_flops(self.model.encoder, tokens) + layers * attention_flops(tokens, tokens, self.width)
        embedding = next(layer for layer in self.model.embeddings.modules() if isinstance(layer, nn.Conv2d))
        return self.frames * (transformer + convolution_flops(embedding, self.patches))


@register_encoder("clip")
class CLIPEncoder(VisionTransformer):
    """CLIP's vision tower (Radford et al., 2021), from a folder of CLIPVisionModel or of a whole CLIPModel.

    The last hidden state is taken before the final layer norm, which CLIP applies to its class token only.
    """

    def _drop_unused(self) -> None:
        self.model.post_layernorm = nn.Identity()


@register_encoder("dinov2")
class Dinov2Encoder(VisionTransformer):
    """DINOv2 (Oquab et al., 2023), after its final layer norm.

    Position embeddings are interpolated, so the resolution may be any multiple of the patch size.
    """

    def _patches(self, config: EncoderConfig, image: tuple[int, ...]) -> int:
        patch = side_lengths(self.model.config.patch_size)
        if image[0] != self.model.config.num_channels or image[1] % patch[0] or image[2] % patch[1]:
            raise ConfigError(
                f"The dinov2 encoder takes {self.model.config.num_channels} channels and multiples of {patch} pixels, "
                f"but the modality makes {tuple(image)}. Set options.resolution to such a multiple."
            )
        return (image[1] // patch[0]) * (image[2] // patch[1])

    def _drop_unused(self) -> None:
        self.model.embeddings.mask_token = None
