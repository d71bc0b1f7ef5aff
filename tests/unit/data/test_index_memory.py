"""Indexing the worst sample within the default limits takes at most 512 MB of memory per process."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from tars import write_tar
from tiny import png
from tokenizer_folders import make

from megatron_anymal.config import LimitsConfig


@pytest.mark.slow
def test_the_largest_members(tmp_path: Path) -> None:
    limits = LimitsConfig()
    tokenizer = make("llama 3", tmp_path / "tokenizer")
    sound = limits.max_member_bytes - 44
    header = struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + sound, b"WAVE", b"fmt ", 16, 1, 2, 48000, 192000, 4, 16, b"data", sound
    )
    text = bytes(random.Random(0).choices(b"abcdefghij klmnop", k=limits.max_text_bytes))
    write_tar(tmp_path / "large" / "0.tar", [("a.wav", header + bytes(sound)), ("a.txt", text)])
    write_tar(tmp_path / "small" / "0.tar", [("b.png", png(1)), ("b.txt", b"one")])
    words = [
        sys.executable,
        str(Path(__file__).with_name("index_peak.py")),
        str(tmp_path / "small"),
        str(tmp_path / "large"),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*words, str(tokenizer)], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    peak = int(done.stdout.split()[-1])
    # The largest member is read whole: a lower peak would mean that nothing was measured.
    assert 200 < peak <= 512, done.stdout
