"""Micro-batches with some pieces in the cache: any mix of cached and new pieces gives all features, in order."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from manifests import shards_of
from replicas import replica_data
from tiny import make_config, png

from megatron_anymal.data.feature_cache import FeatureCache, PieceKey
from megatron_anymal.data.loader import steps
from megatron_anymal.data.micro_batch import MediaBatch
from megatron_anymal.object_storage.cache_folder import cache_folder
from megatron_anymal.train.build import DataSource

SHAPE = (2, 5)


@pytest.fixture
def data(tmp_path: Path, tokenizer_folder: str) -> DataSource:
    """Eight images of up to seventeen tiles."""
    samples = [
        {"key": f"{n}", "parts": [{"media": f"{n}.png", "modality": "image"}, {"text": "one two"}]} for n in range(8)
    ]
    files = {f"{n}.png": png(n, (8 * (n % 4 + 1), 16)) for n in range(8)}
    folder = shards_of(tmp_path / "shards", tokenizer_folder, samples, files)
    config = make_config(folder, tokenizer_folder, tmp_path / "run")
    config.data.seq_length = 128
    return replica_data(config)


def encoded(pieces: torch.Tensor) -> torch.Tensor:
    """Stands for an encoder: [n, 3, 8, 8] to [n, 2, 5]."""
    return pieces.flatten(1)[:, :10].reshape(-1, *SHAPE).to(torch.bfloat16)


def media_of(data: DataSource, workers: int) -> list[MediaBatch]:
    plans = steps(data.planner, data.reader, replica=0, start=0, stop=1, num_workers=workers, prefetch_steps=1)
    return [batch.media["image"] for _, batches in plans for batch in batches]


@pytest.mark.parametrize("workers", [0, 1])
def test_any_mix_of_hits(data: DataSource, tmp_path: Path, workers: int) -> None:
    expected = [encoded(media.pieces) for media in media_of(data, 0)]
    cache = FeatureCache(cache_folder(str(tmp_path / "cache")), 2**20, "encoder", SHAPE, torch.bfloat16)
    data.reader.use_caches({"image": cache})
    cold = media_of(data, workers)
    rng, stored = random.Random(0), set[PieceKey]()
    # Every round stores about half of what is missing, in random order.
    for _ in range(5):
        counts = []
        for whole, media in zip(expected, media_of(data, workers), strict=True):
            features = media.features
            assert features is not None and len(features.keys) == len(media.pieces) == len(features.missing)
            known = {position for position in range(len(whole))} - set(features.missing.tolist())
            assert sorted(known) == features.index.tolist()
            assert torch.equal(features.with_encoded(encoded(media.pieces)), whole)
            counts.append(len(features.index))
            for key, row in zip(features.keys, encoded(media.pieces)):
                if rng.random() < 0.5:
                    assert key is not None
                    cache.add(key, row)
                    stored.add(key)
        assert sum(counts) <= len(stored)
    assert len(stored) > 20 and all(not media.features.index.numel() for media in cold if media.features)
