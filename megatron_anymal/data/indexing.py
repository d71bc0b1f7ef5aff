"""Reading WebDataset shards once, to index them."""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec
import numpy as np

from megatron_anymal.data.samples import may_be_sample, parse_json, parse_text
from megatron_anymal.data.shards import MEDIA, SAMPLE
from megatron_anymal.data.tokenize import Tokenizer
from megatron_anymal.data.types import SAMPLE_KINDS, DataError, MediaPart, Part, Sample
from megatron_anymal.modalities import MODALITIES, kind_for_extension
from megatron_anymal.modalities.base import MediaError


@dataclass(frozen=True)
class Member:
    """A file in a shard."""

    offset: int
    data: bytes


@dataclass
class ShardRows:
    """What one shard adds to the index."""

    name: str
    bytes: int
    samples: list[dict[str, Any]] = field(default_factory=list)
    media: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    # For each sample that was left out: which one, and why.
    bad: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class IndexOptions:
    """How samples are understood."""

    tokenizer: str
    # File ending -> kind, where an ending alone does not tell.
    kinds: Mapping[str, str] = field(default_factory=dict)
    plugins: Sequence[str] = ()

    def kind_of(self, part: MediaPart, extension: str) -> str:
        """The modality kind of a media item.

        Raises:
            MediaError: nothing known reads it.
        """
        # "0.thermal.npy", the first media item of a sample, is looked up as "thermal.npy".
        ending = re.sub(r"^\d+\.", "", part.media.lower())
        kind = part.modality or self.kinds.get(extension) or kind_for_extension(ending, MODALITIES)
        if kind not in MODALITIES:
            raise MediaError(f"its modality {kind!r} is not known; known are {', '.join(sorted(MODALITIES))}")
        return kind


def index_shard(folder: str, name: str, tokenizer: Tokenizer, options: IndexOptions) -> ShardRows:
    """Read one shard and describe its samples.

    Raises:
        DataError: the shard is no plain tar file.
    """
    fs, root = fsspec.core.url_to_fs(folder)
    path = f"{root}/{name}"
    rows = ShardRows(name, int(fs.size(path)))
    with fs.open(path, "rb") as file:
        for key, members in _samples_of(file, name):
            try:
                _add_sample(rows, key, members, tokenizer, options)
            except DataError as error:
                rows.bad.append(str(error))
            except MediaError as error:
                rows.bad.append(f"sample {key!r} of shard {name!r}: {error}")
    return rows


def _samples_of(file: Any, name: str) -> Iterator[tuple[str, dict[str, Member]]]:
    """Group a shard's members by key: everything up to the first dot of the file name."""
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (closed with the file below it)
        key = ""
        members: dict[str, Member] = {}
        for info in tar:
            if not info.isfile():
                continue
            folder, _, base = info.name.rpartition("/")
            stem, _, extension = base.partition(".")
            this_key = f"{folder}/{stem}" if folder else stem
            if this_key != key and members:
                yield key, members
                members = {}
            key = this_key
            extracted = tar.extractfile(info)
            assert extracted is not None
            members[extension.lower()] = Member(info.offset_data, extracted.read())
        if members:
            yield key, members
    except tarfile.TarError as error:
        raise DataError(f"Shard {name!r} is not a readable, uncompressed tar file ({error}).") from None


def _add_sample(
    rows: ShardRows, key: str, members: dict[str, Member], tokenizer: Tokenizer, options: IndexOptions
) -> None:
    where = f"sample {key!r} of shard {rows.name!r}"
    text_member, is_json, sample = _read_sample(members, where, options)
    media_rows: list[dict[str, Any]] = []
    for part in sample.documents[0]:
        if isinstance(part, MediaPart):
            member = members.get(part.media.lower())
            if member is None:
                raise DataError(f"{where}: its text names the media {part.media!r}, which is not in the shard.")
            extension = part.media.lower().rpartition(".")[2]
            kind = options.kind_of(part, extension)
            size = MODALITIES[kind].probe(member.data, extension, part.attributes)
            media_rows.append({"member": member, "kind": kind, "extension": extension, "size": size})
    try:
        counts = [tokenizer.count(parts, closed=sample.closed) for parts in sample.documents]
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    if not all(targets for _, targets in counts):
        raise DataError(f"{where}: no token of it enters the loss. Give a text part `loss`: true.")
    (tokens, targets), (rejected_tokens, rejected_targets) = (*counts, (0, 0))[:2]
    rows.samples.append(
        {
            "text_offset": text_member.offset,
            "text_length": len(text_member.data),
            "text_crc": zlib.crc32(text_member.data),
            "text_is_json": is_json,
            "kind": SAMPLE_KINDS.index(sample.kind),
            "tokens": tokens,
            "targets": targets,
            "rejected_tokens": rejected_tokens,
            "rejected_targets": rejected_targets,
            "media_count": len(media_rows),
        }
    )
    rows.keys.append(key)
    rows.media += [
        {
            "offset": m["member"].offset,
            "length": len(m["member"].data),
            "crc": zlib.crc32(m["member"].data),
            "kind": m["kind"],
            "extension": m["extension"],
            "size": m["size"],
        }
        for m in media_rows
    ]


def _read_sample(members: dict[str, Member], where: str, options: IndexOptions) -> tuple[Member, bool, Sample]:
    """A sample's text member, whether it is JSON, and its documents."""
    document = members.get("json")
    if document is not None and may_be_sample(document.data):
        return document, True, parse_json(document.data, where)
    text = members.get("txt")
    if text is None:
        raise DataError(f"{where}: it has neither a .txt nor a .json with `parts` or `messages`.")
    known = {ending for kind in MODALITIES.values() for ending in kind.extensions} | set(options.kinds)
    media = [name for name in members if name.rpartition(".")[2] in known]
    others = sorted(set(members) - set(media) - {"txt", "json"})
    if others and not media:
        ending = others[0].rpartition(".")[2]
        raise DataError(f"{where}: no modality reads .{others[0]}. If it is media, add --modality {ending}=KIND.")
    parts: list[Part] = [*(MediaPart(name, "") for name in media), parse_text(text.data, where)]
    return text, False, Sample("parts", (parts,))


def assemble(shards: Sequence[ShardRows]) -> tuple[np.ndarray, np.ndarray, bytes, list[str], list[str]]:
    """Put the shards' rows together.

    Returns:
        samples (SAMPLE), media (MEDIA), keys, kinds, extensions.
    """
    kinds = sorted({m["kind"] for shard in shards for m in shard.media})
    extensions = sorted({m["extension"] for shard in shards for m in shard.media})
    samples = np.zeros(sum(len(shard.samples) for shard in shards), SAMPLE)
    media = np.zeros(sum(len(shard.media) for shard in shards), MEDIA)
    keys = bytearray()
    at = media_at = 0
    for number, shard in enumerate(shards):
        for row, key in zip(shard.samples, shard.keys):
            encoded = key.encode()
            for name, value in row.items():
                samples[at][name] = value
            samples[at]["shard"] = number
            samples[at]["media_start"] = media_at
            samples[at]["key_offset"], samples[at]["key_length"] = len(keys), len(encoded)
            keys += encoded
            media_at += row["media_count"]
            at += 1
    for row_number, row in enumerate(m for shard in shards for m in shard.media):
        target = media[row_number]
        target["offset"], target["length"], target["crc"] = row["offset"], row["length"], row["crc"]
        target["kind"], target["extension"] = kinds.index(row["kind"]), extensions.index(row["extension"])
        target["size"] = row["size"]
    return samples, media, bytes(keys), kinds, extensions


def find_shards(folder: str) -> list[str]:
    """The .tar files of a folder, in order.

    Raises:
        DataError: there is no such folder, or no shard in it.
    """
    fs, root = fsspec.core.url_to_fs(folder.rstrip("/"))
    if not fs.isdir(root):
        raise DataError(f"There is no shard folder {folder!r}. Correct the path.")
    found = sorted(path.rpartition("/")[2] for path in fs.ls(root, detail=False) if path.endswith(".tar"))
    if not found:
        raise DataError(f"{folder!r} holds no .tar shard.")
    return found
