"""The rows of a shard as they stand in a file until the index is written: a JSON head, then the tables and the keys."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np

from megatron_anymal.data.index_format import MEDIA, SAMPLE
from megatron_anymal.data.left_out import LeftOut
from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_rows import ShardRows
from megatron_anymal.data.shard_samples import MemberCounts

# Increased if the layout changes. Precedes the length of the head.
_MAGIC = b"anymal-rows-1\n\0\0"


def accounting(rows: ShardRows) -> dict[str, Any]:
    """Everything about a shard but its rows and its ledger entries, as JSON values."""
    members = rows.members
    return {
        "name": rows.name,
        "bytes": rows.size,
        "modified": rows.modified,
        "samples": len(rows.samples),
        "media": len(rows.media),
        "key_bytes": len(rows.keys),
        "kinds": list(rows.kinds),
        "extensions": list(rows.extensions),
        "members": {**vars(members), "ignored": dict(members.ignored)},
        "damaged_bytes": rows.damaged_bytes,
        "text_with_media": rows.text_with_media,
    }


def restored(
    entry: Mapping[str, Any], samples: np.ndarray, media: np.ndarray, keys: bytes, left_out: Sequence[LeftOut]
) -> ShardRows:
    """The rows that `accounting` describes.

    Args:
        samples: [n] SAMPLE.
        media: [m] MEDIA.
        keys: concatenated keys of the samples.
        left_out: the shard's entries of the ledger.
    """
    members = entry["members"]
    return ShardRows(
        name=entry["name"],
        size=entry["bytes"],
        modified=entry["modified"],
        samples=samples,
        media=media,
        keys=keys,
        kinds=list(entry["kinds"]),
        extensions=list(entry["extensions"]),
        left_out=list(left_out),
        members=MemberCounts(members["seen"], members["used"], members["bad"], Counter(members["ignored"])),
        damaged_bytes=entry["damaged_bytes"],
    )


def write_rows(file: IO[bytes], rows: ShardRows, notes: Mapping[str, Any]) -> None:
    """Write a shard's rows at the position of the file.

    Args:
        notes: further JSON values that `read_head` returns.
    """
    contents = (rows.samples.tobytes(), rows.media.tobytes(), rows.keys)
    head = {**accounting(rows), "left_out": [one.to_dict() for one in rows.left_out], **notes, "crc": _crc(contents)}
    encoded = json.dumps(head).encode()
    file.write(_MAGIC + len(encoded).to_bytes(8, "little") + encoded)
    for content in contents:
        file.write(content)


def read_head(file: IO[bytes], where: str) -> dict[str, Any]:
    """The head of the rows at the position of the file, which then is behind it.

    Args:
        where: name of the file, for the error.

    Raises:
        DataError: there are no rows, or they are damaged.
    """
    magic, size = file.read(len(_MAGIC)), file.read(8)
    encoded = file.read(int.from_bytes(size, "little")) if magic == _MAGIC else b""
    try:
        head = json.loads(encoded)
    except ValueError:
        raise DataError(f"{where} is damaged. Remove it and index its shard again.") from None
    return dict(head)


def read_rows(file: IO[bytes], where: str) -> ShardRows:
    """The rows at the position of the file; the caller may change the arrays.

    Args:
        where: name of the file, for the error.

    Raises:
        DataError: there are no rows, or they are damaged.
    """
    head = read_head(file, where)
    sizes = head["samples"] * SAMPLE.itemsize, head["media"] * MEDIA.itemsize, head["key_bytes"]
    contents = [file.read(size) for size in sizes]
    if tuple(map(len, contents)) != sizes or _crc(contents) != head["crc"]:
        raise DataError(f"{where} is damaged. Remove it and index its shard again.")
    samples, media = (np.frombuffer(bytearray(data), of) for data, of in zip(contents, (SAMPLE, MEDIA)))
    return restored(head, samples, media, contents[2], [LeftOut.from_dict(entry) for entry in head["left_out"]])


def _crc(contents: Sequence[bytes]) -> int:
    value = 0
    for content in contents:
        value = zlib.crc32(content, value)
    return value
