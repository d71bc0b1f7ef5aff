"""Format of an index: its files, tables and header.

An index is a folder next to the shards:

    index.json      version, shards with their sizes, kinds of media, file extensions, tokenizer fingerprint, counts,
                    the options that it was built with, and a hash of all rows and keys below
    shards.jsonl    what each shard adds, and when it was modified (data/indexed_shards.py)
    left_out.jsonl  every sample and member that is not in the index (data/left_out.py)
    samples.npy     one row per sample (SAMPLE)
    media.npy       one row per media item (MEDIA), in the order of the samples and of their parts
    bounds.npy      one row per block of samples: the longest that one of them can be (data/length_bounds.py)
    keys.bin        concatenated sample keys, UTF-8
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

VERSION = 3
# Version 1 has no conversations: its samples lack the columns kind, rejected_tokens and rejected_targets. Version 2 has
# no attributes; an index without attributes is still written as version 2, because it is identical.
READABLE = (1, 2, VERSION)
SHARDS, SAMPLES, MEDIA_ITEMS, BOUNDS, KEYS = "shards.jsonl", "samples.npy", "media.npy", "bounds.npy", "keys.bin"

SAMPLE = np.dtype(
    [
        ("shard", "<u4"),
        # The .txt or .json member: bytes [offset, offset + length) of the shard.
        ("text_offset", "<u8"),
        ("text_length", "<u4"),
        ("text_crc", "<u4"),
        ("text_is_json", "u1"),
        # Position in SAMPLE_KINDS.
        ("kind", "u1"),
        # Tokens without media, and target tokens; for a preference pair, those of the chosen document.
        ("tokens", "<u4"),
        ("targets", "<u4"),
        # The same for the rejected document of a preference pair; 0 for other samples.
        ("rejected_tokens", "<u4"),
        ("rejected_targets", "<u4"),
        ("media_start", "<u8"),
        ("media_count", "<u2"),
        ("key_offset", "<u8"),
        ("key_length", "<u2"),
    ]
)
MEDIA = np.dtype(
    [
        ("offset", "<u8"),
        ("length", "<u8"),
        ("crc", "<u4"),
        ("kind", "u1"),
        ("extension", "u1"),
        # The result of the modality's `probe`: (width, height) or (duration, rate).
        ("size", "<f8", (2,)),
    ]
)


@dataclass(frozen=True)
class IndexHeader:
    """The metadata in index.json."""

    # File names of the shards.
    shards: tuple[str, ...]
    # Size of each shard in bytes.
    shard_bytes: tuple[int, ...]
    # Kinds of media; the media table holds positions in this list.
    kinds: tuple[str, ...]
    # File extensions of media; the media table holds positions in this list.
    extensions: tuple[str, ...]
    # Fingerprint of the tokenizer that counted the tokens.
    tokenizer: str
    # Version of the format as read; 0 for a new index.
    version: int = 0
    # Kind -> default attributes of its media; attributes of a media item take precedence.
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_json(self, samples: int, media: int) -> str:
        """The identity of an index as JSON: everything that determines its samples and how they are read."""
        return json.dumps(self._body(samples, media), indent=1)

    def with_accounting(self, samples: int, media: int, accounting: Mapping[str, Any]) -> str:
        """The content of index.json: `to_json` plus the counts of everything that is not in the index."""
        return json.dumps({**self._body(samples, media), **accounting}, indent=1)

    def _body(self, samples: int, media: int) -> dict[str, Any]:
        shards = [{"name": n, "bytes": b} for n, b in zip(self.shards, self.shard_bytes)]
        attributes = {kind: dict(values) for kind, values in self.attributes.items() if values}
        return {
            "version": self.version or (VERSION if attributes else 2),
            "samples": samples,
            "media": media,
            "kinds": list(self.kinds),
            "extensions": list(self.extensions),
            "tokenizer": self.tokenizer,
            "shards": shards,
            **({"attributes": attributes} if attributes else {}),
        }
