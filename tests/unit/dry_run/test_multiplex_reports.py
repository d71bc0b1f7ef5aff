"""What `--dry-run` and `anymal inspect` report about several alignments in one run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from multiplexed import NAMES, make_data, multiplexed_config

from megatron_anymal.cli.inspect import main
from megatron_anymal.config import RunConfig
from megatron_anymal.dry_run.report import render
from megatron_anymal.dry_run.simulate import examine


@pytest.fixture
def config(tokenizer_folder: str, tmp_path: Path) -> RunConfig:
    return multiplexed_config(make_data(tmp_path, tokenizer_folder), tokenizer_folder, tmp_path / "run")


def test_batches_and_epochs_are_those_of_each_alignment(config: RunConfig) -> None:
    report = render(examine(config))
    assert "27 samples per step, 27 per replica (image 16, audio 1, video 8, imu 2)" in report
    for name, steps in zip(NAMES, ("3.0", "48.0", "6.0", "24.0")):
        assert re.search(
            rf"data\.train\.{name}_text +48 samples +one epoch in {steps} steps \(100% of the mix\)", report
        )


def test_packs_are_filled_from_all(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"defaults": ["anymal", "_self_"], **config.to_dict()}))
    assert main(["--config-name=tiny", f"--config-path={tmp_path}"]) == 0
    # 27 samples of about 17.5 tokens in packs of 96.
    assert re.search(r"first 6 steps: .* are real .*, 5 to 5 micro-batches per step", capsys.readouterr().out)
