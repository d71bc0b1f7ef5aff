"""`anymal encode`: what training then finds, continuing after a kill, several processes, and refusals."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from engine import train
from ranks import run_ranks
from tiny import make_config, make_shards

from megatron_anymal.__main__ import main
from megatron_anymal.config import RunConfig
from megatron_anymal.train import feature_cache

ROOT = Path(__file__).parents[3]


@pytest.fixture
def config(tmp_path: Path, tokenizer_folder: str) -> RunConfig:
    """A run whose configuration is in tmp_path/run.yaml, with a cache in tmp_path/cache."""
    shards = make_shards(tmp_path / "shards", tokenizer_folder, 80, ("image", "audio", "text"))
    config = make_config(shards, tokenizer_folder, tmp_path / "run")
    del config.model.modalities["imu"]
    config.exp_manager.checkpoint.every_n_train_steps = 0
    config.data.feature_cache.gib, config.data.feature_cache.folder = 0.01, str(tmp_path / "cache")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"defaults": ["anymal", "_self_"], **config.to_dict()}))
    return config


def entries(folder: Path) -> int:
    return sum(path.is_file() for path in (folder / "cache" / "blocks").rglob("*"))


def encode(folder: Path, *more: str) -> int:
    return main(["encode", "--config-name=run", f"--config-path={folder}", *more])


def test_training_finds_everything(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert encode(tmp_path) == 0
    out, err = capsys.readouterr()
    assert "54 pieces encoded, 0 already cached, 0 samples" in out and "encoding media: 80 samples" in err
    # Every image and sound is one piece; each modality also has a piece that is compared at a start.
    assert entries(tmp_path) == 54 + 2
    assert encode(tmp_path) == 0
    assert "0 pieces encoded, 54 already cached" in capsys.readouterr().out
    [warm] = run_ranks(1, train, config)
    assert entries(tmp_path) == 54 + 2
    off = copy.deepcopy(config)
    off.data.feature_cache.gib, off.exp_manager.explicit_log_dir = 0.0, str(tmp_path / "off")
    off.data.feature_cache.folder = ""
    assert run_ranks(1, train, off)[0]["losses"] == warm["losses"]


def test_several_processes(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert encode(tmp_path, "--processes=2") == 0
    assert "54 pieces encoded, 0 already cached" in capsys.readouterr().out
    assert entries(tmp_path) == 54 + 2


def test_continues_after_a_kill(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "megatron_anymal", "encode", "--config-name=run", f"--config-path={tmp_path}"]
    slow = f"""
import runpy, sys, time
from megatron_anymal.data.feature_cache import FeatureCache
add = FeatureCache.add
FeatureCache.add = lambda *arguments: (time.sleep(0.2), add(*arguments))
sys.argv = {command[3:]!r}
sys.argv[0] = "anymal"
sys.argv.insert(1, "encode")
runpy.run_module("megatron_anymal", run_name="__main__")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", slow], env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / "cache").exists() or entries(tmp_path) < 8:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait(240)
    stored = entries(tmp_path) - 2
    assert 0 < stored < 54
    assert encode(tmp_path) == 0
    assert f"{54 - stored} pieces encoded, {stored} already cached" in capsys.readouterr().out


def test_samples_that_cannot_be_read_are_named(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = next((tmp_path / "shards").glob("*.tar"))
    content = bytearray(shard.read_bytes())
    at = content.index(b"IDAT") + 10
    content[at] ^= 1
    shard.write_bytes(content)
    assert encode(tmp_path) == 0
    out, err = capsys.readouterr()
    assert "53 pieces encoded" in out and "1 samples cannot be read" in out and "warning: image-" in err


def test_refusals(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*more: str) -> str:
        assert encode(tmp_path, *more) == 2
        return capsys.readouterr().err

    assert "data.feature_cache.gib is 0" in said("data.feature_cache.gib=0", "data.feature_cache.folder=''")
    assert "--processes=0" in said("--processes=0")
    assert "fewer than 64 pieces of 'image'" in said(
        "data.feature_cache.gib=0.00001", "data.feature_cache.modalities=[image]"
    )
    assert "its encoder is trained" in said("model.modalities.image.encoder.freeze=false")
    assert "names 'thermal'" in said("data.feature_cache.modalities=[thermal]")
    (tmp_path / "file").write_text("")
    assert "data.feature_cache.folder" in said(f"data.feature_cache.folder={tmp_path}/file/x")


def test_a_limit_below_the_features_is_announced(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = "data.feature_cache.modalities=[image]"
    # An image's features take 4 x 16 floats and a checksum; there are 27 images.
    entry = 4 * 16 * 4 + 4
    assert encode(tmp_path, f"data.feature_cache.gib={64.5 * entry / 2**30}", images) == 0
    assert "take up to" not in capsys.readouterr().err
    monkeypatch.setattr(feature_cache, "_FEWEST_ENTRIES", 1)
    assert encode(tmp_path, f"data.feature_cache.gib={26.5 * entry / 2**30}", images) == 0
    assert "warning: the features take up to" in capsys.readouterr().err
