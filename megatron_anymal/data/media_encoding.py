"""Encoding of media as codes: those of a sample while it is packed (`anymal prepare --encode`), and of a prompt."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_anymal.config import LimitsConfig
from megatron_anymal.data.codes import HASH_ATTRIBUTE
from megatron_anymal.data.content_parts import CODES_ENDING, is_codes, media_part
from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.media_tokenizers import MediaTokenizer
from megatron_anymal.data.records import DataError, Part, Sample, TextPart
from megatron_anymal.data.samples import is_sample, media_entries
from megatron_anymal.data.shard_samples import SampleError
from megatron_anymal.modalities import pictures, sounds
from megatron_anymal.modalities.base import MediaError


class MediaEncoder:
    """Encodes those media of samples whose modality is a name in `model.discrete`."""

    def __init__(self, tokenizers: Mapping[str, MediaTokenizer], options: IndexOptions):
        """Nothing is read yet.

        Args:
            tokenizers: name in `model.discrete` -> its tokenizer.
            options: how the kind of a media item is found.
        """
        self._tokenizers, self._options = tokenizers, options

    @property
    def identity(self) -> dict[str, str]:
        """Hash of each tokenizer, by name."""
        return {name: tokenizer.hash for name, tokenizer in self._tokenizers.items()}

    def named(self, value: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """A sample's JSON as it will be stored, in which media to be encoded are codes.

        Returns:
            The JSON, and for each of its media the name of the tokenizer; empty if it stays as it is.
        """
        if not is_sample(value):
            return value, []
        renamed = copy.deepcopy(value)
        try:
            names = [self._name(entry) for entry in media_entries(renamed)]
        except (AttributeError, KeyError, TypeError):
            # It is not a sample; parsing it says why.
            return value, []
        for entry, name in zip(media_entries(renamed), names):
            if name:
                stated = {"modality": name, HASH_ATTRIBUTE: self._tokenizers[name].hash}
                entry.update({"media": f"{entry['media']}.{CODES_ENDING}", **stated})
        return renamed, names

    def _name(self, entry: Mapping[str, Any]) -> str:
        media, stated = entry["media"], entry.get("modality", "")
        if not isinstance(media, str) or is_codes(media) or stated:
            return stated if stated in self._tokenizers and not is_codes(str(media)) else ""
        try:
            kind = self._options.kind_of(media_part(media, "", {}), media.lower().rpartition(".")[2])
        except MediaError:
            return ""
        return kind if kind in self._tokenizers else ""

    def unencoded(self, sample: Sample, value: dict[str, Any]) -> Sample:
        """The media and texts of a sample whose media are not encoded yet, for filters.

        Args:
            sample: parsed from the result of `named`.
            value: the JSON before that.
        """
        parts: list[Part] = [part for part in sample.documents[0] if isinstance(part, TextPart)]
        for entry in media_entries(value):
            name, stated = entry["media"], entry.get("modality", "")
            attributes = {key: item for key, item in entry.items() if key not in ("media", "modality")}
            encoded = stated in self._tokenizers and not is_codes(name)
            parts.append(media_part(name, self._tokenizers[stated].kind if encoded else stated, attributes))
        return Sample(sample.kind, (parts,))

    def encode(self, media: Sequence[tuple[str, bytes]], names: Sequence[str]) -> list[tuple[str, bytes]]:
        """Ending and content of each media item, encoded where a tokenizer is named.

        Args:
            media: ending and content of a sample's media.
            names: see `named`.

        Raises:
            SampleError: an item cannot be decoded.
            DataError: a tokenizer returns something else than codes of its codebooks.
        """
        encoded = list(media)
        for name in sorted(set(names) - {""}):
            numbers = [number for number, of in enumerate(names) if of == name]
            given = [media[number] for number in numbers]
            try:
                files = code_files(name, self._tokenizers[name], given, self._options.limits)
            except MediaError as error:
                raise SampleError("media", f"its media file {error}.") from None
            for number, data in zip(numbers, files, strict=True):
                encoded[number] = (CODES_ENDING, data)
        return encoded


def code_files(
    name: str, tokenizer: MediaTokenizer, media: Sequence[tuple[str, bytes]], limits: LimitsConfig
) -> list[bytes]:
    """Files of codes of media.

    Args:
        name: of the tokenizer, for messages.
        tokenizer: encodes them.
        media: ending and content of each item.
        limits: of decoding.

    Raises:
        MediaError: an item cannot be decoded.
        DataError: the tokenizer returns something else than codes of its codebooks.
    """
    items = [_decoded(tokenizer, *one, limits) for one in media]
    return [_file(name, tokenizer, np.asarray(codes)) for codes in tokenizer.encode(items)]


def _decoded(tokenizer: MediaTokenizer, ending: str, data: bytes, limits: LimitsConfig) -> np.ndarray:
    """A media item as the tokenizer takes it."""
    try:
        if tokenizer.kind == "image":
            with pictures.opened(data, limits) as picture:
                return np.asarray(pictures.decoded(picture, data))
        with sounds.opened(data, limits) as sound:
            samples = sound.count(limits)
        with sounds.opened(data, limits) as sound:
            return sounds.resample(sound.mono(samples), sound.rate, tokenizer.sampling_rate)
    except MediaError as error:
        raise MediaError(f"(.{ending}) {error}") from None


def _file(name: str, tokenizer: MediaTokenizer, codes: np.ndarray) -> bytes:
    """The file of an item's codes."""
    sizes = np.array(tokenizer.codebooks)
    if codes.ndim != 2 or len(codes) != len(sizes) or codes.dtype.kind not in "iu" or not codes.size:
        raise DataError(
            f"the tokenizer of {name!r} returned {codes.dtype} of shape {codes.shape} instead of integers of "
            f"shape [{len(sizes)}, codes]."
        )
    if codes.min() < 0 or (codes >= sizes[:, None]).any():
        raise DataError(f"the tokenizer of {name!r} returned a code outside its codebooks {tokenizer.codebooks}.")
    file = io.BytesIO()
    np.save(file, codes.astype(np.uint16 if sizes.max() <= 2**16 else np.uint32))
    return file.getvalue()
