"""Captions of sounds in a .csv: AudioCaps and Clotho.

AudioCaps names clips of YouTube by `youtube_id` and `start_time`, not files. Downloaders name the files differently;
these names are tried in order, with any ending of a sound: YOUTUBEID_START, YOUTUBEID_START_END (in seconds), the same
in milliseconds, AUDIOCAPID, YYOUTUBEID and YOUTUBEID.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cached_property

from megatron_anymal.data.shard_samples import SampleError
from megatron_anymal.data.source_records import Record
from megatron_anymal.data.sources.source_format import (
    FileSource,
    SourceFormat,
    caption_parts,
    chosen_captions,
    clean_key,
)
from megatron_anymal.data.tables import TableRow, read_table

_ENDINGS = ("wav", "flac", "mp3", "ogg", "opus", "m4a", "aac", "webm", "mka", "mp4")
# Length of a clip of AudioSet and AudioCaps in seconds.
_CLIP = 10


class AudioCapsSource(FileSource):
    """The captions of AudioCaps.

    Args:
        options: `path` is the .csv, `media` a folder with the sounds, also in folders of it.
    """

    def records(self) -> Iterator[Record]:
        """One sample per row; rows whose sound was not downloaded are left out.

        Raises:
            DataError: the table cannot be read, or lacks a column.
        """
        columns = ("audiocap_id", "youtube_id", "start_time", "caption")
        for row in read_table(self.options.path, columns, self.options.limits):
            key = clean_key(row.number - 1, row.cells.get("audiocap_id"))
            try:
                value = caption_parts(self._sound(row), "audio", row.cells.get("caption", ""))
            except SampleError as error:
                yield Record(row.where, row.number, key=key, wrong=error)
            else:
                yield Record(row.where, row.number, value, key, row.cells)

    def _sound(self, row: TableRow) -> str:
        """Path of a row's sound, relative to the folder of the sounds."""
        names = _names(row.cells)
        for name in names:
            if name in self._sounds:
                return self._sounds[name]
        raise SampleError("missing_media", f"{str(self.base)!r} has no sound named {', '.join(names)}.")

    @cached_property
    def _sounds(self) -> dict[str, str]:
        """Name without ending -> path."""
        paths: dict[str, str] = {}
        for folder, folders, names in os.walk(self.base):
            folders.sort()
            for name in sorted(names):
                stem, _, ending = name.rpartition(".")
                if ending.lower() in _ENDINGS:
                    paths.setdefault(stem, os.path.relpath(os.path.join(folder, name), self.base))
        return paths


def _names(cells: Mapping[str, str]) -> list[str]:
    """The names that downloaders give to the sound of a row."""
    youtube, start = cells.get("youtube_id", ""), cells.get("start_time", "")
    names = [f"{youtube}_{start}"]
    try:
        begin = float(start)
    except ValueError:
        begin = -1.0
    if begin == int(begin) and begin >= 0:
        first, last = int(begin), int(begin) + _CLIP
        names += [f"{youtube}_{first}", f"{youtube}_{first}_{last}", f"{youtube}_{first * 1000}_{last * 1000}"]
    return list(dict.fromkeys([*names, cells.get("audiocap_id", ""), f"Y{youtube}", youtube]))


class ClothoSource(FileSource):
    """The captions of Clotho: `file_name` and `caption_1` to `caption_5`.

    Args:
        options: `path` is the .csv, `media` the folder of the sounds, `captions` which captions to use.
    """

    def records(self) -> Iterator[Record]:
        """One sample per caption that is used.

        Raises:
            DataError: the table cannot be read, or lacks a column.
        """
        number = 0
        for row in read_table(self.options.path, ("file_name", "caption_1"), self.options.limits):
            names = [name for name in row.cells if name.startswith("caption_")]
            chosen = chosen_captions([row.cells[name] for name in names], self.options.captions)
            for position, caption in chosen or [(0, "")]:
                number += 1
                value = caption_parts(row.cells.get("file_name", ""), "audio", caption)
                yield Record(row.where, number, value, clean_key(number, f"{row.number - 1}-{position + 1}"), row.cells)


AUDIOCAPS = SourceFormat(
    "audiocaps",
    "a .csv of audiocap_id, youtube_id, start_time, caption",
    frozenset({"media"}),
    lambda peek: {"youtube_id", "caption"} <= set(peek.header),
    AudioCapsSource,
)
CLOTHO = SourceFormat(
    "clotho",
    "a .csv of file_name, caption_1 to caption_5",
    frozenset({"media", "captions"}),
    lambda peek: {"file_name", "caption_1"} <= set(peek.header),
    ClothoSource,
)
