"""Every global batch has the same samples for any replicas, pack lengths and workers, and across restarts."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from engine import train
from ranks import run_ranks
from replicas import replica_data
from tiny import SPECIAL, make_config, make_shards

from megatron_anymal.config import DatasetConfig, RunConfig
from megatron_anymal.data.global_order import GlobalOrder
from megatron_anymal.data.loader import steps
from megatron_anymal.data.micro_batch import MicroBatch
from megatron_anymal.data.records import MediaPart
from megatron_anymal.train.build import DataSource

STEPS = 200
BATCH = 6
REPLICAS, SEQ_LENGTHS, WORKERS = (1, 2, 3, 4), (26, 64), (0, 1, 3)
# Cover every number of replicas and workers, and both pack lengths. The restarts below use more combinations.
LAYOUTS = [(1, 64, 1), (2, 26, 3), (3, 64, 0), (4, 26, 1)]


class Content(NamedTuple):
    """Content of a sample as the model sees it."""

    name: str
    tokens: tuple[int, ...]
    targets: tuple[int, ...]
    media: tuple[str, ...]


def hash_of(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> RunConfig:
    """Two weighted datasets of images (one or several pieces), IMU, text, and mixed samples."""
    folder = tmp_path_factory.mktemp("same")
    first = make_shards(folder / "first", tokenizer_folder, 61, ("image", "imu", "text"))
    second = make_shards(folder / "second", tokenizer_folder, 17, ("mixed", "text"), seed=1)
    config = make_config(first, tokenizer_folder, folder / "run")
    config.data.train = {
        "first": DatasetConfig(path=first, weight=0.7),
        "second": DatasetConfig(path=second, weight=0.3),
    }
    config.model.global_batch_size = BATCH
    return config


@pytest.fixture(scope="module")
def expected(config: RunConfig) -> list[list[Content]]:
    """Expected samples of the global batch per step and position, computed from the order, the index and the media."""
    data = replica_data(config)
    planner, reader = data.planner, data.reader
    order = GlobalOrder(tuple(len(i) for i in planner.indexes), (0.7, 0.3), config.model.seed)
    datasets, samples = order.samples(0, STEPS * BATCH)
    known: dict[tuple[int, int], Content] = {}
    for pair in set(zip(datasets.tolist(), samples.tolist())):
        known[pair] = content_of(config, data, *pair)
    assert len(known) == 61 + 17 and reader is not None
    places = [known[pair] for pair in zip(datasets.tolist(), samples.tolist())]
    return [places[start : start + BATCH] for start in range(0, len(places), BATCH)]


def content_of(config: RunConfig, data: DataSource, dataset: int, sample: int) -> Content:
    index = data.planner.indexes[dataset]
    parts = index.parts(sample)
    media_parts = [part for part in parts if isinstance(part, MediaPart)]
    soft, media = [], []
    for item in index.read_media(sample, parts, range(len(media_parts))):
        modality = data.reader._modalities[item.part.modality].modality
        pieces = modality.load(item.data, item.extension, item.part.attributes)
        soft.append(len(pieces) * config.model.modalities[item.part.modality].projector.num_tokens)
        media.append(hash_of(pieces))
    placeholders = {name: SPECIAL.index(section.placeholder) for name, section in config.model.modalities.items()}
    document = data.reader._tokenizer.document(parts, soft, placeholders)
    targets = tuple(token for token, counts in zip(document.tokens, document.is_target) if counts)
    return Content(data.planner.key(dataset, sample), tuple(document.tokens), targets, tuple(media))


def contents(data: DataSource, batches: list[MicroBatch]) -> Iterator[tuple[int, Content]]:
    """Yield position in the global batch and content of every sample of the micro-batches."""
    for m in batches:
        assert not m.bad
        at = dict.fromkeys(m.media, 0)
        for sample in m.plan.samples:
            mask = m.sample_positions[0] == sample.position
            media = []
            for planned in sample.media:
                start = at[planned.modality]
                at[planned.modality] = start + planned.pieces
                media.append(hash_of(m.media[planned.modality].pieces[start : start + planned.pieces]))
            labels = m.labels[0, mask][m.loss_mask[0, mask] > 0]
            name = data.planner.key(sample.dataset, sample.sample)
            yield (
                sample.position,
                Content(name, tuple(m.tokens[0, mask].tolist()), tuple(labels.tolist()), tuple(media)),
            )
        for name, count in at.items():
            assert count == len(m.media[name].pieces)


def global_batches(
    config: RunConfig, layout: tuple[int, int, int], start: int, stop: int
) -> list[list[tuple[int, Content]]]:
    """Return what all replicas of a run read, by step. Each replica has its own planner, as in a job."""
    replicas, seq_length, workers = layout
    config = copy.deepcopy(config)
    config.data.seq_length = seq_length
    step_batches: list[list[tuple[int, Content]]] = [[] for _ in range(start, stop)]
    for replica in range(replicas):
        data = replica_data(config, replicas)
        run = steps(
            data.planner,
            data.reader,
            replica=replica,
            start=start,
            stop=stop,
            num_workers=workers,
            prefetch_steps=2,
        )
        number = -1
        for number, (plan, batches) in enumerate(run):
            assert plan.step == start + number
            assert all(m.tokens.size(1) <= seq_length for m in batches)
            step_batches[number] += contents(data, batches)
        assert number == stop - start - 1
    return [sorted(batch) for batch in step_batches]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "dp{}-seq{}-workers{}".format(*layout))
def test_every_layout_reads_the_planned_samples(
    layout: tuple[int, int, int], config: RunConfig, expected: list[list[Content]]
) -> None:
    for step, (batch, wanted) in enumerate(zip(global_batches(config, layout, 0, STEPS), expected, strict=True)):
        assert batch == list(enumerate(wanted)), f"step {step}"


def test_twenty_restarts_in_other_layouts_lose_and_repeat_nothing(
    config: RunConfig, expected: list[list[Content]]
) -> None:
    rng = np.random.default_rng(7)
    restarts = np.sort(rng.choice(np.arange(1, STEPS), size=20, replace=False)).tolist()
    every_layout = list(itertools.product(REPLICAS, SEQ_LENGTHS, WORKERS))
    step_batches: list[list[tuple[int, Content]]] = []
    layout = every_layout[0]
    for start, stop in zip([0, *restarts], [*restarts, STEPS]):
        step_batches += global_batches(config, layout, start, stop)
        others = [other for other in every_layout if other != layout]
        layout = others[int(rng.integers(len(others)))]
    assert step_batches == [list(enumerate(batch)) for batch in expected]


def test_pack_lengths_differ(config: RunConfig) -> None:
    # Otherwise the tests above would compare a layout with itself.
    plans = []
    for seq_length in SEQ_LENGTHS:
        config = copy.deepcopy(config)
        config.data.seq_length = seq_length
        plans.append(replica_data(config).planner.plan(0).micro_batches)
    assert plans[0] != plans[1]


def losses_under(config: RunConfig, run_dir: Path, layout: tuple[int, int, int]) -> list[float]:
    config = copy.deepcopy(config)
    config.trainer.devices, config.data.seq_length, config.data.num_workers = layout
    config.exp_manager.explicit_log_dir = str(run_dir)
    result: list[dict[str, Any]] = run_ranks(layout[0], train, config)
    return result[0]["losses"]


@pytest.fixture(scope="module")
def one_process(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, list[float]]:
    """Configuration and losses of a short run on one process."""
    config = copy.deepcopy(config)
    config.trainer.max_steps = 4
    config.exp_manager.checkpoint.every_n_train_steps = 0
    # With a large eps, a gradient that is only rounding does not cause a full step of Adam.
    config.model.optim.eps = 1e-4
    return config, losses_under(config, tmp_path_factory.mktemp("one"), (1, SEQ_LENGTHS[1], 0))


@pytest.mark.parametrize("layout", [(1, 26, 3), (2, 64, 1), (3, 26, 0), (4, 64, 0)])
def test_the_loss_of_a_step_is_the_same(
    layout: tuple[int, int, int], one_process: tuple[RunConfig, list[float]], tmp_path: Path
) -> None:
    config, wanted = one_process
    assert len(wanted) == 4 and len(set(wanted)) == 4
    np.testing.assert_allclose(losses_under(config, tmp_path, layout), wanted, rtol=1e-6)
