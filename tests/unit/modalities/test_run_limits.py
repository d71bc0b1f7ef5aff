"""A run's data.limits reach the code that reads its media."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import make_config

from megatron_anymal.data.lint import Reading, read_sample
from megatron_anymal.data.shard_index import MediaBytes, ShardIndex
from megatron_anymal.modalities import MediaError
from megatron_anymal.train.build import build_inputs, loaded_modalities


def test_a_samples_media_are_held_to_the_runs_limits(mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> None:
    config = make_config(mixed_shards, tokenizer_folder, tmp_path / "run")
    config.data.limits.max_pixels = 63
    tokenizer, modalities = build_inputs(config.model, config.data)
    assert all(modality.limits is config.data.limits for modality in modalities.values())
    loaded = loaded_modalities(config.model.modalities, tokenizer, modalities)
    index = ShardIndex(mixed_shards)
    pictured = next(n for n in range(40) if "image" in {item.part.modality for item in _media(index, n)})
    reading = Reading(tokenizer, {entry: loaded[entry].modality for entry in loaded}, loaded)
    with pytest.raises(MediaError, match=r"has 64 pixels \(8 x 8\), above data.limits.max_pixels=63"):
        read_sample(index, pictured, reading)
    config.data.limits.max_pixels = 64
    assert read_sample(index, pictured, reading).pieces


def _media(index: ShardIndex, number: int) -> list[MediaBytes]:
    sample = index.sample(number)
    return index.read_media(number, sample.documents[0], range(len(index.media_rows(number))))
