"""Conversion of a manifest, a list of media files and texts, to WebDataset shards."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from megatron_anymal.config import DEFAULT_LIMITS, LimitsConfig
from megatron_anymal.data.records import DataError, TextPart
from megatron_anymal.data.samples import UTF16_MARKS, media_entries, parse_line, parse_sample, raw_lines, to_json
from megatron_anymal.data.shard_samples import MAX_KEY_BYTES
from megatron_anymal.telemetry import Progress

_DELIMITERS = (",", ";", "\t")
_COLUMNS = ("key", "media", "modality", "text")


@dataclass(frozen=True)
class ManifestLine:
    """A line of a manifest."""

    # File and line, for error messages.
    where: str
    # Its number, counted from 1: used as the key if the line has none.
    number: int
    # Its object, or the cells of a .csv by column.
    value: dict[str, Any]


def write_shards(
    manifest: str,
    out: str,
    samples_per_shard: int = 2000,
    overwrite: bool = False,
    limits: LimitsConfig = DEFAULT_LIMITS,
) -> None:
    """Pack a manifest's samples into WebDataset shards.

    A .jsonl line is a sample (data/samples.py) with an optional `key`, or `{"key": ..., "media": PATH, "text": ...}`. A
    .csv file (separated by commas, semicolons or tabs) has the columns media and text, and optionally key, modality and
    attributes of the media (such as rate). Paths are relative to the manifest.

    Raises:
        DataError: naming the invalid line, or the media file that is missing or too large.
    """
    folder, path = Path(out), existing(manifest)
    if folder.is_dir() and any(folder.glob("*.tar")) and not overwrite:
        raise DataError(f"{out!r} already holds shards. Name another folder, or add --overwrite.")
    # Every line is parsed before the first shard is written, and again for its shard: memory holds one shard.
    count = sum(1 for _ in read_manifest(path, limits))
    if not count:
        raise DataError(f"The manifest {manifest!r} has no lines.")
    folder.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(folder)
    progress = Progress("packing", count)
    seen: set[str] = set()
    unfinished = []
    try:
        for shard, lines in shard_lines(path, samples_per_shard, limits):
            unfinished.append(folder / f"{shard_name(shard)}.part")
            write_shard(unfinished[-1], lines, path.parent, limits, seen)
            progress.advance(len(lines))
    except DataError:
        _remove_unfinished(folder)
        raise
    progress.finish()
    # Only now: a wrong line must not cost the shards that the folder had before.
    for old in folder.glob("*.tar"):
        old.unlink()
    for shard_path in unfinished:
        shard_path.rename(shard_path.with_suffix(""))


def shard_name(shard: int) -> str:
    """File name of a shard by its number, counted from 0."""
    return f"shard-{shard:06d}.tar"


def existing(manifest: str) -> Path:
    """Path of a manifest.

    Raises:
        DataError: there is no such file, or its ending is not one of a manifest.
    """
    path = Path(manifest)
    if not path.is_file():
        raise DataError(f"There is no manifest {manifest!r}.")
    if path.suffix not in (".csv", ".jsonl"):
        raise DataError(f"The manifest {manifest!r} must be a .csv or a .jsonl file.")
    return path


def _remove_unfinished(folder: Path) -> None:
    for path in folder.glob("*.tar.part"):
        path.unlink()


def write_shard(path: Path, lines: Sequence[ManifestLine], base: Path, limits: LimitsConfig, seen: set[str]) -> None:
    """Write a shard.

    Args:
        base: folder that the paths of media are relative to.
        seen: keys of earlier shards; those of this one are added.

    Raises:
        DataError: naming the line that is wrong, or the media file that is missing or too large.
    """
    import webdataset

    with webdataset.TarWriter(str(path), mtime=0) as writer:
        for line in lines:
            sample = _to_sample(line, base, limits)
            if sample["__key__"] in seen:
                raise DataError(
                    f"{line.where}: the key {sample['__key__']!r} occurs twice. Give each line a key of its own."
                )
            seen.add(sample["__key__"])
            writer.write(sample)


def shard_lines(
    path: Path, samples_per_shard: int, limits: LimitsConfig, takes: Callable[[int], bool] = lambda _: True
) -> Iterator[tuple[int, list[ManifestLine]]]:
    """The lines of a manifest by the number of their shard.

    Args:
        takes: whether a shard is wanted, by its number.

    Raises:
        DataError: naming the line that is wrong.
    """
    lines = read_manifest(path, limits, lambda position: takes(position // samples_per_shard))
    for shard, group in itertools.groupby(lines, lambda entry: entry[0] // samples_per_shard):
        yield shard, [line for _, line in group]


def read_manifest(
    path: Path, limits: LimitsConfig, takes: Callable[[int], bool] = lambda _: True
) -> Iterator[tuple[int, ManifestLine]]:
    """The lines of a manifest with their positions, counted from 0; empty lines are skipped.

    Args:
        takes: whether a line is wanted, by its position.

    Raises:
        DataError: naming the line that is wrong.
    """
    if path.suffix == ".jsonl":
        for position, (number, data) in enumerate(raw_lines(path, limits)):
            if takes(position):
                where = f"{path}:{number}"
                yield position, ManifestLine(where, number, parse_line(data, where, limits))
    else:
        yield from ((position, line) for position, line in enumerate(_read_table(path, limits)) if takes(position))


def _text_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, with line breaks.

    Raises:
        DataError: naming the line that is not UTF-8.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line.startswith(UTF16_MARKS):
                raise DataError(f"{path}: the file is UTF-16. Save it as UTF-8.")
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number}: byte {line[error.start]:#04x} is not UTF-8. Save the file as UTF-8."
                ) from None


def _read_table(path: Path, limits: LimitsConfig) -> Iterator[ManifestLine]:
    """The rows of a .csv file as objects keyed by column name; empty cells are left out."""
    lines = _text_lines(path)
    first = next(lines, "")
    delimiter = next((mark for mark in _DELIMITERS if _has_columns(first.split(mark))), None)
    if delimiter is None:
        raise DataError(
            f"{path}:1: the first line must name the columns `media` and `text`, separated by commas, semicolons or "
            f"tabs: {first.strip()[:80]!r}."
        )
    # The csv module has only this process-wide setting.
    csv.field_size_limit(limits.max_text_bytes)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    header = _header(path, next(csv.reader([first], delimiter=delimiter)))
    number = 1
    try:
        for row in rows:
            if not row:
                continue
            number += 1
            where = f"{path}:{rows.line_num + 1}"
            if len(row) != len(header):
                more = "more" if len(row) > len(header) else "fewer"
                raise DataError(f"{where}: the line has {more} cells than the header. Quote {delimiter!r} in texts.")
            yield ManifestLine(
                where, number, {name: _cell(name, text) for name, text in zip(header, row) if text != ""}
            )
    except csv.Error as error:
        limit = f"; the longest is data.limits.max_text_bytes={limits.max_text_bytes}" if "limit" in str(error) else ""
        raise DataError(f"{path}:{rows.line_num + 1}: not a line of a .csv file ({error}{limit}).") from None


def _has_columns(names: Sequence[str]) -> bool:
    return {"media", "text"} <= {name.strip().strip('"').lower() for name in names}


def _header(path: Path, cells: Sequence[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    names = [name.lower() if name.lower() in _COLUMNS else name for name in names]
    twice = [name for name in names if names.count(name) > 1]
    if twice or "" in names:
        raise DataError(
            f"{path}:1: the column {(twice or [''])[0]!r} " + ("occurs twice." if twice else "has no name.")
        )
    return names


def _cell(column: str, text: str) -> Any:
    """The value of a .csv cell. Media attributes, such as the rate of an IMU, are parsed as JSON if possible."""
    if column in _COLUMNS:
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _to_sample(line: ManifestLine, base: Path, limits: LimitsConfig) -> dict[str, Any]:
    """Convert a manifest line to a WebDataset sample."""
    where, value = line.where, line.value
    if "parts" not in value and "messages" not in value:
        if "text" not in value or "media" not in value:
            raise DataError(f"{where}: a line needs `parts`, `messages`, or `media` and `text`.")
        media = {k: v for k, v in value.items() if k not in ("key", "text")}
        value = {"parts": [media, {"text": value["text"]}]}
    parsed = parse_sample(value, where)
    if parsed.kind == "parts" and not any(isinstance(p, TextPart) and p.text.strip() for p in parsed.documents[0]):
        raise DataError(
            f"{where}: its text is empty, so there is nothing to learn from it. Write its text, or remove the line."
        )
    sample: dict[str, Any] = {"__key__": _key(line)}
    names: list[str] = []
    for entry in media_entries(value):
        path = base / entry["media"]
        if not path.is_file():
            raise DataError(
                f"{where}: there is no media file {str(path)!r}. Correct the path, which is relative to the manifest, "
                "or remove the line."
            )
        size = path.stat().st_size
        if size > limits.max_member_bytes:
            limit = f"data.limits.max_member_bytes={limits.max_member_bytes}"
            raise DataError(f"{where}: {str(path)!r} has {size} bytes, above {limit}.")
        names.append(f"{len(names)}.{path.name.partition('.')[2].lower()}")
        sample[names[-1]] = path.read_bytes()
    sample["json"] = to_json(value, names)
    return sample


def _key(line: ManifestLine) -> str:
    """The key of a line. Dots are replaced, because WebDataset ends the key at the first dot.

    Raises:
        DataError: the key is neither a string nor an integer, is too long, or has control characters.
    """
    stated: Optional[Any] = line.value.get("key")
    if stated is None or stated == "":
        return f"{line.number:09d}"
    if isinstance(stated, bool) or not isinstance(stated, (str, int)):
        raise DataError(f"{line.where}: the key {stated!r} must be a string or an integer.")
    key = str(stated).replace(".", "_")
    if not key.isprintable() or key.rpartition("/")[2] == "":
        raise DataError(f"{line.where}: the key {key[:80]!r} contains characters that a file name cannot have.")
    if len(key.encode()) > MAX_KEY_BYTES:
        raise DataError(f"{line.where}: the key has {len(key.encode())} bytes, above {MAX_KEY_BYTES}.")
    return key
