"""Run in a separate process: index a folder, then print the peak memory growth in MiB."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.index_folder import make_index
from megatron_anymal.data.tokenizer import Tokenizer


def memory(name: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    small, large, tokenizer = sys.argv[1:]
    # Baseline: libraries and tokenizer are loaded.
    Tokenizer(tokenizer)
    make_index(small, IndexOptions(tokenizer))
    before = memory("VmRSS")
    # Reset the peak.
    Path("/proc/self/clear_refs").write_text("5")
    make_index(large, IndexOptions(tokenizer))
    print((memory("VmHWM") - before) >> 20)
