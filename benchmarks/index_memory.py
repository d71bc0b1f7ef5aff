"""Time and peak memory of filling and writing an index of made-up samples, one process per size.

    python benchmarks/index_memory.py 1000000

Each sample has an image and a text. Nothing is read, so the time is that of the rows alone. Prints one JSON object: CPU
microseconds per sample for filling rows and for the rest (storing, checking and writing them), the bytes of the index
files, and the peak memory of the process in bytes. Compare two sizes to see what a sample costs: `indexing.py` does.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from megatron_anymal.data import index_folder, index_processes
from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.shard_rows import RowBuffer, ShardRows
from megatron_anymal.data.tokenizer import Tokenizer as TextTokenizer
from megatron_anymal.processes.process_memory import peak_resident_bytes

# Samples per shard.
SHARD = 10_000


class MadeUp:
    """Replaces the reading of shards, and times the filling of their rows."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, folder: str, name: str, *settings: Any) -> ShardRows:
        """Rows of a shard."""
        keys = [f"{name[:5]}{number:05d}" for number in range(SHARD)]
        begun = time.process_time()
        buffer = RowBuffer()
        for number, key in enumerate(keys):
            at = 10_240 * number
            media = [(at + 512, 7000, 7, 0, 0, 64.0, 64.0)]
            buffer.add(key, at, (at + 8192, 20, 9, False, 0, 12, 11, 0, 0), media, 2, (".json",))
        assert not buffer.recurring(())
        rows = ShardRows(name, 10_240 * SHARD, kinds=["image"], extensions=["jpg"])
        buffer.move_to(rows, ())
        self.seconds += time.process_time() - begun
        return rows


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of two tokens."""
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def measure(count: int) -> dict[str, float]:
    """Index `count` made-up samples in this process."""
    made_up = MadeUp()
    index_processes.index_shard = made_up
    with tempfile.TemporaryDirectory() as temporary:
        folder, tokenizer = Path(temporary) / "shards", Path(temporary) / "tokenizer"
        folder.mkdir()
        for shard in range(max(1, count // SHARD)):
            (folder / f"{shard:05d}.tar").touch()
        write_tokenizer(tokenizer)
        # Imports the rest of transformers.
        TextTokenizer(str(tokenizer))
        begun = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            index_folder.make_index(str(folder), IndexOptions(str(tokenizer)))
        rest = time.process_time() - begun - made_up.seconds
        header = json.loads((folder / "index" / "index.json").read_text())
        size = sum(path.stat().st_size for path in (folder / "index").iterdir())
    samples = header["samples"]
    return {
        "samples": samples,
        "fill_microseconds": made_up.seconds / samples * 1e6,
        "rest_microseconds": rest / samples * 1e6,
        "index_bytes": size,
        "peak_bytes": peak_resident_bytes(),
    }


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
