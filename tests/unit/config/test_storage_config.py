"""Checks of data.storage: settings without effect, caches that are too small, and addresses with credentials."""

from __future__ import annotations

import pytest

from megatron_anymal.config import ConfigError, DatasetConfig, RunConfig, StorageConfig
from megatron_anymal.config.validation import check


def run(path: str = "s3://bucket/folder", **storage: object) -> RunConfig:
    config = RunConfig()
    config.model.language_model.config = {"hidden_size": 64}
    config.data.tokenizer = "tokenizer"
    config.data.train = {"a": DatasetConfig(path)}
    config.data.storage = StorageConfig(**storage)  # type: ignore[arg-type]
    return config


def test_defaults() -> None:
    check(run())
    check(run("folder"))
    check(run("https://host/folder"))
    assert run().data.remote_paths == ["s3://bucket/folder"]
    for local in ("folder", "/folder", "file:///folder"):
        assert run(local).data.remote_paths == []


@pytest.mark.parametrize(
    ("storage", "says"),
    [
        ({"attempts": 0}, r"data\.storage\.attempts=0 must be at least 1"),
        ({"timeout_seconds": 0.0}, r"data\.storage\.timeout_seconds=0\.0 must be at least 1"),
        ({"connections": 0}, r"data\.storage\.connections=0 must be at least 1"),
        ({"read_ahead": -1}, r"data\.storage\.read_ahead=-1 must be at least 0"),
        ({"cache_folder": "s3://bucket/cache"}, r"cache_folder must be a folder on a local disk"),
        ({"cache_block_kib": 64}, r"cache_block_kib has no effect with data\.storage\.cache_gib=0"),
        ({"cache_gib": 0.05}, r"cache_gib=0\.05 holds fewer than 64 blocks"),
        # 20 x 30 s, and pauses of 0.5, 1, 2, 4, 8, 16 and 13 x 30 s.
        ({"attempts": 20}, r"take up to 1022 s, but resilience\.hang_timeout=600 ends the run before"),
    ],
)
def test_bad_values(storage: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check(run(**storage))


def test_no_effect_on_local_folders() -> None:
    with pytest.raises(ConfigError, match=r"data\.storage has no effect: all folders of data sets are local"):
        check(run("folder", attempts=3))
    config = run("folder", attempts=3)
    config.data.validation = {"far": DatasetConfig("gs://bucket/folder")}
    check(config)


def test_hang_timeout_may_be_off() -> None:
    config = run(attempts=20)
    config.resilience.hang_timeout = 0
    check(config)


@pytest.mark.parametrize("address", ["s3://key:secret@bucket/folder", "https://host/folder?X-Amz-Signature=secret"])
def test_credentials_in_addresses(address: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.train\.a\.path holds credentials") as error:
        check(run(address))
    assert "secret" not in str(error.value)
