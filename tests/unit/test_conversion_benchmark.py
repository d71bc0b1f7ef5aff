"""Run the import and export benchmark as a user does, on a small Llama."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_it_measures_rates_and_memory(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    sizes = ["--gigabytes", "0.04", "--hidden", "256", "--processes", "2", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, "benchmarks/conversion.py", *sizes, "--folder", str(tmp_path), "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(out.read_text())
    # At least the requested 0.04 GB; the largest tensor is the bf16 embedding of 8 x 256 rows.
    assert 40e6 <= report["bytes"] < 46e6 and report["largest_tensor"] == 2 * 8 * 256 * 256
    before, after = report["copy_seconds"]
    for name in ("import", "export"):
        [one] = report[f"{name}s"]
        assert 0 < one["seconds"] < one["with_start"]
        assert report["ratios"][name] == [(before + after) / 2 / one["seconds"]]
        assert f"relative to the adjacent copies {report['ratios'][name][0]:.2f} (median" in done.stdout
    assert len(report["imports"][0]["peak_memory"]) == 2 and len(report["exports"][0]["peak_memory"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
