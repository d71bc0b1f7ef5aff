"""Ego4D's IMU signals and narrations: a window of the signal around each narration.

A folder has one VIDEO_UID.csv per video, with `canonical_timestamp_ms`, `accl_x` to `accl_z` and `gyro_x` to `gyro_z`.
Narrations are Ego4D's narration.json or all_narrations_redacted.json (times of single moments; the window is centred on
them), or a .csv of `video_uid`, `start`, `end` (seconds of the canonical video) and `text`.

A window is stored as .csv with the numbers as they are in the file: nothing is resampled or filled in. Rows without a
canonical time, which lie outside the canonical video, are not used. The tags of narrations are removed as IMU2CLIP
does: "#C C walks" becomes "walks", "#O man X" becomes "man X", "#unsure" becomes "something".
"""

from __future__ import annotations

import csv
import json
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_samples import SampleError
from megatron_anymal.data.source_records import Record, Source
from megatron_anymal.data.sources.source_format import Peek, SourceFormat, SourceOptions, caption_parts, clean_key
from megatron_anymal.data.tables import read_table

TIME = "canonical_timestamp_ms"
CHANNELS = ("accl_x", "accl_y", "accl_z", "gyro_x", "gyro_y", "gyro_z")
# IMU2CLIP's longer window, in seconds.
DEFAULT_WINDOW = 5.0
# Smallest part of a window that the signal must cover.
_COVERED = 0.9


@dataclass(frozen=True)
class _Narration:
    """A text and the part of a video that it describes, in seconds."""

    video: str
    start: float
    end: float
    text: str
    where: str


@dataclass(frozen=True)
class _Recording:
    """The rows of an IMU file, in the order of their times."""

    # Time of each row, in ms.
    times: array[float]
    # Times and channels of each row, as text.
    rows: list[str]


class Ego4dImuSource(Source):
    """Windows of IMU signals with narrations.

    Args:
        options: `path` is the folder of the .csv files, `narrations` the file of texts, `window` the length in seconds.

    Raises:
        DataError: there are no narrations, or an option does not fit them.
    """

    def __init__(self, options: SourceOptions):
        super().__init__(str(options.path), options.path)
        if options.narrations is None:
            raise DataError("--from ego4d-imu needs --narrations FILE: Ego4D's narration.json, or a .csv of texts.")
        if not options.narrations.is_file():
            raise DataError(f"There is no file of narrations {str(options.narrations)!r}.")
        if options.narrations.suffix == ".csv" and options.window is not None:
            raise DataError("--window does not apply to narrations in a .csv, which state the start and the end.")
        self._options, self._narrations = options, options.narrations
        self._window = DEFAULT_WINDOW if options.window is None else options.window
        if not self._window > 0:
            raise DataError(f"--window {self._window} must be above 0 seconds.")
        self._last: tuple[str, _Recording | SampleError] = ("", SampleError("media", ""))

    def files(self) -> Sequence[Path]:
        """The narrations; the signals count as media."""
        return [self._narrations]

    def settings(self) -> Mapping[str, Any]:
        """The length of a window."""
        return {"window": self._window}

    def records(self) -> Iterator[Record]:
        """One sample per narration of a video that has an IMU file, by video and time.

        Raises:
            DataError: the narrations cannot be read.
        """
        for number, narration in enumerate(self._usable, start=1):
            name, start = f"{narration.video}.csv", round(narration.start * 1000)
            value = caption_parts(name, "imu", plain_text(narration.text))
            contents = {name: partial(self._cut, narration)}
            yield Record(
                narration.where, number, value, clean_key(number, f"{narration.video}-{start}"), contents=contents
            )

    def remarks(self) -> Sequence[str]:
        """How many videos have only a signal or only narrations."""
        signals, narrated = self._videos, {narration.video for narration in self._all}
        return [
            f"{len(narrated - signals)} of {len(narrated)} narrated videos have no IMU file; "
            f"{len(signals - narrated)} of {len(signals)} IMU files have no narration"
        ]

    @cached_property
    def _videos(self) -> set[str]:
        return {path.stem for path in self._options.path.glob("*.csv")}

    @cached_property
    def _all(self) -> list[_Narration]:
        if self._narrations.suffix == ".csv":
            return list(self._of_table())
        return list(_of_json(self._narrations, self._window))

    @cached_property
    def _usable(self) -> list[_Narration]:
        usable = [narration for narration in self._all if narration.video in self._videos]
        if self._all and not usable:
            raise DataError(
                f"No video of {str(self._narrations)!r} has an IMU file in {self.path!r}; the first is "
                f"{self._all[0].video!r}. The file must be {self._all[0].video}.csv."
            )
        return sorted(usable, key=lambda narration: (narration.video, narration.start))

    def _of_table(self) -> Iterator[_Narration]:
        for row in read_table(self._narrations, ("video_uid", "start", "end", "text"), self._options.limits):
            cells = row.cells
            try:
                start, end = float(cells["start"]), float(cells["end"])
            except (KeyError, ValueError):
                raise DataError(f"{row.where}: `start` and `end` must be numbers of seconds.") from None
            yield _Narration(cells.get("video_uid", ""), start, end, cells.get("text", ""), row.where)

    def _cut(self, narration: _Narration) -> bytes:
        """The rows of a window as .csv.

        Raises:
            SampleError: the signal covers too little of the window.
        """
        if self._last[0] != narration.video:
            # The records come by video.
            self._last = (narration.video, _recording(self._options.path / f"{narration.video}.csv"))
        recording = self._last[1]
        if isinstance(recording, SampleError):
            raise recording
        times, rows = recording.times, recording.rows
        first, last = (bisect_left(times, seconds * 1000) for seconds in (narration.start, narration.end))
        covered = (times[last - 1] - times[first]) / 1000 if last - first > 1 else 0.0
        length = narration.end - narration.start
        if covered < _COVERED * length or length <= 0:
            raise SampleError("media", f"its IMU signal covers {covered:.2f} of {length:.2f} s.")
        return "\n".join([f"timestamp_ms,{','.join(CHANNELS)}", *rows[first:last], ""]).encode()


def plain_text(narration: str) -> str:
    """A narration without the tags of the camera wearer (#C), of other people (#O) and of doubt (#unsure)."""
    text = re.sub(r"#\s*unsure\b", "something", narration, flags=re.IGNORECASE)
    text = re.sub(r"#\s*c\s+c\b\s*|#\s*[co]\b\s*", "", text, flags=re.IGNORECASE)
    return " ".join(text.split())


def _of_json(path: Path, window: float) -> Iterator[_Narration]:
    """The narrations of narration.json (by pass) or all_narrations_redacted.json (one list)."""
    try:
        content = json.loads(path.read_bytes())
        for video, annotated in content.get("videos", content).items():
            passes = {name: one for name, one in annotated.items() if name.startswith("narration_pass")}
            for name, one in (passes or {"narrations": annotated}).items():
                for entry in one.get("narrations", []):
                    time, text = ("timestamp_sec", "narration_text") if passes else ("time", "text")
                    moment = float(entry[time])
                    start = max(0.0, moment - window / 2)
                    where = f"{path.name}: {video}, {name} at {moment:g} s"
                    yield _Narration(video, start, start + window, str(entry[text]), where)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}).") from None
    except (AttributeError, TypeError, KeyError) as error:
        raise DataError(
            f"{path}: not in the layout of Ego4D's narration.json or all_narrations_redacted.json ({error!r})."
        ) from None


def _recording(path: Path) -> _Recording | SampleError:
    """The rows of a file; why it cannot be used."""
    timed_rows: list[tuple[float, str]] = []
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        if missing := [name for name in (TIME, *CHANNELS) if name not in header]:
            return SampleError("column", f"{path.name} has no column {missing[0]!r}; its columns: {', '.join(header)}.")
        wanted = [header.index(name) for name in (TIME, *CHANNELS)]
        for row in rows:
            try:
                cells = [row[column] for column in wanted]
                timed_rows.append((float(cells[0]), ",".join(cells)))
            except (ValueError, IndexError):
                # Outside the canonical video: the time is empty or NULL.
                continue
    timed_rows.sort(key=lambda pair: pair[0])
    return _Recording(array("d", (time for time, _ in timed_rows)), [row for _, row in timed_rows])


def _recognizes(peek: Peek) -> bool:
    tables = sorted(name for name in peek.names if name.endswith(".csv"))
    return bool(tables) and TIME in Peek.of(peek.path / tables[0]).header


FORMAT = SourceFormat(
    "ego4d-imu",
    "a folder of Ego4D's IMU .csv files, with --narrations",
    frozenset({"narrations", "window"}),
    _recognizes,
    Ego4dImuSource,
)
