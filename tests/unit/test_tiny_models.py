"""examples/tiny_models.py replaces no model without being asked; test_your_own_data.py uses what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.tiny_models import CLIP, main


def test_models_that_exist_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.jsonl").write_text('{"text": "one two", "media": "a.png"}\n')
    real = tmp_path / "out" / CLIP / "model.safetensors"
    real.parent.mkdir(parents=True)
    real.write_bytes(b"a published model")
    arguments = ["--manifest", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "--overwrite" in capsys.readouterr().err and real.read_bytes() == b"a published model"
    assert not (tmp_path / "out" / "Llama-3.2-1B").exists()
    assert main([*arguments, "--overwrite"]) == 0 and real.read_bytes() != b"a published model"


def test_a_missing_manifest_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--manifest", str(tmp_path / "no.jsonl"), "--out", str(tmp_path)])
    assert f"there is no manifest '{tmp_path / 'no.jsonl'}'" in capsys.readouterr().err
