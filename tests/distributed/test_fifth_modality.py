"""A fifth modality defined in one file: its data are prepared by the command, and the engine trains it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from engine import train
from ranks import run_ranks
from tiny import SPECIAL, make_config

from megatron_anymal.__main__ import main
from megatron_anymal.config import EncoderConfig, ModalityConfig, ProjectorConfig, RunConfig

PLUGIN = str(Path(__file__).parents[2] / "examples" / "thermal_modality.py")


def thermal_config(data: str, tokenizer: str, run_dir: Path) -> RunConfig:
    config = make_config(data, tokenizer, run_dir)
    config.model.plugins = [PLUGIN]
    config.model.modalities = {
        "thermal": ModalityConfig(
            encoder=EncoderConfig(type="thermal_patches", config={"width": 8}, freeze=False),
            projector=ProjectorConfig(type="linear", num_layers=1, num_tokens=2),
            options={"resolution": 16},
            placeholder=SPECIAL[2],
        )
    }
    config.trainer.max_steps = 3
    return config


def test_thermal_images_are_prepared_and_trained_on(tokenizer_folder: str, tmp_path: Path) -> None:
    lines = []
    for number in range(16):
        name = f"{number}.thermal.npy"
        np.save(tmp_path / name, np.random.default_rng(number).normal(20.0, 5.0, (16, 16)).astype(np.float32))
        lines.append({"key": f"t{number}", "parts": [{"media": name}, {"text": "a walk"}]})
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = str(tmp_path / "shards")

    def prepare() -> int:
        where = ["--manifest", str(tmp_path / "manifest.jsonl"), "--out", folder]
        return main(["prepare", *where, "--tokenizer", tokenizer_folder, "--plugin", PLUGIN, "--workers", "1"])

    assert run_ranks(1, prepare) == [0]
    config = thermal_config(folder, tokenizer_folder, tmp_path / "run")
    result = run_ranks(1, train, config)[0]
    trained = [name for name in result["weights"] if name.startswith(("encoders.thermal.", "projectors.thermal."))]
    assert trained and result["losses"][-1] < result["losses"][0]
