"""The model card of a run with several alignments shows the settings of each."""

from __future__ import annotations

from pathlib import Path

from multiplexed import NAMES, multiplexed_config

from checkpoint_tools.exporting.card import _configuration


def test_settings_are_those_of_each_alignment() -> None:
    config = multiplexed_config({name: name for name in NAMES}, "tokenizer", Path("run"))
    config.model.multiplex["audio"].max_steps = 5
    rows = _configuration(config.to_dict()).splitlines()
    assert "| `model.multiplex.image.global_batch_size` | `16` |" in rows
    assert "| `model.multiplex.audio.max_steps` | `5` |" in rows
    assert "| `model.multiplex.imu.optim.lr` | `0.004` |" in rows
    assert not [row for row in rows if row.startswith(("| `model.global_batch_size`", "| `model.optim"))]
    config.model.multiplex = {}
    rows = _configuration(config.to_dict()).splitlines()
    assert "| `model.global_batch_size` | `128` |" in rows and "multiplex" not in "".join(rows)
