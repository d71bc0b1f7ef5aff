"""Indexing of a folder by any number of machines: each reads a part of the shards, and a last step joins the parts.

Part K of N takes each N-th shard in the order of the names. It leaves the rows of each shard in a file under
`index/parts/`, so that a part that was interrupted continues with the shards that it lacks. The joined index is byte
for byte the one that a single process writes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Optional

from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.index_processes import ShardReader, index_shards
from megatron_anymal.data.index_totals import RowStore, complete_index
from megatron_anymal.data.indexed_shards import IndexedShards, indexed_shards
from megatron_anymal.data.manifest_parts import join_journals
from megatron_anymal.data.part_files import PartFiles, digest
from megatron_anymal.data.part_of import PartOf
from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_listing import ShardFile, find_shards
from megatron_anymal.data.tokenizer import Tokenizer

# Maximum number of parts or shards that an error names.
_NAMED = 8


def index_part(
    folder: str,
    options: IndexOptions,
    part: PartOf,
    workers: int = 1,
    rebuild: bool = False,
    names: Optional[Collection[str]] = None,
) -> None:
    """Index a part of a folder's shards. Those that this or another part, or an earlier index, has are not read again.

    Args:
        workers: maximum number of processes; few or small shards are indexed by fewer.
        rebuild: also read shards that the folder's index has.
        names: the shards of the part. None: each N-th of those in the folder.

    Raises:
        DataError: there are no shards, the tokenizer cannot be used, or nothing can be written next to the shards.
        ConfigError: a plug-in cannot be imported.
        StorageError: the object store cannot be used.
    """
    shards = {} if names is not None and not names else find_shards(folder)
    files = part.items(list(shards.values())) if names is None else [shards[name] for name in names]
    reader = ShardReader(folder, options, Tokenizer(options.tokenizer))
    identity = reader.identity()
    made_with, parts = digest(identity), PartFiles(folder)
    parts.create()
    parts.unmark(part)
    indexed = IndexedShards(None) if rebuild else indexed_shards(folder, identity)
    new = [file for file in files if not parts.complete(file, made_with) and not indexed.unchanged(file)]
    left_out = 0
    for rows in index_shards(reader, new, workers):
        parts.store(rows, made_with)
        left_out += sum(entry.is_bad for entry in rows.left_out)
    parts.mark(part, identity, len(files))
    read = f"{len(new)} read; {left_out} samples or members left out"
    print(f"{folder}: part {part}: {len(files) - len(new)} shards kept, {read}")


def merge_parts(folder: str, max_bad_share: float = 0.01) -> None:
    """Write the index of a folder from the rows of all parts, and remove these.

    Args:
        max_bad_share: maximum share of samples that may be left out, and of bytes that may be unreadable.

    Raises:
        DataError: a part is missing, parts were made with different options, a shard was added or has changed since,
            or more is left out than allowed.
        StorageError: the object store cannot be used.
    """
    files = find_shards(folder)
    parts = PartFiles(folder)
    marks = parts.marks()
    of = _require_complete(folder, marks)
    marks = {part: mark for part, mark in marks.items() if part.of == of}
    identity = _common_options(folder, {part: mark["options"] for part, mark in marks.items()})
    from_manifest = parts.manifest() is not None
    made = sum(mark["shards"] for mark in marks.values())
    if from_manifest and made != len(files):
        raise DataError(f"{folder!r} has {len(files)} shards, but its parts made {made}. Run the parts again.")
    made_with = digest(identity)
    current = {name for name, file in files.items() if parts.current(file, made_with)}
    indexed = indexed_shards(folder, identity)
    unchanged = {name for name, file in files.items() if name not in current and indexed.unchanged(file)}
    kept = indexed.usable(unchanged, any(parts.entry(name)["text_with_media"] for name in current))
    _require_rows(folder, files, current | unchanged, unchanged - kept, of)
    stores: dict[str, RowStore] = {name: parts if name in current else indexed for name in files}
    if kept:
        print(f"{folder}: {len(kept)} shards kept, {len(current)} from {of} parts")
    if from_manifest:
        join_journals(folder)
    complete_index(folder, stores, identity, max_bad_share, unique_keys=from_manifest)
    parts.remove()


def _require_complete(folder: str, finished: Collection[PartOf]) -> int:
    """The number of parts; if there are parts of different divisions, that of the most complete one.

    Raises:
        DataError: a part is missing.
    """
    if not finished:
        raise DataError(f"{folder!r} has no finished part. Run `anymal prepare` with --part 1/1, or 1/N to N/N, first.")
    missing = {
        of: [PartOf(number, of) for number in range(1, of + 1) if PartOf(number, of) not in finished]
        for of in {part.of for part in finished}
    }
    of = min(missing, key=lambda one: (len(missing[one]), one))
    if missing[of]:
        raise DataError(
            f"{folder!r} lacks {len(missing[of])} of {of} parts: {_some(map(str, missing[of]))}. Run `anymal prepare` "
            f"with --part {missing[of][0]} and the options of the other parts."
        )
    return of


def _common_options(folder: str, marks: Mapping[PartOf, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The options of all parts.

    Raises:
        DataError: they differ.
    """
    (first, options), *others = marks.items()
    for part, its in others:
        names = [name for name in {**options, **its} if options.get(name) != its.get(name)]
        if names:
            raise DataError(
                f"Parts {first} and {part} of {folder!r} were made with another {', '.join(names)}: "
                f"{_shown(options, names)} and {_shown(its, names)}. Run one again with the options of the other."
            )
    return options


def _require_rows(
    folder: str, files: Mapping[str, ShardFile], present: Collection[str], lost_media: Collection[str], of: int
) -> None:
    """
    Raises:
        DataError: a shard has no rows, or those of another state of the shard or other options; or samples that are
            needed are not in the index (`lost_media`).
    """
    missing = [number for number, name in enumerate(files) if name not in present]
    if missing:
        parts = dict.fromkeys(str(PartOf.of_item(number, of)) for number in missing)
        raise DataError(
            f"{len(missing)} shard(s) of {folder!r} are new, or have changed since a part read them: "
            f"{_some(list(files)[number] for number in missing)}. Run these parts again: {_some(parts)}."
        )
    if lost_media:
        raise DataError(
            f"{folder!r} no longer has samples with both a .txt and media, so its text-only samples, which were left "
            "out, must now be indexed. Run all parts again with --rebuild."
        )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _shown(options: Mapping[str, Any], names: Collection[str]) -> str:
    text = ", ".join(f"{name} {options.get(name)!r}" for name in names)
    return text if len(text) <= 200 else f"{text[:200]}..."
