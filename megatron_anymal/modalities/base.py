"""Base class of modalities: from the bytes of a media file to the fixed-size pieces that its encoder takes.

AnyMAL section 3.1: media larger than the encoder's input are split into pieces that are projected separately
(equations 3 and 4). A piece is a tile of an image, a clip of a video, or a time window of audio or IMU data.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from megatron_anymal.config import DEFAULT_LIMITS, ConfigError, LimitsConfig, ModalityConfig

if TYPE_CHECKING:
    import torch

# The repr of Python objects in error messages of libraries.
_OBJECT_IN_MEMORY = re.compile(r"[\"'(]*<[^<>]* object at 0x[0-9a-f]+>[\"')]*")


class MediaError(ValueError):
    """A media file that cannot be used. The message says why; the caller adds the file's name."""


def reason(error: BaseException) -> str:
    """The message of a library's error in one line, without the repr of an in-memory file."""
    text = _OBJECT_IN_MEMORY.sub("it", str(error) or type(error).__name__)
    return " ".join(text.split())


def require_within(limits: LimitsConfig, key: str, value: float, what: str, fix: str) -> None:
    """Refuse a media file whose `value` exceeds the limit `key`.

    Args:
        key: a field of `limits`.
        what: description of the value, for example "lasts 20000.0 s".
        fix: advice for the user, for example "cut it".

    Raises:
        MediaError: naming the limit, the value and the fix.
    """
    bound = getattr(limits, key)
    if value > bound:
        raise MediaError(f"{what}, above data.limits.{key}={bound}; {fix} or raise the limit")


def require_loadable(limits: LimitsConfig, file_bytes: int, decoding: float) -> None:
    """Refuse a media file that needs too much memory in a loader process.

    Args:
        file_bytes: size of the file.
        decoding: bytes needed to decode it.

    Raises:
        MediaError: naming the limit and both sizes.
    """
    what = f"has {file_bytes} bytes and takes up to {int(decoding)} more to decode"
    require_within(limits, "max_load_bytes", file_bytes + decoding, what, "scale it down")


def nearest(word: str, known: Iterable[str]) -> str:
    """The known words for an error message, preceded by a suggestion if one is close to `word`."""
    words = sorted(known)
    close = difflib.get_close_matches(word, words, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(words) or 'none'}."


def _fits(value: Any, wanted: Any) -> bool:
    """Whether an option's value has the annotated type; an int is accepted as a float."""
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
    """Create an instance of the dataclass `schema` from the options `given`.

    Raises:
        ConfigError: an unknown option (naming the closest known one) or a value of the wrong type.
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
    """Refuse options that do not exceed their bounds.

    Raises:
        ConfigError: naming the option.
    """
    for name, bound in least.items():
        value = getattr(options, name)
        if not value > bound:
            raise ConfigError(f"{section}.{name}={value} must be above {bound}.")


def count_in_time(duration: np.ndarray, piece_seconds: float, max_pieces: int) -> np.ndarray:
    """Number of fixed-length pieces that cover each duration, [n] int64: at least one, at most `max_pieces`.

    A remainder shorter than a millionth of a piece is treated as rounding error.

    Args:
        duration: [n] seconds.
    """
    return np.clip(np.ceil(duration / piece_seconds - 1e-6), 1, max_pieces).astype(np.int64)


class Modality(ABC):
    """One kind of media. Each subclass lives in its own file and is registered with `register(kind)`.

    Args:
        config: the modality's section; `options` is parsed into `self.options`, and the encoder's input format
            (resolution, frames, sampling rate) is read from `encoder` without loading weights.

    Raises:
        ConfigError: an option is unknown or of the wrong type, or the encoder cannot take this kind of media.
    """

    # File extensions that this modality reads: lower case, no leading dot.
    extensions: ClassVar[tuple[str, ...]]
    # A dataclass with the modality's options and their defaults.
    Options: ClassVar[type]
    # Whether it, or the part of transformers that it uses, needs torch, which commands then import.
    needs_torch: ClassVar[bool] = True
    # Whether `count_pieces` never falls if a number of a size grows. The largest sizes in an index's block then bound
    # the pieces of its samples; otherwise a run reads every sample with this kind of media when it starts.
    pieces_grow_with_size: ClassVar[bool] = False

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        # An inherited one would ignore a `probe` or `decode` that the subclass overrides.
        if "decode_with_size" not in vars(cls) and not vars(cls).keys().isdisjoint(("probe", "decode")):
            cls.decode_with_size = Modality.decode_with_size  # type: ignore[method-assign]

    def __init__(self, config: ModalityConfig) -> None:
        self.config = config
        # Replaced by the run's limits in `build_modality`.
        self.limits = DEFAULT_LIMITS
        self.options = parse_options(self.Options, config.options)

    @classmethod
    @abstractmethod
    def probe(
        cls, data: bytes, extension: str, attributes: Mapping[str, Any], limits: LimitsConfig = DEFAULT_LIMITS
    ) -> tuple[float, float]:
        """Size of a media file, determined as cheaply as its format allows.

        Args:
            data: content of the file.
            extension: lower case, no dot.
            attributes: further properties from the sample's JSON, for example {"rate": 100}.
            limits: maximum input sizes, checked before memory is allocated from the sizes stated in the file.

        Returns:
            Two numbers; image: width and height in pixels; video: duration in seconds and frames per second;
            audio and IMU: duration in seconds and sampling rate in Hz.

        Raises:
            MediaError: unreadable, empty, or beyond a limit.
        """

    @abstractmethod
    def count_pieces(self, sizes: np.ndarray) -> np.ndarray:
        """Number of pieces per media item, [n] int64, from the results of `probe`, [n, 2] float64."""

    @property
    @abstractmethod
    def piece_shape(self) -> tuple[int, ...]:
        """Shape of one piece, the encoder's input without the batch dimension."""

    @property
    def decoded_shape(self) -> tuple[int, ...]:
        """Shape of one piece as returned by `decode`; that of the encoder's input unless `write` is overridden."""
        return self.piece_shape

    @abstractmethod
    def decode(self, data: bytes, extension: str, attributes: Mapping[str, Any], pieces: int) -> np.ndarray:
        """Decode a media file to [pieces, *decoded_shape]. Called by `load_array`, which checks size and result.

        Raises:
            MediaError: the file is corrupt, truncated or empty.
        """

    def decode_with_size(
        self, data: bytes, extension: str, attributes: Mapping[str, Any]
    ) -> tuple[tuple[float, float], np.ndarray]:
        """Probe and decode a file. Override it if both together cost less than one after the other.

        Returns:
            The result of `probe`, and that of `decode`, [pieces, *decoded_shape].

        Raises:
            MediaError: as `probe` and `decode`.
        """
        size = self.probe(data, extension, attributes, self.limits)
        return size, self.decode(data, extension, attributes, self._count(size))

    def _count(self, size: tuple[float, float]) -> int:
        return int(self.count_pieces(np.array([size], dtype=np.float64))[0])

    def write(self, decoded: np.ndarray, out: np.ndarray) -> None:
        """Write the result of `decode` as encoder input. Override it, with `decoded_shape`, if `decode` returns a more
        compact form, such as 8-bit pixels.

        Args:
            decoded: [pieces, *decoded_shape].
            out: [pieces, *piece_shape] float32.

        Raises:
            MediaError: there are non-finite values.
        """
        # A float64 may be finite and yet exceed float32.
        with np.errstate(over="ignore"):
            out[...] = decoded
        if decoded.dtype.kind not in "biu" and not np.isfinite(out).all():
            raise MediaError("contains non-finite values")

    def load(self, data: bytes, extension: str, attributes: Mapping[str, Any]) -> torch.Tensor:
        """Decode a media file to encoder input, [pieces, *piece_shape] float32. The result is deterministic.

        Raises:
            MediaError: as `load_array`.
        """
        import torch

        return torch.from_numpy(self.load_array(data, extension, attributes))

    def load_array(
        self, data: bytes, extension: str, attributes: Mapping[str, Any], out: np.ndarray | None = None
    ) -> np.ndarray:
        """`load` for processes that do without torch, which takes seconds to import; [pieces, *piece_shape] float32.

        Args:
            out: array of that shape to write to and to return; its contents are undefined after an error. None: a new
                array.

        Raises:
            MediaError: the file is corrupt, truncated or empty, has non-finite values, does not match its probed size,
                or has another number of pieces than `out`.
        """
        size, returned = self.decode_with_size(data, extension, attributes)
        # Plug-ins may return a tensor on the CPU.
        decoded, expected = np.asarray(returned), self._count(size)
        if out is not None and len(out) != expected:
            raise MediaError(f"yields {expected} pieces, but the index states {len(out)}")
        if decoded.shape != (expected, *self.decoded_shape):
            raise MediaError(
                f"yields pieces of shape {decoded.shape}, but its size {size} implies "
                f"{(expected, *self.decoded_shape)}: the file is damaged or its header is wrong"
            )
        if out is None:
            out = np.empty((expected, *self.piece_shape), dtype=np.float32)
        self.write(decoded, out)
        return out
