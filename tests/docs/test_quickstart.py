"""`make quickstart`, whole: what the README promises of it. Minutes long, so left to `make test-all`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Held-out exact-answer accuracy that must be reached.
LEAST = {"image": 0.90, "audio": 0.90, "imu": 0.95, "video": 0.75}


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_make_quickstart_reaches_its_bars(tmp_path: Path) -> None:
    if not (Path(sys.prefix) / ".installed").is_file():
        pytest.skip("this Python was not installed by `make`: run `make test-all`")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    # -o: do not install the clone into the environment of the checkout.
    command = ["make", "quickstart", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.installed"]
    subprocess.run(command, cwd=clone, check=True, timeout=2300)
    report = json.loads((clone / "runs" / "quickstart" / "report.json").read_text())
    for name, least in LEAST.items():
        row = report["modalities"][name]
        assert row["accuracy"] >= least, name
        assert row["permuted"] <= row["chance"] + 0.10, name
        assert row["before"] <= row["chance"] + 0.10, name
    sft, dpo = report["sft"], report["dpo"]
    assert sft["followed_before"] < 0.20 and sft["followed_after"] >= 0.90
    assert dpo["preference_accuracy"] >= 0.90
    assert dpo["accuracy_before"] == sft["accuracy_after"]
    assert dpo["accuracy_after"] >= dpo["accuracy_before"] - 0.02
    hashes = report["language_model_hash"]
    assert hashes["before"] == hashes["after"]
    any_to_any = report["any_to_any"]
    assert any_to_any["drawn_as_asked"] >= 0.90 and any_to_any["grammatical"] == 1.0
    assert any_to_any["understood"] >= report["modalities"]["image"]["accuracy"] - 0.02
    page = (clone / "runs" / "quickstart" / "report.html").read_text()
    assert "<video" in page and "<audio" in page and "http" not in page
