"""CLAP's audio tower: a Swin transformer over a log-mel spectrogram."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from megatron_anymal.config import ConfigError, EncoderConfig
from megatron_anymal.model.encoders.base import (
    Encoder,
    attention_flops,
    convolution_flops,
    linear_flops,
    load_transformers,
    register_encoder,
)


@register_encoder("clap")
class CLAPEncoder(Encoder):
    """CLAP's HTSAT (Wu et al., 2023), from a folder of ClapAudioModel or of a whole ClapModel.

    Features are those of the last stage, [n, width, bands, times] read as bands x times tokens. An audio window is
    never longer than the encoder's input, so a CLAP with fusion takes its single-view path.

    Raises:
        ConfigError: the modality's pieces have another shape.
    """

    def __init__(self, config: EncoderConfig, piece_shape: tuple[int, ...]) -> None:
        super().__init__(config, piece_shape)
        # transformers implements CLAP's windowed attention, with its position bias, only in eager mode.
        self.model = load_transformers(config, attention="eager")
        shape = self.model.config
        self.fuses = bool(shape.enable_fusion)
        frames_limit = shape.spec_size * self.encoder.freq_ratio
        channels = 4 if self.fuses else 1
        if len(piece_shape) != 3 or (piece_shape[0], piece_shape[2]) != (channels, shape.num_mel_bins):
            raise ConfigError(
                f"The clap encoder takes pieces of shape ({channels}, frames, {shape.num_mel_bins}) but the modality "
                f"makes {tuple(piece_shape)}. Use the audio modality."
            )
        if piece_shape[1] > frames_limit:
            raise ConfigError(
                f"A piece has {piece_shape[1]} frames but the clap encoder takes {frames_limit} at most. Lower "
                "options.piece_seconds or raise options.hop_length."
            )
        self.width = self.encoder.num_features
        self.feature_tokens = math.prod(self._stage_sizes()[-1])

    @property
    def encoder(self) -> Any:
        """The transformer inside transformers' model."""
        return self.model.audio_encoder

    def _stage_sizes(self) -> list[tuple[int, int]]:
        """Input height and width of each stage in tokens, followed by those of the features."""
        sizes = [tuple(self.encoder.patch_embed.grid_size)]
        for stage in self.encoder.layers:
            height, width = sizes[-1]
            halves = stage.downsample is not None
            sizes.append(((height + 1) // 2, (width + 1) // 2) if halves else (height, width))
        return sizes

    def _last_stage(self, pieces: Tensor) -> Tensor:
        is_longer = torch.zeros(pieces.shape[0], 1, dtype=torch.bool, device=pieces.device) if self.fuses else None
        features = self.model(input_features=pieces, is_longer=is_longer).last_hidden_state
        return features.flatten(2).transpose(1, 2)

    def forward(self, pieces: Tensor) -> Tensor:
        """[n, channels, frames, mels] to [n, feature_tokens, width]."""
        return self._last_stage(pieces.to(self.dtype)).contiguous()

    def flops_per_piece(self) -> float:
        """Operations: patch embedding + the stages + patch merging.

        A stage takes 2 n x linear weights, plus 4 n window^2 width per layer, for n tokens. n halves along both sides
        from stage to stage; patch merging runs on its output tokens.
        """
        sizes = self._stage_sizes()
        total = convolution_flops(self.encoder.patch_embed.proj, math.prod(sizes[0]))
        for stage, (height, width), merged in zip(self.encoder.layers, sizes, sizes[1:]):
            tokens = height * width
            # A stage smaller than the window attends to all of its tokens.
            window = min(self.model.config.window_size, height, width)
            blocks: nn.ModuleList = stage.blocks
            total += linear_flops(blocks, tokens) + len(blocks) * attention_flops(tokens, window**2, stage.dim)
            if stage.downsample is not None:
                total += linear_flops(stage.downsample, math.prod(merged))
        return total
