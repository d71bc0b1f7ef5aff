"""What every modality does: from a media file's bytes to the fixed-size pieces that its encoder takes.

AnyMAL section 3.1: media larger than the encoder's input are split into pieces, each projected on its own
(equations 3 and 4). Images become a grid of tiles; video, audio and IMU become pieces of fixed length in time.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from megatron_anymal.config import DEFAULT_LIMITS, ConfigError, LimitsConfig, ModalityConfig

# How Python's objects in memory show up in the messages of libraries.
_OBJECT_IN_MEMORY = re.compile(r"[\"'(]*<[^<>]* object at 0x[0-9a-f]+>[\"')]*")


class MediaError(ValueError):
    """A media file that cannot be used. The message says why; the caller adds the file's name."""


def reason(error: BaseException) -> str:
    """A library's error in one line, without the name that it gives to a file in memory."""
    text = _OBJECT_IN_MEMORY.sub("it", str(error) or type(error).__name__)
    return " ".join(text.split())


def require_within(limits: LimitsConfig, key: str, value: float, what: str, fix: str) -> None:
    """Refuse a media file whose `value` exceeds the limit `key`.

    Args:
        key: a field of `limits`.
        what: the value in words, for example "lasts 20000.0 s".
        fix: what to do about the file, for example "cut it".

    Raises:
        MediaError: naming the limit, the value and the fix.
    """
    bound = getattr(limits, key)
    if value > bound:
        raise MediaError(f"{what}, above data.limits.{key}={bound}; {fix} or raise the limit")


def require_loadable(limits: LimitsConfig, file_bytes: int, decoding: float) -> None:
    """Refuse a media file that is too much for a loader process together with what decoding it takes, in bytes.

    Raises:
        MediaError: naming the limit and both figures.
    """
    what = f"has {file_bytes} bytes and takes up to {int(decoding)} more to decode"
    require_within(limits, "max_load_bytes", file_bytes + decoding, what, "scale it down")


def nearest(word: str, known: Iterable[str]) -> str:
    """The known words for an error message, the one closest to `word` first where one is close."""
    words = sorted(known)
    close = difflib.get_close_matches(word, words, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(words) or 'none'}."


def _fits(value: Any, wanted: Any) -> bool:
    """Whether an option's value has the annotated type; an int may stand for a float."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is list:
        return isinstance(value, (list, tuple)) and all(_fits(item, arguments[0]) for item in value)
    if wanted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, wanted)


def parse_options(schema: type, given: Mapping[str, Any], section: str = "options") -> Any:
    """An instance of the dataclass `schema` filled from `given`.

    Raises:
        ConfigError: an unknown option (with the nearest known one) or a value of the wrong type.
    """
    wanted = typing.get_type_hints(schema)
    names = [field.name for field in dataclasses.fields(schema)]
    for name, value in given.items():
        if name not in names:
            raise ConfigError(f"{section}.{name} is not an option. {nearest(name, names)}")
        if not _fits(value, wanted[name]):
            kind = getattr(wanted[name], "__name__", str(wanted[name]))
            raise ConfigError(f"{section}.{name}={value!r} must be of type {kind}.")
    return schema(**{k: list(v) if isinstance(v, (list, tuple)) else v for k, v in given.items()})


def require_above(options: Any, section: str = "options", /, **least: float) -> None:
    """Refuse an option that is not above its bound.

    Raises:
        ConfigError: naming the option.
    """
    for name, bound in least.items():
        value = getattr(options, name)
        if not value > bound:
            raise ConfigError(f"{section}.{name}={value} must be above {bound}.")


def count_in_time(duration: np.ndarray, piece_seconds: float, max_pieces: int) -> np.ndarray:
    """Pieces of fixed length that cover each duration (seconds): at least one, at most `max_pieces`.

    A rest shorter than a millionth of a piece is rounding, not media.
    """
    return np.clip(np.ceil(duration / piece_seconds - 1e-6), 1, max_pieces).astype(np.int64)


class Modality(ABC):
    """One kind of media. A subclass is registered with `register(kind)` and lives in one file.

    Args:
        config: the modality's section; `options` is parsed into `self.options` and the input that the encoder
            expects (resolution, frames, sampling rate) is read from `encoder` without loading weights.

    Raises:
        ConfigError: an unknown or ill-typed option, or an encoder that cannot take this kind of media.
    """

    # File extensions this modality reads: lower case, no leading dot.
    extensions: ClassVar[tuple[str, ...]]
    # A dataclass: the modality's options and their defaults.
    Options: ClassVar[type]

    def __init__(self, config: ModalityConfig) -> None:
        self.config = config
        # `build_modality` replaces them with those of the run.
        self.limits = DEFAULT_LIMITS
        self.options = parse_options(self.Options, config.options)

    @classmethod
    @abstractmethod
    def probe(
        cls, data: bytes, extension: str, attributes: Mapping[str, Any], limits: LimitsConfig = DEFAULT_LIMITS
    ) -> tuple[float, float]:
        """The size of a media file, read as cheaply as its format allows.

        Args:
            data: the file.
            extension: lower case, no dot.
            attributes: what the sample says beside the file, for example {"rate": 100}.
            limits: largest inputs that are accepted, checked before anything of the file's stated size is reserved.

        Returns:
            Two numbers; image: width and height in pixels; video: duration in seconds and frames per second;
            audio and IMU: duration in seconds and sampling rate in Hz.

        Raises:
            MediaError: unreadable, empty, or beyond a limit.
        """

    @abstractmethod
    def count_pieces(self, sizes: np.ndarray) -> np.ndarray:
        """Pieces per media item, [n] int64, from what `probe` returned, [n, 2] float64."""

    @property
    @abstractmethod
    def piece_shape(self) -> tuple[int, ...]:
        """Shape of one piece, the encoder's input without the batch dimension."""

    @abstractmethod
    def decode(self, data: bytes, extension: str, attributes: Mapping[str, Any], pieces: int) -> torch.Tensor:
        """The media as `pieces` pieces; `load` checks the size before and the result after.

        Raises:
            MediaError: corrupt, truncated or empty.
        """

    def load(self, data: bytes, extension: str, attributes: Mapping[str, Any]) -> torch.Tensor:
        """The media as encoder input, [pieces, *piece_shape] float32. The same bytes give the same tensor.

        Raises:
            MediaError: corrupt, truncated, empty, not finite, or not as many pieces as its probed size says.
        """
        size = self.probe(data, extension, attributes, self.limits)
        expected = int(self.count_pieces(np.array([size], dtype=np.float64))[0])
        pieces = self.decode(data, extension, attributes, expected)
        if tuple(pieces.shape) != (expected, *self.piece_shape):
            raise MediaError(
                f"gave pieces of shape {tuple(pieces.shape)} where its size {size} asks for "
                f"{(expected, *self.piece_shape)}: the file is damaged or its header is wrong"
            )
        if not torch.isfinite(pieces).all():
            raise MediaError("holds values that are not finite")
        return pieces.float()
