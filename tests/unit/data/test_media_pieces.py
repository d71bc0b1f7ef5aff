"""Media are written straight into the tensor of their micro-batch, in loader processes into shared memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from manifests import shards_of
from replicas import replica_data
from tiny import make_config, png

from megatron_anymal.data import media_pieces
from megatron_anymal.data.loader import steps
from megatron_anymal.train.build import DataSource


@pytest.fixture
def data(tmp_path: Path, tokenizer_folder: str) -> DataSource:
    samples = [
        {"key": f"{n}", "parts": [{"media": f"{n}.png", "modality": "image"}, {"text": "one two"}]} for n in range(8)
    ]
    files = {f"{n}.png": png(n, (64, 64)) for n in range(8)}
    folder = shards_of(tmp_path / "shards", tokenizer_folder, samples, files)
    config = make_config(folder, tokenizer_folder, tmp_path / "run")
    config.data.seq_length = 128
    return replica_data(config)


def test_workers_and_this_process_read_the_same(data: DataSource) -> None:
    def read(workers: int) -> list[torch.Tensor]:
        plans = steps(data.planner, data.reader, replica=0, start=0, stop=3, num_workers=workers, prefetch_steps=2)
        return [media.pieces for _, batches in plans for batch in batches for media in batch.media.values()]

    alone, by_workers = read(0), read(2)
    assert len(alone) == len(by_workers) > 0
    for one, other in zip(alone, by_workers):
        assert torch.equal(one, other) and other.is_shared()


def test_what_was_written_before_an_error_is_cleared(data: DataSource, monkeypatch: pytest.MonkeyPatch) -> None:
    modality = data.reader._modalities["image"].modality
    write = type(modality).write

    def failing(self: object, decoded: object, out: object) -> None:
        write(self, decoded, out)  # type: ignore[arg-type]
        raise media_pieces.MediaError("broke off")

    monkeypatch.setattr(type(modality), "write", failing)
    for plan in data.planner.plan(0).of_replica(0):
        batch = data.reader[plan]
        assert len(batch.bad) == len(plan.samples) and all("broke off" in why for why in batch.bad.values())
        assert not batch.media["image"].pieces.any()


def test_a_rank_reads_its_part_of_an_item(data: DataSource) -> None:
    """Ranks of one replica read disjoint parts of the pieces, also of a single item, in order."""
    modality = data.reader._modalities["image"].modality
    for plan in data.planner.plan(0).of_replica(0):
        items = [
            media_pieces.PlannedItem(sample, number, media.pieces)
            for sample in plan.samples
            for number, media in enumerate(sample.media)
        ]
        parts = {s.position: data.planner.indexes[s.dataset].sample(s.sample).documents[0] for s in plan.samples}
        count, reader = sum(item.pieces for item in items), media_pieces.PieceReader(data.planner)
        whole = reader.read(modality, list(media_pieces.pieces_in(items, slice(0, count))), parts, {})
        assert max(item.pieces for item in items) > 3
        for number in range(count):
            wanted = list(media_pieces.pieces_in(items, slice(number, number + 1)))
            part = reader.read(modality, wanted, parts, {})
            assert torch.equal(part, whole[number : number + 1])
