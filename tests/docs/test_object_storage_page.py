"""docs/guides/object-storage.md: its commands run against a server, and its numbers match the code."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from commands import PAGES, ROOT, blocks, commands, run
from object_store import ENVIRONMENT, object_store
from tiny import make_tokenizer

from megatron_anymal.config import data_section
from megatron_anymal.config.compose import from_dict
from megatron_anymal.config.validation import check
from megatron_anymal.object_storage.client import REQUEST_BYTES
from megatron_anymal.object_storage.sequential import _AHEAD

PAGE = PAGES["docs/guides/object-storage.md"]


def test_commands_run(tmp_path: Path, mixed_shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tokenizer(tmp_path / "runs" / "quickstart" / "tokenizer")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    shards = shutil.copytree(mixed_shards, tmp_path / "shards", ignore=shutil.ignore_patterns("index"))
    with object_store(tmp_path) as store:
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": store.url}.items():
            monkeypatch.setenv(name, value)
        store.upload(str(shards), "image_text", bucket="my-bucket")
        prepared, inspected = (run(command, tmp_path) for command in commands(PAGE) if command.startswith("anymal"))
        requests = [span for shard in Path(shards).glob("*.tar") for span in store.log(shard.name)]
    assert "40 samples, 40 media items, 0 left out" in prepared and "40 samples" in inspected
    # `prepare` makes one request for each small shard, `inspect` two for the members of two samples.
    assert len(requests) >= 4 and all(requests)


def test_configuration_is_valid() -> None:
    [text] = blocks(PAGE, "yaml")
    given = yaml.safe_load(text)
    given["data"]["tokenizer"] = "tokenizer"
    config = from_dict({**given, "model": {"language_model": {"config": {"hidden_size": 64}}}})
    check(config)
    assert config.data.storage.cache_gib == 500 and config.data.remote_paths


def test_numbers() -> None:
    text = " ".join(PAGE.split())
    assert f"in {REQUEST_BYTES // 2**20} MiB requests, with four in flight ahead" in text and _AHEAD == 4
    assert f"double from {data_section.FIRST_PAUSE} s to {data_section.LONGEST_PAUSE:.0f} s" in text
    names = set(re.findall(r"`([a-z]+_[a-z_]+|attempts|connections)`", PAGE)) - {"max_bad_share", "num_workers"}
    assert names <= set(vars(data_section.StorageConfig()))


def test_measured_times() -> None:
    [name] = re.findall(r"`(benchmarks/results/\S+-object-storage\.json)`", PAGE)
    rounds = json.loads((ROOT / name).read_text())["rounds_of"]
    times = {side: min(1000 * one["seconds"] / one["micro_batches"] for one in all_) for side, all_ in rounds.items()}
    text = " ".join(PAGE.split())
    for side, words in (
        ("member by member", "if it requests members one by one"),
        ("coalesced", "with all requests of a micro-batch at once"),
        ("read ahead", "with read-ahead"),
        ("cached", "from the cache"),
    ):
        assert f"{times[side]:.0f} ms" in text.partition(words)[0][-60:], side
