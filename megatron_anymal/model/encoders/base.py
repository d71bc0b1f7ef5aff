"""Encoder base class, registry, and loading from a local folder."""

from __future__ import annotations

import hashlib
import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_anymal.config import ConfigError, EncoderConfig
from megatron_anymal.modalities import Modality
from megatron_anymal.modalities.architecture import ARCHITECTURES, transformers_config
from megatron_anymal.modalities.base import nearest

# Tensors that a module computes itself: a folder is complete without them.
COMPUTED = ("relative_position_index", "position_ids", "num_batches_tracked")


class Encoder(nn.Module):
    """Encodes media pieces into features: g(X) of AnyMAL's equation 2.

    A subclass is registered with `register_encoder(type)` and built from the encoder's section and the shape of one
    piece. It draws random weights from torch's global generator and does not freeze them.

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
        """Current dtype of the weights (or, without weights, of the buffers)."""
        tensors = itertools.chain(self.parameters(), self.buffers())
        return next(tensor.dtype for tensor in tensors if tensor.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Device of the weights (or, without weights, of the buffers)."""
        return next(itertools.chain(self.parameters(), self.buffers())).device

    @abstractmethod
    def forward(self, pieces: Tensor) -> Tensor:
        """[n, *piece_shape] of any floating dtype to [n, feature_tokens, width] in the weights' dtype."""

    @abstractmethod
    def flops_per_piece(self) -> float:
        """Floating-point operations of one piece's forward pass: two per multiply-add, matrix products only."""


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
                f"The encoder {type_name!r} is already registered by {other.__module__}.{other.__qualname__}. "
                f"Use another name for {cls.__module__}.{cls.__qualname__}."
            )
        ENCODERS[type_name] = cls
        return cls

    return add


def build_encoder(config: EncoderConfig, piece_shape: tuple[int, ...]) -> Encoder:
    """Build the encoder of a section, with weights from `config.path` or random ones in the shape `config.config`.

    It is in evaluation mode: without dropout, and with CLAP's batch norm using its stored statistics.

    Args:
        piece_shape: shape of one piece without the batch dimension; see `Modality.piece_shape`.

    Raises:
        ConfigError: the type is unknown, the folder is incomplete or of the wrong kind, or pieces do not fit the
            encoder.
    """
    if config.type not in ENCODERS:
        raise ConfigError(
            f"encoder.type={config.type!r} does not exist. {nearest(config.type, ENCODERS)} Add your own encoders with "
            "model.plugins."
        )
    return ENCODERS[config.type](config, tuple(piece_shape)).eval()


def seeded_encoder(name: str, section: EncoderConfig, modality: Modality, seed: int) -> Encoder:
    """Build an encoder whose random initial values, if any, depend only on the seed and its name.

    Raises:
        ConfigError: the section cannot be used; see `build_encoder`.
    """
    key = hashlib.sha256(f"{seed}/encoders.{name}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(int.from_bytes(key[:8], "little") >> 1)
        return build_encoder(section, modality.piece_shape)


def require_shape(config: EncoderConfig, piece_shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Reject pieces of the wrong shape.

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
    """Keep progress bars and reports of unused weights out of the run's log; missing weights are checked here."""
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
    """Build or load the transformers model of an encoder section, in float32.

    Raises:
        ConfigError: the folder is missing, of the wrong kind, or lacks weights.
    """
    import transformers

    if not config.path:
        shape, model_class = transformers_config(config), getattr(transformers, ARCHITECTURES[config.type].model)
        return model_class._from_config(shape, attn_implementation=attention, dtype=torch.float32)
    return read_transformers(config, attention)[0]


def read_transformers(config: EncoderConfig, attention: str) -> tuple[Any, set[str]]:
    """Load the transformers model in `config.path`, in float32, and return it with the names of its unused tensors.

    Raises:
        ConfigError: the folder is missing, of the wrong kind, or lacks weights.
    """
    import transformers

    shape, model_class = transformers_config(config), getattr(transformers, ARCHITECTURES[config.type].model)
    try:
        with _quiet_transformers():
            model, info = model_class.from_pretrained(
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
    other_shape = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    refuse_missing(config, [*info["missing_keys"], *other_shape])
    return model, set(info["unexpected_keys"])


def refuse_missing(config: EncoderConfig, names: list[str]) -> None:
    """Reject a folder that does not set all weights.

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
    """Load a module of this package from `config.path`/model.safetensors, whose names must match the module's.

    Raises:
        ConfigError: the file is missing or damaged, or its names or shapes differ.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(config.path) / "model.safetensors"
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"encoder.path={config.path!r} has no readable model.safetensors: {error}") from error
    own = module.state_dict()
    refuse_missing(config, [name for name in own if name not in tensors or tensors[name].shape != own[name].shape])
    unknown = sorted(set(tensors) - set(own))
    if unknown:
        raise ConfigError(f"encoder.path={config.path!r} holds weights unknown to the encoder: {', '.join(unknown)}.")
    module.load_state_dict(tensors)


def linear_flops(module: nn.Module, tokens: float) -> float:
    """Operations of every linear layer inside `module`: 2 x tokens x weights."""
    return sum(2.0 * tokens * layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def convolution_flops(layer: nn.Module, positions: float) -> float:
    """Operations of a convolution: 2 x output positions x weights."""
    weight: Any = layer.weight
    return 2.0 * positions * weight.numel()


def attention_flops(tokens: float, keys: float, width: int) -> float:
    """Operations of one full attention, scores and weighted sum: 2 x 2 x tokens x keys x width."""
    return 4.0 * tokens * keys * width


def side_lengths(value: Any) -> tuple[int, int]:
    """Return (height, width) of a size that is configured as one number or as two."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
