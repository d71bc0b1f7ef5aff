"""Measure the memory needed to load files; run by test_media_memory.py in a separate process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from media import CLIP_SHAPE, SMALL_AUDIO, section

from megatron_anymal.config import LimitsConfig
from megatron_anymal.modalities import build_modality

SECTIONS = {
    "image": section("clip", {**CLIP_SHAPE, "image_size": 224}),
    "video": section("clip", {**CLIP_SHAPE, "image_size": 224}),
    "audio": section("identity", **SMALL_AUDIO),
    "imu": section("imu2clip"),
}


def status(field: str) -> int:
    """A field of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) // 1024


def peak(kind: str, path: Path, attributes: dict[str, object]) -> int:
    """Peak memory in MiB that loading a file adds to a process, not counting the file itself."""
    modality = build_modality(kind, SECTIONS[kind], LimitsConfig())
    small = path.with_name(f"small{path.suffix}")
    # The first file of a kind loads the libraries, whatever its size.
    modality.load(small.read_bytes(), path.suffix[1:], attributes)
    reading, writing = os.pipe()
    # A child's peak is counted from its own start.
    child = os.fork()
    if child == 0:
        # A forked process maps the libraries' code anew when it runs it: up to 28 MiB, depending on the page cache.
        modality.load(small.read_bytes(), path.suffix[1:], attributes)
        data = path.read_bytes()
        before = status("VmRSS")
        pieces = modality.load(data, path.suffix[1:], attributes)
        os.write(writing, json.dumps([len(pieces), status("VmHWM") - before]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    pieces, taken = json.loads(os.read(reading, 100) or b"[0, -1]")
    assert pieces > 0, f"{path} was not loaded"
    return int(taken)


if __name__ == "__main__":
    attributes = json.loads(sys.argv[3])
    print(peak(sys.argv[1], Path(sys.argv[2]), attributes))
