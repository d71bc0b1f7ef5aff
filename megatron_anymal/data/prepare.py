"""`anymal prepare`: a manifest or other people's shards become shards with an index."""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from megatron_anymal.children import end_with_parent
from megatron_anymal.data.indexing import IndexOptions, ShardRows, assemble, find_shards, index_shard
from megatron_anymal.data.samples import media_entries, parse_sample, read_lines, to_json
from megatron_anymal.data.shards import IndexHeader, write_index
from megatron_anymal.data.tokenize import Tokenizer
from megatron_anymal.data.types import DataError
from megatron_anymal.modalities import load_plugins
from megatron_anymal.telemetry import Progress

# Loaded once in each indexing process.
_tokenizers: dict[str, Tokenizer] = {}


def main(argv: Sequence[str]) -> int:
    """The verb. Returns the exit code."""
    arguments = _parser().parse_args(argv)
    if arguments.quickstart:
        from megatron_anymal.quickstart.prepare import prepare_quickstart

        prepare_quickstart(Path(arguments.quickstart))
        return 0
    if not arguments.tokenizer:
        raise DataError("--tokenizer is missing: the index holds lengths in tokens. Name a tokenizer's folder.")
    options = IndexOptions(arguments.tokenizer, dict(_pair(p) for p in arguments.modality), arguments.plugin)
    if arguments.manifest:
        if not arguments.out:
            raise DataError("--manifest needs --out, the folder to write shards into.")
        write_shards(arguments.manifest, arguments.out, arguments.samples_per_shard, arguments.overwrite)
    folder = arguments.out if arguments.manifest else arguments.index_only
    make_index(folder, options, arguments.workers, arguments.max_bad_share)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="anymal prepare", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--manifest", help="a .jsonl or .csv of media paths and texts, to be packed into shards")
    source.add_argument("--index-only", metavar="FOLDER", help="a folder of WebDataset shards, to be indexed in place")
    source.add_argument("--quickstart", metavar="FOLDER", help="make the built-in quickstart set")
    parser.add_argument("--out", help="with --manifest: the folder to make")
    parser.add_argument("--tokenizer", help="folder of the tokenizer that training will use")
    parser.add_argument("--samples-per-shard", type=int, default=2000)
    parser.add_argument("--overwrite", action="store_true", help="replace what --out holds")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that index shards")
    parser.add_argument("--max-bad-share", type=float, default=0.01, help="stop above this share of bad samples")
    parser.add_argument("--modality", action="append", default=[], metavar="ENDING=KIND", help="for example npy=imu")
    parser.add_argument("--plugin", action="append", default=[], help="a file that registers further modalities")
    return parser


def _pair(text: str) -> tuple[str, str]:
    ending, equals, kind = text.partition("=")
    if not equals:
        raise DataError(f"--modality {text!r} is not of the form ENDING=KIND, for example npy=imu.")
    return ending.lower().lstrip("."), kind


def write_shards(manifest: str, out: str, samples_per_shard: int = 2000, overwrite: bool = False) -> None:
    """Pack a manifest's samples into WebDataset shards.

    A .jsonl line is a sample (data/samples.py) with a `key`, or `{"key": ..., "media": PATH, "text": ...}`; a .csv
    has the columns media and text, and may have key, modality and attributes of the media (rate). Paths are relative
    to the manifest.

    Raises:
        DataError: naming the line that is wrong, or the media file that is missing.
    """
    import webdataset

    folder = Path(out)
    if folder.is_dir() and any(folder.glob("*.tar")):
        if not overwrite:
            raise DataError(f"{out!r} already holds shards. Name another folder, or add --overwrite.")
        for old in folder.glob("*.tar"):
            old.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob("*.tar.part"):
        unfinished.unlink()
    lines = list(_read_manifest(Path(manifest)))
    if not lines:
        raise DataError(f"The manifest {manifest!r} has no line.")
    progress = Progress("packing", len(lines))
    seen: set[str] = set()
    for shard, start in enumerate(range(0, len(lines), samples_per_shard)):
        path = folder / f"shard-{shard:06d}.tar"
        unfinished = path.with_suffix(".tar.part")
        with webdataset.TarWriter(str(unfinished), mtime=0) as writer:
            for where, line in lines[start : start + samples_per_shard]:
                sample = _to_sample(line, where, Path(manifest).parent)
                if sample["__key__"] in seen:
                    raise DataError(f"{where}: the key {sample['__key__']!r} occurs twice.")
                seen.add(sample["__key__"])
                writer.write(sample)
                progress.advance()
        unfinished.rename(path)
    progress.finish()


def _read_manifest(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Pairs of a line's name for messages and its content."""
    if not path.is_file():
        raise DataError(f"There is no manifest {str(path)!r}.")
    if path.suffix not in (".csv", ".jsonl"):
        raise DataError(f"The manifest {str(path)!r} must be a .csv or a .jsonl file.")
    if path.suffix == ".jsonl":
        yield from read_lines(path)
        return
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            if None in row:
                raise DataError(f"{path}:{number}: the line has more cells than the header. Quote commas in texts.")
            yield f"{path}:{number}", {k: _cell(k, v) for k, v in row.items() if v not in (None, "")}


def _cell(column: str, text: Any) -> Any:
    """A .csv cell; in a column of the media's own attributes, such as an IMU's rate, numbers are numbers."""
    if column in ("key", "media", "modality", "text"):
        return text
    try:
        return json.loads(text)
    except (TypeError, json.JSONDecodeError):
        return text


def _to_sample(line: dict[str, Any], where: str, base: Path) -> dict[str, Any]:
    """A manifest line as a WebDataset sample."""
    value = line
    if "parts" not in line and "messages" not in line:
        if "text" not in line or "media" not in line:
            raise DataError(f"{where}: a line needs `parts`, `messages`, or `media` and `text`.")
        media = {k: v for k, v in line.items() if k not in ("key", "text")}
        value = {"parts": [media, {"text": line["text"]}]}
    parse_sample(value, where)
    key = str(line.get("key") or "").replace(".", "_") or f"{int(where.rpartition(':')[2]):09d}"
    sample: dict[str, Any] = {"__key__": key}
    names: list[str] = []
    for entry in media_entries(value):
        path = base / entry["media"]
        if not path.is_file():
            raise DataError(f"{where}: there is no media file {str(path)!r}.")
        names.append(f"{len(names)}.{path.name.partition('.')[2].lower()}")
        sample[names[-1]] = path.read_bytes()
    sample["json"] = to_json(value, names)
    return sample


def make_index(folder: str, options: IndexOptions, workers: int = 1, max_bad_share: float = 0.01) -> None:
    """Index every shard of a folder.

    Raises:
        DataError: no shard, a shard that is no tar file, or more bad samples than allowed.
    """
    names = find_shards(folder)
    progress = Progress("indexing shards", len(names))
    shards = []
    for rows in _index_all(folder, names, options, workers):
        shards.append(rows)
        progress.advance()
    progress.finish()
    good, bad = sum(len(s.samples) for s in shards), [why for s in shards for why in s.bad]
    for why in bad[:20]:
        print(f"left out {why}", file=sys.stderr)
    if len(bad) > 20:
        print(f"left out {len(bad) - 20} more", file=sys.stderr)
    if len(bad) > max_bad_share * (good + len(bad)):
        raise DataError(
            f"{len(bad)} of {good + len(bad)} samples of {folder!r} are bad, above --max-bad-share {max_bad_share}. "
            f"The first: {bad[0]}"
        )
    samples, media, keys, kinds, extensions = assemble(shards)
    header = IndexHeader(
        shards=tuple(s.name for s in shards),
        shard_bytes=tuple(s.bytes for s in shards),
        kinds=tuple(kinds),
        extensions=tuple(extensions),
        tokenizer=Tokenizer(options.tokenizer).fingerprint(),
    )
    write_index(folder, header, samples, media, keys)
    print(f"{folder}: {good} samples, {len(media)} media items, {len(bad)} left out, {len(shards)} shards")


def _index_all(folder: str, names: Sequence[str], options: IndexOptions, workers: int) -> Iterator[ShardRows]:
    jobs = [(folder, name, options) for name in names]
    if workers <= 1 or len(names) == 1:
        yield from map(_index_one, jobs)
        return
    processes = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(names)), mp_context=processes, initializer=end_with_parent) as pool:
        yield from pool.map(_index_one, jobs)


def _index_one(job: tuple[str, str, IndexOptions]) -> ShardRows:
    folder, name, options = job
    load_plugins(list(options.plugins))
    if options.tokenizer not in _tokenizers:
        _tokenizers[options.tokenizer] = Tokenizer(options.tokenizer)
    return index_shard(folder, name, _tokenizers[options.tokenizer], options)
