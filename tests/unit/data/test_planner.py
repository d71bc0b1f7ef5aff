"""Lengths, costs and media of planned samples are those of their rows, read one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_anymal.config import DatasetConfig
from megatron_anymal.data.index_format import MEDIA, SAMPLE
from megatron_anymal.data.planner import BatchLayout, BatchPlanner, PlannedModality
from megatron_anymal.data.records import DataError, PlannedMedia
from megatron_anymal.data.shard_index import ShardIndex

SAMPLES, SEQ_LENGTH = 3000, 350


class Kind:
    """A modality: a piece for every `size` units of the first number."""

    def __init__(self, size: int):
        self.size, self.piece_shape = size, (3, size)

    def count_pieces(self, sizes: np.ndarray) -> np.ndarray:
        return np.clip(np.ceil(sizes[:, 0] / self.size), 1, 9).astype(np.int64)


class AnyTokenizer:
    def fingerprint(self) -> str:
        return "t"


MODALITIES: Any = [PlannedModality("pictures", "image", Kind(40), 7), PlannedModality("audio", "audio", Kind(90), 5)]  # type: ignore[arg-type]


def write_index(folder: Path) -> Path:
    """An index without shards: samples with 0 to 4 media of two kinds, some of them pairs."""
    rng = np.random.default_rng(0)
    samples = np.zeros(SAMPLES, SAMPLE)
    counts = rng.integers(0, 5, SAMPLES)
    samples["media_count"], samples["media_start"] = counts, np.cumsum(counts) - counts
    samples["tokens"] = rng.integers(4, 120, SAMPLES)
    samples["targets"] = samples["tokens"] // 2
    pairs = rng.uniform(size=SAMPLES) < 0.3
    samples["rejected_tokens"][pairs] = rng.integers(4, 120, int(pairs.sum()))
    samples["rejected_targets"][pairs] = 3
    media = np.zeros(int(counts.sum()), MEDIA)
    media["kind"], media["size"] = rng.integers(0, 2, len(media)), rng.uniform(1, 400, (len(media), 2))
    (folder / "index").mkdir(parents=True)
    np.save(folder / "index" / "samples.npy", samples)
    np.save(folder / "index" / "media.npy", media)
    (folder / "index" / "keys.bin").write_bytes(b"\0")
    header = {"version": 2, "samples": SAMPLES, "media": len(media), "kinds": ["audio", "image"], "extensions": ["x"]}
    (folder / "index" / "index.json").write_text(json.dumps({**header, "tokenizer": "t", "shards": []}))
    return folder


def planner(folder: Path, **settings: Any) -> BatchPlanner:
    datasets = {"a": DatasetConfig(path=str(folder))}
    layout = BatchLayout(2, 1, SEQ_LENGTH)
    tokenizer: Any = AnyTokenizer()
    return BatchPlanner(datasets, MODALITIES, tokenizer, layout, global_batch_size=200, seed=1, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_index(tmp_path_factory.mktemp("plans") / "f")


def by_hand(index: ShardIndex, sample: int) -> tuple[list[int], int, float, tuple[PlannedMedia, ...]]:
    """LLM tokens of the documents, targets, encoder cost and media of a sample."""
    row, cost, soft, items = index.samples[sample], 0.0, 0, []
    for item in index.media_rows(sample):
        planned = MODALITIES[1 - item["kind"]]
        pieces = int(planned.modality.count_pieces(item["size"][None])[0])
        cost += pieces * 3 * planned.modality.size
        soft += pieces * planned.soft_tokens_per_piece
        items.append(PlannedMedia(planned.name, pieces))
    documents = [int(row[name]) + soft * (row[name] > 0) for name in ("tokens", "rejected_tokens")]
    return documents, int(row["targets"]) + int(row["rejected_targets"]), cost, tuple(items)


@pytest.mark.parametrize("rows", ["all", "some in a row", "shuffled", "reversed", "one", "none"])
def test_measures(folder: Path, rows: str) -> None:
    plans = planner(folder, too_long="drop")
    every = np.arange(SAMPLES)
    sample = {
        "all": every,
        "some in a row": every[700:900],
        "shuffled": np.random.default_rng(1).permutation(SAMPLES)[:500],
        "reversed": every[::-1],
        "one": every[77:78],
        "none": every[:0],
    }[rows]
    [index] = plans.indexes
    measures = plans.measure(index, sample)
    expected = [by_hand(index, int(number)) for number in sample]
    assert measures.documents.tolist() == [documents for documents, *_ in expected]
    assert measures.targets.tolist() == [targets for _, targets, *_ in expected]
    # Each cost is rounded to a millionth of the costliest piece's.
    np.testing.assert_allclose(measures.costs / 2**20, [cost / 270 for _, _, cost, _ in expected], rtol=1e-5)
    names = [modality.name for modality in MODALITIES]
    items = [
        PlannedMedia(names[modality], pieces)
        for modality, pieces in zip(measures.modality.tolist(), measures.pieces.tolist())
    ]
    assert items == [item for *_, items in expected for item in items]
    assert measures.owner.tolist() == [owner for owner, (*_, items) in enumerate(expected) for _ in items]


def test_a_plan_has_its_samples_media_and_drops_what_is_too_long(folder: Path) -> None:
    plans = planner(folder, too_long="drop")
    plan = plans.plan(3)
    expected = [by_hand(plans.indexes[0], int(number)) for number in plan.sample]
    assert [plan.media.of(position) for position in range(200)] == [items for *_, items in expected]
    assert plan.documents.tolist() == [documents for documents, *_ in expected]
    assert list(plan.dropped) == [n for n, (documents, *_) in enumerate(expected) if sum(documents) > SEQ_LENGTH]
    assert plan.dropped and len(plan.dropped) < 20


def test_the_longest_sample_is_named(folder: Path) -> None:
    plans = planner(folder, too_long="drop")
    lengths = [sum(by_hand(plans.indexes[0], number)[0]) for number in range(SAMPLES)]
    too_long = sum(length > SEQ_LENGTH for length in lengths)
    with pytest.raises(DataError, match=rf"^{too_long} sample\(s\) .* with {max(lengths)} tokens"):
        planner(folder)


def test_plans_of_a_mixture(tmp_path: Path) -> None:
    """Media of two datasets end up at the positions of their samples, and packs hold every sample that fits."""
    folders = {name: write_index(tmp_path / name) for name in ("a", "b")}
    datasets = {name: DatasetConfig(path=str(folder)) for name, folder in folders.items()}
    tokenizer: Any = AnyTokenizer()
    layout = BatchLayout(2, 2, SEQ_LENGTH, length_multiple=8)
    plans = BatchPlanner(datasets, MODALITIES, tokenizer, layout, global_batch_size=300, seed=1, too_long="drop")
    plan = plans.plan(2)
    assert set(plan.dataset.tolist()) == {0, 1}
    for position, (dataset, sample) in enumerate(zip(plan.dataset.tolist(), plan.sample.tolist())):
        documents, targets, _, items = by_hand(plans.indexes[dataset], sample)
        assert plan.documents[position].tolist() == documents and plan.media.of(position) == items
        assert plan.targets[position] == (0 if position in plan.dropped else targets)
    placed = [p for replica in plan.micro_batches for positions in replica for p in positions]
    assert sorted([*placed, *plan.dropped]) == list(range(300))
    lengths = [int(plan.length[list(positions)].sum()) for replica in plan.micro_batches for positions in replica]
    assert max(lengths) <= plan.padded_length <= 2 * SEQ_LENGTH + 7 and plan.padded_length % 8 == 0
    assert len({len(replica) for replica in plan.micro_batches}) == 1
    assert plan.tokens == sum(lengths)


def test_encoder_costs_decide_what_is_balanced(folder: Path) -> None:
    plans = planner(folder, too_long="drop")
    for costs in ({"pictures": 1000.0, "audio": 1.0}, {"pictures": 1.0, "audio": 1000.0}):
        plans.use_encoder_costs(costs)
        plan = plans.plan(5)
        work = [
            sum(
                costs[item.modality] * item.pieces
                for batch in plan.of_replica(r)
                for s in batch.samples
                for item in s.media
            )
            for r in range(2)
        ]
        assert max(work) / np.mean(work) < 1.01
