"""An IMU encoder like IMU2CLIP's: 1-D convolutions, then a GRU."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from megatron_anymal.config import ConfigError, EncoderConfig
from megatron_anymal.modalities.architecture import read_folder
from megatron_anymal.modalities.base import parse_options, require_above
from megatron_anymal.model.encoders.base import Encoder, convolution_flops, load_weights, register_encoder

# Groups of the norm before the GRU; that of the input has one group each for accelerometer and gyroscope.
GROUPS_BEFORE_GRU = 4


@dataclass
class IMU2CLIPShape:
    """Keys of `encoder.config`; the defaults are IMU2CLIP's."""

    # Input channels; an even number, whose halves (accelerometer, gyroscope) are normalized separately.
    channels: int = 6
    # Channels of the convolutions; a multiple of 4.
    conv_width: int = 32
    # One convolution (without bias) and max-pooling per entry.
    kernel_sizes: list[int] = field(default_factory=lambda: [10, 5, 5])
    # Dilation of the convolutions.
    dilation: int = 2
    # Window and stride of each max-pooling.
    pool: int = 3
    # Width of the GRU and of the features.
    hidden_size: int = 512
    # Layers of the GRU.
    num_layers: int = 1
    # 1: the GRU's last state; more: its outputs averaged over that many time intervals.
    feature_tokens: int = 1


@register_encoder("imu2clip")
class IMU2CLIPEncoder(Encoder):
    """Group norm, dilated convolutions with max-pooling, group norm, GRU over time (Moon et al., 2022).

    Takes [6, samples]. There is one difference from the published code, in which the GRU steps over the convolutions'
    channels; here it steps over time. With the default sizes both have 32 steps of width 32.
    A folder holds config.json (`model_type` "imu2clip" and the keys of `IMU2CLIPShape`) and model.safetensors.

    Raises:
        ConfigError: the modality's pieces have another shape or are too short, or a key is wrong.
    """

    def __init__(self, config: EncoderConfig, piece_shape: tuple[int, ...]) -> None:
        super().__init__(config, piece_shape)
        self.shape = self._shape(config)
        shape = self.shape
        if len(piece_shape) != 2 or piece_shape[0] != shape.channels:
            raise ConfigError(
                f"The imu2clip encoder takes pieces of shape ({shape.channels}, samples) but the modality makes "
                f"{tuple(piece_shape)}. Use the imu modality."
            )
        self.steps = self._steps(piece_shape[1])
        layers: list[nn.Module] = [nn.GroupNorm(2, shape.channels)]
        for index, kernel in enumerate(shape.kernel_sizes):
            channels = shape.channels if index == 0 else shape.conv_width
            layers.append(nn.Conv1d(channels, shape.conv_width, kernel, dilation=shape.dilation, bias=False))
            layers.append(nn.MaxPool1d(shape.pool))
        layers.append(nn.GroupNorm(GROUPS_BEFORE_GRU, shape.conv_width))
        self.convolutions = nn.Sequential(*layers)
        self.gru = nn.GRU(shape.conv_width, shape.hidden_size, shape.num_layers, batch_first=True)
        self.pooling = nn.AdaptiveAvgPool1d(shape.feature_tokens)
        self.width = shape.hidden_size
        self.feature_tokens = shape.feature_tokens
        if config.path:
            load_weights(self, config)

    @staticmethod
    def _shape(config: EncoderConfig) -> IMU2CLIPShape:
        keys: dict[str, Any] = dict(config.config)
        if config.path:
            keys = read_folder(config, ("imu2clip",))
            keys.pop("model_type")
        shape: IMU2CLIPShape = parse_options(IMU2CLIPShape, keys, "encoder.config")
        require_above(shape, "encoder.config", **{name: 0 for name in asdict(shape) if name != "kernel_sizes"})
        if not shape.kernel_sizes or min(shape.kernel_sizes) < 1:
            raise ConfigError(f"encoder.config.kernel_sizes={shape.kernel_sizes} must contain numbers of at least 1.")
        if shape.channels % 2 or shape.conv_width % GROUPS_BEFORE_GRU:
            raise ConfigError(
                f"encoder.config: channels={shape.channels} must be even and conv_width={shape.conv_width} a multiple "
                f"of {GROUPS_BEFORE_GRU}, for the group norms."
            )
        return shape

    def _steps(self, samples: int) -> list[int]:
        """Output length of each convolution along time, before pooling, followed by the GRU's steps."""
        lengths = []
        length = samples
        for kernel in self.shape.kernel_sizes:
            length -= self.shape.dilation * (kernel - 1)
            lengths.append(length)
            length = max(length, 0) // self.shape.pool
        if length < self.shape.feature_tokens:
            raise ConfigError(
                f"A piece of {samples} samples leaves {length} steps after the imu2clip convolutions, fewer than "
                f"feature_tokens={self.shape.feature_tokens}. Raise options.piece_seconds or options.rate, or use "
                "fewer or smaller encoder.config.kernel_sizes."
            )
        return [*lengths, length]

    def forward(self, pieces: Tensor) -> Tensor:
        """[n, channels, samples] to [n, feature_tokens, width]."""
        steps = self.convolutions(pieces.to(self.dtype)).transpose(1, 2)
        outputs, state = self.gru(steps)
        if self.feature_tokens == 1:
            return state[-1].unsqueeze(1)
        return self.pooling(outputs.transpose(1, 2)).transpose(1, 2).contiguous()

    def flops_per_piece(self) -> float:
        """Operations: 2 x output positions x weights of every convolution + 2 x steps x weight matrices of the GRU."""
        convolutions = [layer for layer in self.convolutions if isinstance(layer, nn.Conv1d)]
        total = sum(convolution_flops(layer, n) for layer, n in zip(convolutions, self.steps[:-1], strict=True))
        matrices = sum(weight.numel() for name, weight in self.gru.named_parameters() if name.startswith("weight"))
        return total + 2.0 * self.steps[-1] * matrices
