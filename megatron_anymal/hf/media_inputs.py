"""Conversion of media inputs (paths, URLs, bytes, open files, PIL images, arrays) to the files that modalities read."""

from __future__ import annotations

import io
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional
from urllib.parse import urlparse

import numpy as np
import torch

from megatron_anymal.data.content_parts import CODES_ENDING, is_codes
from megatron_anymal.data.prompt_encoder import MediaFile, read_media_file
from megatron_anymal.data.records import DataError, MediaPart
from megatron_anymal.modalities import MediaError, kind_for_extension
from megatron_anymal.modalities.libraries import library

# Timeout of a server, in seconds.
_PATIENCE = 60.0


class GivenMedia:
    """Reads the media of one prompt.

    Attributes:
        files: media files, by the name that represents the item in the prompt's JSON.
    """

    def __init__(self, where: str):
        """`where` names the prompt in error messages."""
        self.files: dict[str, MediaFile] = {}
        self._where = where

    def message(self, entry: Any) -> Any:
        """Convert all content parts of a message with `part`.

        Raises:
            DataError: a media item cannot be read.
        """
        if not isinstance(entry, Mapping) or not isinstance(entry.get("content"), (list, tuple)):
            return entry
        return {**entry, "content": [self.part(part) for part in entry["content"]]}

    def part(self, entry: Any) -> Any:
        """Read the media item of a content part and return the part as plain JSON.

        A `type` key, as in transformers' conversations, is accepted.

        Raises:
            DataError: the media item cannot be read.
        """
        if not isinstance(entry, Mapping) or ("type" not in entry and "media" not in entry):
            return entry
        part = dict(entry)
        kind = part.pop("type", None)
        if kind == "text":
            return part
        if kind is not None:
            part.setdefault("modality", kind)
            self._find_item(part, kind)
        name = f"media item {len(self.files)} of {self._where}"
        if isinstance(part["media"], (str, Path)) and not str(part["media"]).startswith("data:"):
            name = str(part["media"])
        elif hasattr(part["media"], "read"):
            name = str(getattr(part["media"], "name", name))
        file = self._file(name, part)
        # Different files may have the same name.
        number = len(self.files)
        if name in self.files:
            # The ending tells that an item is codes.
            name = f"item {number}.{CODES_ENDING}" if is_codes(name) else f"{name} (item {number})"
        part["media"] = name
        self.files[part["media"]] = file
        return part

    def item(self, entry: Mapping[str, Any]) -> MediaPart:
        """Read a media item like `part` does, and return it as a MediaPart.

        Raises:
            DataError: the media item cannot be read.
        """
        part = self.part(entry)
        attributes = {key: value for key, value in part.items() if key not in ("media", "modality")}
        return MediaPart(part["media"], part.get("modality", ""), attributes)

    def kind(self, item: MediaPart, kinds: Sequence[str]) -> str:
        """Detect the kind of an item that does not name one, from its file's extension.

        Raises:
            DataError: the extension does not determine the kind.
            ConfigError: `kinds` contains an unknown kind.
        """
        try:
            return kind_for_extension(self.files[item.media].extension, kinds)
        except MediaError as error:
            raise DataError(f"{item.media!r}: {error}.") from error

    def _find_item(self, part: dict[str, Any], kind: str) -> None:
        """Move the item of {"type": KIND, KIND | "path" | "url": ITEM} to "media"."""
        keys = [key for key in ("media", kind, "path", "url") if key in part]
        if len(keys) != 1:
            raise DataError(
                f"{self._where}: a part of type {kind!r} must name its item exactly once, as {kind!r}, 'path', 'url' "
                f"or 'media'; this one has the keys {sorted(part)}."
            )
        part["media"] = part.pop(keys[0])

    def _file(self, name: str, part: dict[str, Any]) -> MediaFile:
        """Convert the item of a part to a file; keys that describe an array, not a file, are removed from the part."""
        item = part["media"]
        if isinstance(item, torch.Tensor):
            item = item.detach().cpu().numpy()
        if isinstance(item, (bytes, bytearray)):
            return MediaFile(bytes(item), "")
        if hasattr(item, "read"):
            return MediaFile(item.read(), Path(name).suffix.lstrip(".").lower())
        if isinstance(item, Path):
            return read_media_file(item)
        if isinstance(item, str):
            is_url = urlparse(item).scheme in ("http", "https", "data")
            return _fetch(item) if is_url else read_media_file(Path(item))
        if isinstance(item, np.ndarray):
            return _array_file(name, item, part.pop("sampling_rate", None))
        # A PIL image, detected without importing PIL.
        if hasattr(item, "save") and hasattr(item, "getexif"):
            return _picture_file(item)
        raise DataError(
            f"{name}: a media item is a path, a URL, bytes, an open file, a PIL image or an array, not "
            f"{type(item).__name__}."
        )


def given_by_kind(
    text: Any, *, images: Any, audio: Any, videos: Any, media: Any, sampling_rate: Optional[int]
) -> list[list[Mapping[str, Any]]]:
    """Group the media arguments by text, as objects with `media`, in the order images, videos, audio, others.

    Args:
        text: None, one text or a list.
        images: for one text an item or a list of items; for several texts a list with one item or list of items per
            text.
        audio: likewise.
        videos: likewise.
        media: likewise, of any kind.
        sampling_rate: sampling rate of waveforms, in Hz.

    Raises:
        DataError: the number of entries differs from the number of texts.
    """
    texts = None if text is None or isinstance(text, str) else list(text)
    by_text: list[list[Mapping[str, Any]]] = [[] for _ in range(1 if texts is None else len(texts))]
    for kind, value in (("image", images), ("video", videos), ("audio", audio), ("", media)):
        if value is None:
            continue
        if texts is None:
            several = isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], (list, tuple))
            rows = list(value) if several else [value]
        else:
            rows = list(value) if isinstance(value, (list, tuple)) else [value]
        if len(rows) != len(by_text):
            raise DataError(f"{len(by_text)} texts need as many lists of media, one for each (it may be empty).")
        for entries, row in zip(by_text, rows):
            items = row if isinstance(row, (list, tuple)) else [row]
            entries += [_described(item, kind, sampling_rate) for item in items]
    return by_text


def _described(item: Any, kind: str, sampling_rate: Optional[int]) -> Mapping[str, Any]:
    described = dict(item) if isinstance(item, Mapping) else {"media": item}
    if kind and "type" not in described:
        described.setdefault("modality", kind)
    if kind == "audio" and sampling_rate and isinstance(described.get("media"), (np.ndarray, torch.Tensor)):
        described.setdefault("sampling_rate", sampling_rate)
    return described


def _fetch(url: str) -> MediaFile:
    try:
        with urllib.request.urlopen(url, timeout=_PATIENCE) as response:
            data = response.read()
    except OSError as error:
        raise DataError(f"{url[:80]!r} cannot be fetched: {error}") from error
    if url.startswith("data:"):
        return MediaFile(data, "")
    return MediaFile(data, Path(urlparse(url).path).suffix.lstrip(".").lower())


def _array_file(name: str, array: np.ndarray, sampling_rate: Any) -> MediaFile:
    """Encode a waveform as WAV, a uint8 image [height, width, 3] as PNG, and any other array as npy."""
    out = io.BytesIO()
    if sampling_rate is not None:
        if array.ndim != 1:
            raise DataError(f"{name}: a waveform has one dimension, [samples]; this one has {list(array.shape)}.")
        if array.dtype.kind not in "f" and array.dtype != np.int16:
            raise DataError(f"{name}: a waveform is of floats within -1 to 1 or of int16, not of {array.dtype}.")
        subtype = "PCM_16" if array.dtype == np.int16 else "FLOAT"
        samples = array if array.dtype == np.int16 else array.astype(np.float32)
        library("soundfile").write(out, samples, int(sampling_rate), format="WAV", subtype=subtype)
        return MediaFile(out.getvalue(), "wav")
    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3:
        return _picture_file(library("PIL.Image").fromarray(array))
    np.save(out, array, allow_pickle=False)
    return MediaFile(out.getvalue(), "npy")


def _picture_file(picture: Any) -> MediaFile:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return MediaFile(out.getvalue(), "png")
