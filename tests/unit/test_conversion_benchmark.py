"""The benchmark of the import runs as a user runs it, here on a small Llama."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_measures_rates_and_memory(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    sizes = ["--gigabytes", "0.04", "--hidden", "256", "--processes", "2"]
    done = subprocess.run(
        [sys.executable, "benchmarks/conversion.py", *sizes, "--folder", str(tmp_path), "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(out.read_text())
    # 12 weights of a layer and those around them, in bf16.
    assert 40e6 <= found["bytes"] < 46e6 and found["largest_tensor"] == 2 * 8 * 256 * 256
    seconds = [found["bytes"] / 1e6 / rate for rate in (*found["copy_rates"], found["import_rate"])]
    assert found["ratio"] * seconds[2] * 2 - seconds[0] - seconds[1] < 1e-6 and min(seconds) > 0
    assert len(found["peak_memory"]) == 2
    assert f"{found['ratio']:.2f} of the copy (bar 0.7)" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
