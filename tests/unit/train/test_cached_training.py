"""Training with cached features: the same numbers as without, whatever is in the cache, and whatever happens to it."""

from __future__ import annotations

import copy
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import train
from ranks import run_ranks
from tiny import make_config, make_conversations, make_shards

from megatron_anymal.config import ConfigError, RunConfig


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> str:
    return make_shards(tmp_path_factory.mktemp("features") / "shards", tokenizer_folder, 16, ("image", "audio", "text"))


@pytest.fixture
def config(shards: str, tokenizer_folder: str, tmp_path: Path) -> RunConfig:
    """Three epochs of sixteen samples."""
    config = make_config(shards, tokenizer_folder, tmp_path / "run")
    del config.model.modalities["imu"]
    config.exp_manager.checkpoint.every_n_train_steps = 0
    return config


def with_cache(config: RunConfig, folder: Path, run: Path, gib: float = 0.01) -> RunConfig:
    config = copy.deepcopy(config)
    config.data.feature_cache.gib, config.data.feature_cache.folder = gib, str(folder)
    config.exp_manager.explicit_log_dir = str(run)
    return config


def counting(config: RunConfig) -> dict[str, Any]:
    """In a rank: train, and count the pieces that were decoded and those that were encoded."""
    from megatron_anymal.modalities.image import ImageModality
    from megatron_anymal.model.encoders.vision import CLIPEncoder

    counts = {"decoded": 0, "encoded": 0}
    decode, forward = ImageModality.decode_with_size, CLIPEncoder.forward

    def decoding(*arguments: Any) -> Any:
        counts["decoded"] += 1
        return decode(*arguments)

    def encoding(self: Any, pieces: Any) -> Any:
        counts["encoded"] += len(pieces)
        return forward(self, pieces)

    ImageModality.decode_with_size, CLIPEncoder.forward = decoding, encoding  # type: ignore
    return {**train(config), **counts}


def shares(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["cached_features_share"] for row in rows if "cached_features_share" in row]


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Losses and weights, hence gradients, are the same to the bit."""
    assert one["losses"] == other["losses"] and len(one["losses"]) == 6
    assert one["weights"].keys() == other["weights"].keys()
    for name, weight in one["weights"].items():
        np.testing.assert_array_equal(weight, other["weights"][name], err_msg=name)


@pytest.mark.parametrize("precision", ["32", "bf16"])
@pytest.mark.parametrize("pieces_per_call", [1, 64])
def test_off_cold_and_warm_are_the_same(
    config: RunConfig, precision: str, pieces_per_call: int, tmp_path: Path
) -> None:
    config.trainer.precision = precision
    config.model.modalities["image"].encoder.max_pieces_per_call = pieces_per_call
    [off] = run_ranks(1, counting, config)
    [cold] = run_ranks(1, counting, with_cache(config, tmp_path / "cache", tmp_path / "cold"))
    [warm] = run_ranks(1, counting, with_cache(config, tmp_path / "cache", tmp_path / "warm"))
    same(off, cold)
    same(off, warm)
    # One further piece compares the encoder with the cache.
    assert warm["decoded"] == 0 and warm["encoded"] == 1
    assert 0 < cold["decoded"] < off["decoded"] and 1 < cold["encoded"] < off["encoded"]
    assert shares(tmp_path / "warm") == [1.0] * 6 and shares(tmp_path / "cold")[0] < 1


def test_ranks_share_a_cache_and_their_work(config: RunConfig, tmp_path: Path) -> None:
    """Two replicas, then two tensor-parallel ranks that read what the replicas stored, in loader processes."""
    [alone] = run_ranks(1, train, config)
    config.trainer.devices, config.data.num_workers = 2, 1
    replicas = run_ranks(2, counting, with_cache(config, tmp_path / "cache", tmp_path / "replicas"))
    np.testing.assert_allclose(replicas[0]["losses"], alone["losses"], rtol=1e-5)
    off = copy.deepcopy(config)
    off.model.tensor_model_parallel_size = 2
    off.exp_manager.explicit_log_dir = str(tmp_path / "off")
    without = run_ranks(2, train, off)
    tensor = run_ranks(2, counting, with_cache(off, tmp_path / "cache", tmp_path / "tensor"))
    same(without[0], tensor[0])
    assert [rank["encoded"] for rank in tensor] == [1, 1]


def test_a_resumed_run_continues_to_the_bit(config: RunConfig, tmp_path: Path) -> None:
    config.exp_manager.checkpoint.every_n_train_steps = 2
    [whole] = run_ranks(1, train, with_cache(config, tmp_path / "cache", tmp_path / "whole"))
    first = with_cache(config, tmp_path / "second", tmp_path / "resumed")
    first.exp_manager.checkpoint.keep_last = 0
    run_ranks(1, train, first)
    for step in (4, 6):
        [folder] = (tmp_path / "resumed" / "checkpoints").glob(f"step_*{step}")
        shutil.rmtree(folder)
    # The resumed run finds other features in its cache than the whole run did at that step: all, or none.
    [warm] = run_ranks(1, train, first)
    same(whole, warm)


def spoil(folder: Path, position: int) -> int:
    """Flip a bit of every entry; returns their number."""
    files = [path for path in (folder / "blocks").rglob("*") if path.is_file()]
    for file in files:
        content = bytearray(file.read_bytes())
        content[position] ^= 1
        file.write_bytes(content)
    return len(files)


def test_damaged_features_are_made_again(config: RunConfig, tmp_path: Path) -> None:
    [off] = run_ranks(1, train, config)
    run_ranks(1, train, with_cache(config, tmp_path / "cache", tmp_path / "cold"))
    assert spoil(tmp_path / "cache", 20) > 4
    [again] = run_ranks(1, counting, with_cache(config, tmp_path / "cache", tmp_path / "again"))
    same(off, again)
    assert again["encoded"] > 4
    [warm] = run_ranks(1, counting, with_cache(config, tmp_path / "cache", tmp_path / "warm"))
    assert warm["encoded"] == 1


def planted(config: RunConfig) -> dict[str, Any]:
    """In a rank: train with the bug that weights are not part of an encoder's identity."""
    from megatron_anymal.model import encoder_identity

    encoder_identity.weights_hash = lambda module: "the same"
    return train(config)


def refused(config: RunConfig) -> str:
    with pytest.raises(ConfigError) as error:
        planted(config)
    return str(error.value)


def test_stale_features_are_never_used(config: RunConfig, tmp_path: Path) -> None:
    """Another encoder has other entries; if a bug gave both the same keys, the start would refuse."""
    other = copy.deepcopy(config)
    # Random encoders depend on the seed.
    other.model.seed += 1
    other.exp_manager.explicit_log_dir = str(tmp_path / "off")
    [off] = run_ranks(1, train, other)
    run_ranks(1, train, with_cache(config, tmp_path / "cache", tmp_path / "first"))
    [second] = run_ranks(1, train, with_cache(other, tmp_path / "cache", tmp_path / "second"))
    same(off, second)
    run_ranks(1, planted, with_cache(config, tmp_path / "stale", tmp_path / "third"))
    [message] = run_ranks(1, refused, with_cache(other, tmp_path / "stale", tmp_path / "fourth"))
    assert "features of another encoder of 'image'" in message and "Delete the folder" in message


def complaints(config: RunConfig, full: bool) -> tuple[dict[str, Any], str]:
    """In a rank: train, on a full disk if asked for; returns also standard error."""
    import contextlib
    import io

    from megatron_anymal.object_storage import block_cache

    def no_space(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    if full:
        block_cache.os.replace = no_space
    with contextlib.redirect_stderr(io.StringIO()) as out:
        return counting(config), out.getvalue()


def test_a_full_disk_and_an_unusable_folder_are_warnings(config: RunConfig, tmp_path: Path) -> None:
    [off] = run_ranks(1, counting, config)
    [(trained, stderr)] = run_ranks(1, complaints, with_cache(config, tmp_path / "cache", tmp_path / "full"), True)
    same(off, trained)
    assert stderr.count("warning") == stderr.count("features cannot be stored") == 1 and "No space left" in stderr
    (tmp_path / "file").write_text("")
    [(trained, stderr)] = run_ranks(
        1, complaints, with_cache(config, tmp_path / "file" / "x", tmp_path / "none"), False
    )
    same(off, trained)
    assert stderr.count("warning") == 1 and "data.feature_cache.folder" in stderr
    assert trained["encoded"] == off["encoded"]


def test_bad_samples_are_not_stored(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.data.max_bad_share = 1.0
    [off] = run_ranks(1, spoiled, config)
    cached = with_cache(config, tmp_path / "cache", tmp_path / "bad")
    [with_bad] = run_ranks(1, spoiled, cached)
    same(off, with_bad)
    healthy = with_cache(config, tmp_path / "cache", tmp_path / "good")
    config.exp_manager.explicit_log_dir = str(tmp_path / "off")
    [expected] = run_ranks(1, train, config)
    [good] = run_ranks(1, train, healthy)
    same(expected, good)


def spoiled(config: RunConfig) -> dict[str, Any]:
    """In a rank: train while every image seems damaged."""
    from megatron_anymal.modalities.base import MediaError
    from megatron_anymal.modalities.image import ImageModality

    def failing(*arguments: Any) -> Any:
        raise MediaError("is damaged")

    ImageModality.decode_with_size = failing  # type: ignore[method-assign]
    return train(config)


def depends_on_calls(config: RunConfig) -> dict[str, Any]:
    """In a rank: train with an encoder whose features of a piece depend on the number of pieces in its call."""
    from megatron_anymal.model.encoders.vision import CLIPEncoder

    forward = CLIPEncoder.forward
    CLIPEncoder.forward = lambda self, pieces: forward(self, pieces) * (1 + 1e-3 * len(pieces))  # type: ignore
    return train(config)


@pytest.mark.parametrize("pieces_per_call", [1, 64])
def test_one_piece_per_call_is_the_same_with_every_encoder(
    config: RunConfig, pieces_per_call: int, tmp_path: Path
) -> None:
    config.model.modalities["image"].encoder.max_pieces_per_call = pieces_per_call
    [off] = run_ranks(1, depends_on_calls, config)
    run_ranks(1, depends_on_calls, with_cache(config, tmp_path / "cache", tmp_path / "cold"))
    [warm] = run_ranks(1, depends_on_calls, with_cache(config, tmp_path / "cache", tmp_path / "warm"))
    if pieces_per_call == 1:
        same(off, warm)
    else:
        assert off["losses"] != warm["losses"]


def test_preference_training_takes_features(config: RunConfig, tokenizer_folder: str, tmp_path: Path) -> None:
    """DPO continues an SFT run, both answers of a pair share their media, and the encoder never runs."""
    kinds = ("image", "audio")
    config.data.train["mix"].path = make_conversations(tmp_path / "turns", tokenizer_folder, 16, kinds)
    config.job, config.model.lora.r, config.trainer.max_steps = "sft", 4, 2
    config.exp_manager.checkpoint.every_n_train_steps = 2
    run_ranks(1, train, with_cache(config, tmp_path / "cache", tmp_path / "sft"))
    config.data.train["mix"].path = make_conversations(tmp_path / "pairs", tokenizer_folder, 16, kinds, pairs=True)
    config.job, config.trainer.max_steps = "dpo", 6
    config.model.restore_from_path = str(tmp_path / "sft")
    for modality in config.model.modalities.values():
        modality.projector.freeze = True
    config.data.seq_length = 128
    [off] = run_ranks(1, train, config)
    [warm] = run_ranks(1, counting, with_cache(config, tmp_path / "cache", tmp_path / "dpo"))
    same(off, warm)
    # All of them were seen in two steps of eight samples.
    assert warm["decoded"] == 0 and warm["encoded"] == 1


def slowly(config: RunConfig) -> dict[str, Any]:
    """In a rank: train with a disk that falls behind."""
    from megatron_anymal.data.feature_cache import FeatureCache

    add = FeatureCache.add

    def adding(*arguments: Any) -> None:
        time.sleep(0.4)
        add(*arguments)

    FeatureCache.add = adding  # type: ignore[method-assign]
    return train(config)


def test_a_run_ends_when_everything_is_stored(config: RunConfig, tmp_path: Path) -> None:
    # One epoch, so that the last features are new.
    config.trainer.max_steps = 2
    run_ranks(1, slowly, with_cache(config, tmp_path / "cache", tmp_path / "cold"))
    [warm] = run_ranks(1, counting, with_cache(config, tmp_path / "cache", tmp_path / "warm"))
    assert warm["encoded"] == 1
