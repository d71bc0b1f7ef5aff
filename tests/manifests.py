"""Write small shards from manifest lines given in a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.index_folder import make_index
from megatron_anymal.data.manifest import write_shards


def shards_of(folder: Path, tokenizer: str, lines: list[dict[str, Any]], files: dict[str, bytes]) -> str:
    """Write indexed shards from the lines of a manifest and the media files they name; return the folder."""
    source = folder.with_name(folder.name + "_source")
    source.mkdir(parents=True)
    for name, data in files.items():
        (source / name).write_bytes(data)
    (source / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_shards(str(source / "manifest.jsonl"), str(folder))
    make_index(str(folder), IndexOptions(tokenizer))
    return str(folder)
