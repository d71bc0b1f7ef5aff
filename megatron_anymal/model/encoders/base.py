"""What every encoder offers, the registry, and loading from a local folder."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_anymal.config import ConfigError, EncoderConfig
from megatron_anymal.modalities.architecture import ARCHITECTURES, transformers_config
from megatron_anymal.modalities.base import nearest

# Tensors that a module computes for itself: a folder that lacks them is complete.
COMPUTED = ("relative_position_index", "position_ids", "num_batches_tracked")


class Encoder(nn.Module):
    """Turns media pieces into features: g(X) of AnyMAL's equation 2.

    A subclass is registered with `register_encoder(type)` and built from the encoder's section and the shape of one
    piece. It draws random weights from torch's global generator and freezes nothing.

    Attributes:
        width: size of one feature vector.
        feature_tokens: feature vectors per piece.
    """

    width: int
    feature_tokens: int

    def __init__(self, config: EncoderConfig, piece_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.piece_shape = tuple(piece_shape)

    @property
    def dtype(self) -> torch.dtype:
        """The type that the weights (or, without weights, the buffers) have now."""
        tensors = itertools.chain(self.parameters(), self.buffers())
        return next(tensor.dtype for tensor in tensors if tensor.is_floating_point())

    @abstractmethod
    def forward(self, pieces: Tensor) -> Tensor:
        """[n, *piece_shape] of any floating type to [n, feature_tokens, width] in the weights' type."""

    @abstractmethod
    def flops_per_piece(self) -> float:
        """Floating-point operations of one piece's forward pass: two a multiply-add, matrix products only."""


ENCODERS: dict[str, type[Encoder]] = {}


def register_encoder(type_name: str) -> Callable[[type[Encoder]], type[Encoder]]:
    """Class decorator: make an encoder available as `encoder.type`.

    Raises:
        ConfigError: the type already belongs to another class.
    """

    def add(cls: type[Encoder]) -> type[Encoder]:
        other = ENCODERS.get(type_name)
        if other is not None and other is not cls:
            raise ConfigError(
                f"The encoder {type_name!r} is already {other.__module__}.{other.__qualname__}; "
                f"{cls.__module__}.{cls.__qualname__} needs another name."
            )
        ENCODERS[type_name] = cls
        return cls

    return add


def build_encoder(config: EncoderConfig, piece_shape: tuple[int, ...]) -> Encoder:
    """The encoder of a section, its weights from `config.path` or random in the shape `config.config`.

    It comes in evaluation mode: without dropout, and with CLAP's batch norm on its stored statistics.

    Args:
        piece_shape: shape of one piece, without the batch dimension, as `Modality.piece_shape` gives it.

    Raises:
        ConfigError: an unknown type, a folder of the wrong kind or incomplete, or pieces that do not fit the encoder.
    """
    if config.type not in ENCODERS:
        raise ConfigError(
            f"encoder.type={config.type!r} does not exist. {nearest(config.type, ENCODERS)} An encoder of your own is "
            "added with model.plugins."
        )
    return ENCODERS[config.type](config, tuple(piece_shape)).eval()


def require_shape(config: EncoderConfig, piece_shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Refuse pieces that an encoder cannot take.

    Raises:
        ConfigError: naming both shapes.
    """
    if tuple(piece_shape) != tuple(wanted):
        raise ConfigError(
            f"The {config.type} encoder takes pieces of shape {tuple(wanted)} but the modality makes "
            f"{tuple(piece_shape)}. Change the modality's options or the encoder."
        )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep progress bars and reports of unused weights out of the run's log; what matters is checked here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_transformers(config: EncoderConfig, attention: str = "sdpa") -> Any:
    """The transformers model of an encoder section, float32.

    Raises:
        ConfigError: a folder that is missing, of the wrong kind, or lacks weights.
    """
    import transformers

    if not config.path:
        shape, model_class = transformers_config(config), getattr(transformers, ARCHITECTURES[config.type].model)
        return model_class._from_config(shape, attn_implementation=attention, dtype=torch.float32)
    return read_transformers(config, attention)[0]


def read_transformers(config: EncoderConfig, attention: str) -> tuple[Any, set[str]]:
    """The transformers model in `config.path`, float32, and the names in its files that the model did not use.

    Raises:
        ConfigError: a folder that is missing, of the wrong kind, or lacks weights.
    """
    import transformers

    shape, model_class = transformers_config(config), getattr(transformers, ARCHITECTURES[config.type].model)
    try:
        with _quiet_transformers():
            model, found = model_class.from_pretrained(
                config.path,
                config=shape,
                attn_implementation=attention,
                dtype=torch.float32,
                local_files_only=True,
                # Reported below with the missing ones.
                ignore_mismatched_sizes=True,
                # A whole two-tower CLAP nests the audio tower; transformers looks for it at the top.
                key_mapping={r"^audio_model\.": ""} if config.type == "clap" else None,
                output_loading_info=True,
            )
    except Exception as error:
        raise ConfigError(
            f"The weights in encoder.path={config.path!r} cannot be loaded as {config.type}: {error}"
        ) from error
    other_shape = [key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]]
    refuse_missing(config, [*found["missing_keys"], *other_shape])
    return model, set(found["unexpected_keys"])


def refuse_missing(config: EncoderConfig, names: list[str]) -> None:
    """Refuse a folder that left weights random.

    Raises:
        ConfigError: naming the weights.
    """
    missing = sorted(name for name in names if not name.endswith(COMPUTED))
    if missing:
        shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise ConfigError(
            f"encoder.path={config.path!r} lacks weights of the {config.type} encoder, or has them in another shape: "
            f"{shown}. Use a complete folder of this architecture."
        )


def load_weights(module: nn.Module, config: EncoderConfig) -> None:
    """Fill a module of this package from `config.path`/model.safetensors, whose names must be the module's own.

    Raises:
        ConfigError: the file is missing or damaged, or its names or shapes differ.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(config.path) / "model.safetensors"
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"encoder.path={config.path!r} has no readable model.safetensors: {error}") from error
    own = module.state_dict()
    refuse_missing(config, [name for name in own if name not in found or found[name].shape != own[name].shape])
    unknown = sorted(set(found) - set(own))
    if unknown:
        raise ConfigError(f"encoder.path={config.path!r} holds weights unknown to the encoder: {', '.join(unknown)}.")
    module.load_state_dict(found)


def linear_flops(module: nn.Module, tokens: float) -> float:
    """2 x tokens x the weights of every linear layer inside `module`."""
    return sum(2.0 * tokens * layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def convolution_flops(layer: nn.Module, positions: float) -> float:
    """2 x output positions x the weights of a convolution."""
    weight: Any = layer.weight
    return 2.0 * positions * weight.numel()


def attention_flops(tokens: float, keys: float, width: int) -> float:
    """Scores and weighted sum of one full attention: 2 x 2 x tokens x keys x width."""
    return 4.0 * tokens * keys * width


def side_lengths(value: Any) -> tuple[int, int]:
    """A size that a configuration gives as one number or as two."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
