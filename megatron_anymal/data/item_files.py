"""Files of media that a model wrote as codes: PNG, WAV and MP4 if their tokenizer is at hand, else their codes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np

from megatron_anymal.config import DiscreteConfig
from megatron_anymal.data.code_grammar import CodeItem
from megatron_anymal.data.codes import HASH_ATTRIBUTE
from megatron_anymal.data.content_parts import CODES_ENDING
from megatron_anymal.data.media_tokenizers import MediaTokenizer
from megatron_anymal.data.records import DataError
from megatron_anymal.modalities.libraries import library


class ItemFiles:
    """Writes the media of answers into a folder."""

    def __init__(
        self,
        folder: Path,
        sections: Mapping[str, DiscreteConfig],
        tokenizers: Mapping[str, MediaTokenizer],
        frame_rates: Optional[Mapping[str, float]] = None,
    ):
        """Create the folder.

        Args:
            folder: where the files go; files of the same names are replaced.
            sections: `model.discrete` of the model.
            tokenizers: name in `sections` -> what turns its codes into media. Items of other names stay codes.
            frame_rates: name in `sections` -> frames per second: consecutive items are one video.

        Raises:
            DataError: a tokenizer is not the one of the model's codes, or frames are not pictures.
        """
        self.folder, self._sections, self._tokenizers = folder, sections, tokenizers
        self._frame_rates = frame_rates or {}
        for name, tokenizer in tokenizers.items():
            check_tokenizer(name, sections, tokenizer)
        for name in self._frame_rates:
            if name not in tokenizers or tokenizers[name].kind != "image":
                raise DataError(f"{name!r} cannot be frames of a video: that takes a tokenizer of pictures for it.")
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, stem: str, parts: Sequence[Union[str, CodeItem]]) -> list[dict[str, Any]]:
        """Write the media of one answer.

        Args:
            stem: beginning of the files' names, STEM-NUMBER.png, numbered as in the answer's text.
            parts: of the answer.

        Returns:
            The parts in the form that samples have: {"text": TEXT} or {"media": FILE, "modality": NAME}.

        Raises:
            DataError: codes cannot be decoded.
        """
        described: list[dict[str, Any]] = []
        number = 1
        for name, group in self._groups(parts):
            if name is None:
                described.append({"text": group[0]})
                continue
            described.append({"media": self._file(f"{stem}-{number}", name, group), "modality": name})
            if name not in self._tokenizers and self._sections[name].tokenizer_hash:
                described[-1][HASH_ATTRIBUTE] = self._sections[name].tokenizer_hash
            number += len(group)
        return described

    def _groups(self, parts: Sequence[Union[str, CodeItem]]) -> Iterator[tuple[Optional[str], list[Any]]]:
        """Name of each file's items, and the items; texts have no name."""
        for name, group in groupby(parts, lambda part: part.name if isinstance(part, CodeItem) else None):
            if name in self._frame_rates:
                yield name, list(group)
            else:
                yield from ((name, [part]) for part in group)

    def _file(self, stem: str, name: str, items: Sequence[CodeItem]) -> str:
        tokenizer = self._tokenizers.get(name)
        if tokenizer is None:
            (self.folder / f"{stem}.{name}.{CODES_ENDING}").write_bytes(items[0].file())
            return f"{stem}.{name}.{CODES_ENDING}"
        try:
            media = tokenizer.decode([item.codes for item in items])
        except (ValueError, RuntimeError, IndexError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"The tokenizer of {name!r} cannot decode codes of shape {list(items[0].codes.shape)}: {reason}. Check "
                f"model.discrete.{name}.codes_per_item and .codebooks."
            ) from error
        if name in self._frame_rates:
            _write_video(self.folder / f"{stem}.mp4", media, self._frame_rates[name])
            return f"{stem}.mp4"
        if tokenizer.kind == "image":
            library("PIL.Image").fromarray(media[0]).save(self.folder / f"{stem}.png")
            return f"{stem}.png"
        library("soundfile").write(self.folder / f"{stem}.wav", media[0], tokenizer.sampling_rate, subtype="PCM_16")
        return f"{stem}.wav"


def check_tokenizer(name: str, sections: Mapping[str, DiscreteConfig], tokenizer: MediaTokenizer) -> None:
    """Refuse a tokenizer that did not make the codes of a section.

    Raises:
        DataError: there is no such section, or its codebooks or hash differ.
    """
    if name not in sections:
        raise DataError(f"The model has no codes of {name!r}; it has: {', '.join(sections) or 'none'}.")
    section, books = sections[name], list(tokenizer.codebooks)
    # The last levels of a residual quantizer may be unused.
    if books[: len(section.codebooks)] != list(section.codebooks):
        raise DataError(
            f"The tokenizer of {name!r} has codebooks of {books} codes, but model.discrete.{name}.codebooks is "
            f"{list(section.codebooks)}. Use the tokenizer that encoded the training data."
        )
    if section.tokenizer_hash and tokenizer.hash != section.tokenizer_hash:
        raise DataError(
            f"The tokenizer of {name!r} has the hash {tokenizer.hash!r}, but the model's codes are of "
            f"model.discrete.{name}.tokenizer_hash={section.tokenizer_hash}. Use the tokenizer that encoded the "
            "training data."
        )


def _write_video(path: Path, frames: Sequence[np.ndarray], rate: float) -> None:
    """Write frames [height, width, 3] uint8 as H.264, nearly lossless."""
    av = library("av")
    each = Fraction(rate).limit_denominator(1000)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=each, options={"crf": "10"})
        height, width = frames[0].shape[:2]
        # The format halves the resolution of colours.
        stream.height, stream.width, stream.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
        stream.time_base = 1 / each
        for frame in frames:
            padded = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(padded, format="rgb24")))
        container.mux(stream.encode())
