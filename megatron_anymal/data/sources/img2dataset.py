"""The output of img2dataset and video2dataset with output_format=webdataset, indexed in place.

A sample is `KEY.jpg` (or another picture, video or sound), `KEY.txt` and `KEY.json`. The .json holds the columns of the
URL list and what the download found (status, width, similarity, ...); it is read for filters only. Downloads that
failed are not in the shards; `NNNNN_stats.json` counts them.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_anymal.data.records import DataError
from megatron_anymal.data.sources.source_format import Peek, ShardFolder, SourceFormat, SourceOptions

_MEMBERS = ("jpg", "jpeg", "png", "webp", "mp4", "webm", "mkv", "m4a", "mp3", "wav", "flac", "txt")


def open_shards(options: SourceOptions) -> ShardFolder:
    """The folder of the shards.

    Raises:
        DataError: it holds single files or .parquet instead of shards.
    """
    peek = Peek.of(options.path)
    if not peek.has(".tar"):
        raise DataError(
            f"{str(options.path)!r} contains no .tar shard: it was written with another output_format. Download again "
            "with output_format=webdataset."
        )
    return ShardFolder(str(options.path), _MEMBERS, _downloads(options.path))


def _downloads(folder: Path) -> list[str]:
    """How many downloads succeeded, by the statistics next to the shards."""
    tried = succeeded = files = 0
    for path in sorted(folder.glob("*_stats.json")):
        try:
            stats = json.loads(path.read_text())
            tried, succeeded, files = tried + int(stats["count"]), succeeded + int(stats["successes"]), files + 1
        except (ValueError, KeyError, TypeError):
            return [f"{path.name} cannot be read: the number of failed downloads is unknown"]
    if not files:
        return []
    failed = tried - succeeded
    return [f"{folder}: {tried} downloads tried, {succeeded} in the shards, {failed} failed ({files} *_stats.json)"]


def _recognizes(peek: Peek) -> bool:
    return peek.has("_stats.json") or (peek.has(".tar") and peek.has(".parquet"))


FORMAT = SourceFormat(
    "img2dataset", "a folder of img2dataset's or video2dataset's shards", frozenset(), _recognizes, open_shards
)
