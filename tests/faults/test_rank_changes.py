"""Changes since the checkpoint that affect the learning are refused key by key, unless explicitly allowed."""

from __future__ import annotations

import copy
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine import train
from ranks import run_ranks
from tiny import make_config

from megatron_anymal.checkpoint.compatibility import check_changes
from megatron_anymal.checkpoint.store import Manifest
from megatron_anymal.config import ConfigError, DatasetConfig, RunConfig
from megatron_anymal.config.validation import check
from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.index_folder import make_index


@pytest.fixture
def config(mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> RunConfig:
    config = make_config(mixed_shards, tokenizer_folder, tmp_path / "run")
    config.model.optim.sched.name = "constant"
    return config


def manifest(config: RunConfig, **more: Any) -> Manifest:
    values: dict[str, Any] = {
        "step": 3,
        "consumed_samples": 24,
        "config": json.loads(json.dumps(config.to_dict())),
        "llama": {"rope_theta": 1e4, "transformers_version": "5"},
        "base_hash": "aaaa",
        "data_fingerprint": "dddd",
        "files": {},
        "tokenizer": "tttt",
        "data_content": "cccc",
        **more,
    }
    return Manifest(**values)


def differences(config: RunConfig, change: Callable[[RunConfig], None], *allowed: str, **more: Any) -> list[str]:
    """Return the messages for a change of the configuration or the manifest."""
    other, messages = copy.deepcopy(config), []
    change(other)
    check_changes(manifest(config), manifest(other, **more), allowed, messages.append)
    return messages


def nothing(config: RunConfig) -> None: ...


def set_to(key: str, value: Any) -> Callable[[RunConfig], None]:
    def change(config: RunConfig) -> None:
        *path, last = key.split(".")
        node: Any = config
        for part in path:
            node = node[part] if isinstance(node, dict) else getattr(node, part)
        setattr(node, last, value)

    return change


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("model.optim.lr", 0.5, "model.optim.lr 0.01 -> 0.5"),
        ("model.optim.betas", [0.9, 0.99], "model.optim.betas [0.9, 0.95] -> [0.9, 0.99]"),
        ("model.optim.sched.warmup_steps", 7, "model.optim.sched.warmup_steps 0 -> 7"),
        ("model.optim.sched.name", "linear", "model.optim.sched.name 'constant' -> 'linear'"),
        ("model.seed", 5, "model.seed 1234 -> 5"),
        ("model.global_batch_size", 16, "model.global_batch_size 8 -> 16"),
        ("model.lora.alpha", 8.0, "model.lora.alpha 32.0 -> 8.0"),
        ("model.neftune.alpha", 5.0, "model.neftune.alpha 0.0 -> 5.0"),
        ("model.loss_normalization", "sample", "model.loss_normalization 'token' -> 'sample'"),
        ("model.modalities.image.projector.freeze", True, "model.modalities.image.projector.freeze False -> True"),
        ("trainer.gradient_clip_val", 2.0, "trainer.gradient_clip_val 1.0 -> 2.0"),
        ("trainer.precision", "bf16", "trainer.precision '32' -> 'bf16'"),
    ],
)
def test_what_changes_the_learning_is_refused(config: RunConfig, key: str, value: Any, shown: str) -> None:
    with pytest.raises(ConfigError) as error:
        differences(config, set_to(key, value))
    assert shown in str(error.value) and "resilience.allow_changes=[config]" in str(error.value)
    [message] = differences(config, set_to(key, value), "config")
    assert shown in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer.devices", 4),
        ("trainer.max_steps", 99),
        ("trainer.log_every_n_steps", 7),
        ("model.tensor_model_parallel_size", 2),
        ("model.virtual_pipeline_model_parallel_size", 2),
        ("model.micro_batch_size", 2),
        ("model.ddp.use_distributed_optimizer", False),
        ("model.recompute_granularity", "full"),
        ("data.num_workers", 3),
        ("data.seq_length", 128),
        ("exp_manager.checkpoint.keep_last", 1),
        ("resilience.hang_timeout", 5.0),
    ],
)
def test_layout_is_only_told(config: RunConfig, key: str, value: Any) -> None:
    [message] = differences(config, set_to(key, value))
    assert f"{key} " in message and f"-> {value!r}" in message and "without effect" in message


def test_nothing_changed_is_not_mentioned(config: RunConfig) -> None:
    assert differences(config, nothing) == []


def test_a_longer_run_has_another_schedule(config: RunConfig) -> None:
    config.model.optim.sched.name = "cosine"
    with pytest.raises(ConfigError, match=r"at step 9 instead of 6 .* set model\.optim\.sched\.decay_steps=6 to"):
        differences(config, set_to("trainer.max_steps", 9))
    # It is not also called harmless.
    [message] = differences(config, set_to("trainer.max_steps", 9), "config")
    assert message.startswith("warning: ") and "step 9 instead of 6" in message
    # With an explicit decay_steps, the schedule's end does not move.
    config.model.optim.sched.decay_steps = 6
    assert "trainer.max_steps 6 -> 9" in differences(config, set_to("trainer.max_steps", 9))[0]


def test_samples_that_would_be_left_out(config: RunConfig) -> None:
    config.data.too_long = "drop"
    with pytest.raises(ConfigError, match=r"data\.seq_length 64 -> 32"):
        differences(config, set_to("data.seq_length", 32))


def test_another_modality(config: RunConfig) -> None:
    def remove(other: RunConfig) -> None:
        del other.model.modalities["imu"]

    with pytest.raises(ConfigError, match=r"model\.modalities\.imu\.placeholder .* -> 'none'"):
        differences(config, remove)


@pytest.mark.parametrize(
    ("kind", "more", "shown"),
    [
        ("tokenizer", {"tokenizer": "uuuu"}, "data.tokenizer (its content) tttt -> uuuu"),
        ("base", {"base_hash": "bbbb"}, "the Llama's weights aaaa -> bbbb"),
        ("base", {"llama": {"rope_theta": 5e5}}, "the Llama's rope_theta 10000.0 -> 500000.0"),
        ("data", {"data_fingerprint": "eeee"}, "dddd -> eeee, so that resuming would repeat or lose samples"),
        ("data", {"data_content": "ffff"}, "cccc -> ffff, so that resuming would train on other samples"),
        ("data", {"data_content": ""}, "cccc -> none, so that resuming would train on other samples"),
    ],
)
def test_what_is_no_setting(config: RunConfig, kind: str, more: dict[str, Any], shown: str) -> None:
    with pytest.raises(ConfigError) as error:
        differences(config, nothing, "config", **more)
    assert shown in str(error.value) and f"allow_changes=[{kind}]" in str(error.value)
    assert shown in differences(config, nothing, kind, **more)[0]


def test_a_library_that_wrote_its_version_is_no_change(config: RunConfig) -> None:
    assert differences(config, nothing, llama={"rope_theta": 1e4, "transformers_version": "6"}) == []


def test_a_checkpoint_without_the_tokenizers_hash(config: RunConfig) -> None:
    check_changes(manifest(config, tokenizer=""), manifest(config), [], pytest.fail)


def test_a_checkpoint_without_the_datas_hash(config: RunConfig) -> None:
    check_changes(manifest(config, data_content=""), manifest(config), [], pytest.fail)


def test_another_folder_is_harmless_only_with_the_same_data(config: RunConfig) -> None:
    name = next(iter(config.data.train))
    moved = set_to(f"data.train.{name}.path", "elsewhere")
    assert differences(config, moved)[0].startswith("changed since the checkpoint, without effect")
    assert len(differences(config, moved)) == 1
    (message,) = differences(config, moved, "data", data_content="ffff")
    assert message.startswith("warning:") and "-> 'elsewhere'" in message


def changed_member(changed: str, name: str, data: bytes) -> tuple[str, bytes]:
    """A member of sample 7, which is of IMU data, with one change that keeps its size."""
    key, _, ending = name.partition(".")
    if key != "imu-00007":
        return name, data
    if changed == "text" and ending == "json":
        data = data.replace(b"what is this", b"what is that")
    if changed == "media" and ending != "json":
        # The lowest bits of a number in the array.
        data = data[:-4] + bytes([data[-4] ^ 1]) + data[-3:]
    return ("imu-x0007." + ending if changed == "key" else name), data


def index_of(folder: Path, config: RunConfig, changed: str) -> str:
    """A copy of the run's shards, with one change, and its index."""
    folder.mkdir()
    for path in sorted(Path(config.data.train["mix"].path).glob("*.tar")):
        with tarfile.open(path) as old, tarfile.open(folder / path.name, "w", format=tarfile.USTAR_FORMAT) as new:
            for member in old:
                file = old.extractfile(member)
                assert file is not None
                name, data = changed_member(changed, member.name, file.read())
                info = tarfile.TarInfo(name)
                info.size = len(data)
                new.addfile(info, io.BytesIO(data))
    make_index(str(folder), IndexOptions(config.data.tokenizer))
    return str(folder)


@pytest.mark.parametrize("changed", ["text", "media", "key"])
def test_the_same_shards_with_other_content(config: RunConfig, tmp_path: Path, changed: str) -> None:
    """Shards of the same names, sizes and counts: only what is in them differs."""
    before, after = (index_of(tmp_path / name, config, change) for name, change in (("a", ""), ("b", changed)))
    config.data.train = {"made": DatasetConfig(path=before)}
    config.trainer.max_steps = 1
    run_ranks(1, train, config)
    config.trainer.max_steps = 2
    config.data.train["made"].path = after

    def resume() -> str:
        with pytest.raises(ConfigError) as error:
            train(config)
        return str(error.value)

    message = run_ranks(1, resume)[0]
    assert "data (its keys, texts or media)" in message and "its shards" not in message
    assert f"data.train.made.path {before!r} -> {after!r}" in message
    shutil.rmtree(after)
    shutil.copytree(before, after)
    assert len(run_ranks(1, train, config)[0]["losses"]) == 2


def test_names_of_allow_changes_are_checked(config: RunConfig) -> None:
    config.resilience.allow_changes = ["weights"]
    with pytest.raises(ConfigError, match=r"resilience\.allow_changes: 'weights' is not one of config, tokenizer"):
        check(config)


def test_in_a_run(config: RunConfig) -> None:
    config.trainer.max_steps = 1
    run_ranks(1, train, config)
    # The random Llama's weights depend on the seed as well.
    config.trainer.max_steps, config.model.seed = 2, 99

    def resume() -> str:
        with pytest.raises(ConfigError) as error:
            train(config)
        return str(error.value)

    message = run_ranks(1, resume)[0]
    assert (
        "model.seed 1234 -> 99" in message and "the Llama's weights" in message and "repeat or lose samples" in message
    )
    assert "allow_changes=[config,base,data]" in message
    config.resilience.allow_changes = ["config", "base", "data"]
    assert len(run_ranks(1, train, config)[0]["losses"]) == 2
