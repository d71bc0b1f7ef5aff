"""Ego4D's IMU recordings with its narrations, as windows around the narrations (IMU2CLIP's 5 seconds)."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from megatron_anymal.data.prompt_encoder import MediaFile
from megatron_anymal.data.records import DataError
from megatron_anymal.evaluation.media_cells import MediaItem
from megatron_anymal.evaluation.samples import TaskSample
from megatron_anymal.evaluation.task import Task

WINDOW_SECONDS = 5.0
_TIME = "canonical_timestamp_ms"
_CHANNELS = ("accl_x", "accl_y", "accl_z", "gyro_x", "gyro_y", "gyro_z")
# "#C C walks": what the camera wearer does, whom the IMU moves with.
_WEARER = re.compile(r"^\s*#\s*C\s+C\b\s*", re.IGNORECASE)
# Uncertain words of annotators.
_UNSURE = re.compile(r"#\s*unsure", re.IGNORECASE)
_VIDEOS = "test_videos.txt"


def read_ego4d(task: Task, folder: Path) -> tuple[list[TaskSample], str]:
    """Samples of the videos listed in test_videos.txt: one per narration of the camera wearer's motion.

    `#C C` becomes `[Camera wearer]`, as in the paper's examples (table 9).

    Raises:
        DataError: a file is missing or cannot be used.
    """
    path = next((folder / name for name in task.files if (folder / name).is_file()), None)
    if path is None:
        raise DataError(f"{str(folder)!r} holds no {' or '.join(task.files)}. Name the folder of Ego4D.")
    videos = json.loads(path.read_text(encoding="utf-8"))
    videos = videos.get("videos", videos)
    samples: list[TaskSample] = []
    uids = _held_out(folder)
    for uid in uids:
        if uid not in videos:
            raise DataError(f"{str(path)!r} has no video {uid!r}, which {_VIDEOS} lists. Remove it there.")
        samples += _of_video(task, folder, uid, videos[uid], len(samples))
    if not samples:
        raise DataError(f"{str(path)!r}: no narration of {len(uids)} videos has an IMU recording at its time.")
    return samples, f"{len(samples)} narrations of {' '.join(uids)}"


def _of_video(task: Task, folder: Path, uid: str, video: Mapping[str, Any], first: int) -> list[TaskSample]:
    path = folder / task.media.folder / f"{uid}{task.media.extension}"
    if not path.is_file():
        raise DataError(f"video {uid}: there is no media file {str(path)!r}. Remove the video from {_VIDEOS}.")
    times = [time for time, _ in _recording(path)]
    samples: list[TaskSample] = []
    for name, seconds, text in _narrations(video):
        start = 1000 * (seconds - WINDOW_SECONDS / 2)
        if not times or times[-1] < start + 1000 * WINDOW_SECONDS or times[0] > start:
            continue
        item = MediaItem(f"{path} at {seconds:.2f} s", partial(_window, path, start))
        samples.append(TaskSample(first + len(samples), f"{uid}/{name}", task.prompt, {}, (item,), (text,)))
    return samples


def _held_out(folder: Path) -> list[str]:
    path = folder / _VIDEOS
    if not path.is_file():
        raise DataError(
            f"There is no {str(path)!r}. The paper's held-out split is not published: list there the uid of every "
            "video that the model was not trained on, one per line."
        )
    return path.read_text().split()


def _narrations(video: Mapping[str, Any]) -> Iterator[tuple[str, float, str]]:
    """Name, time in seconds and text of the narrations about the camera wearer."""
    for turn in ("narration_pass_1", "narration_pass_2"):
        for number, one in enumerate((video.get(turn) or {}).get("narrations", [])):
            text = str(one.get("narration_text") or "")
            if _WEARER.match(text) and not _UNSURE.search(text):
                yield f"{turn}/{number}", float(one["timestamp_sec"]), _WEARER.sub("[Camera wearer] ", text).strip()


@lru_cache(maxsize=2)
def _recording(path: Path) -> list[tuple[float, str]]:
    """Time in ms and line of the six channels of each row; rows without all of them are left out."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if missing := {_TIME, *_CHANNELS}.difference(reader.fieldnames or ()):
            present = ", ".join(reader.fieldnames or ())
            raise DataError(f"{str(path)!r}: the column {min(missing)!r} is missing; present: {present}.")
        rows = ([row[_TIME], *(row[name] for name in _CHANNELS)] for row in reader)
        return [(float(row[0]), ",".join(row)) for row in rows if all(row) and "nan" not in map(str.lower, row)]


def _window(path: Path, start: float) -> MediaFile:
    """The window that begins at `start` ms, as a csv file."""
    end = start + 1000 * WINDOW_SECONDS
    out = io.StringIO()
    out.write(",".join(["timestamp_ms", *_CHANNELS]) + "\n")
    out.writelines(f"{line}\n" for time, line in _recording(path) if start <= time < end)
    return MediaFile(out.getvalue().encode(), "csv")
