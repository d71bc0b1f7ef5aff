"""Preference pairs from the plan to tensors: two adjacent documents that share one encoding of their media."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from manifests import shards_of
from replicas import replica_data
from tiny import SPECIAL, make_config, make_conversations, make_shards, png
from torch import Tensor

from megatron_anymal.config import DatasetConfig, RunConfig
from megatron_anymal.data.content_parts import name_modalities
from megatron_anymal.data.context_parallel import held_tokens, padded
from megatron_anymal.data.loader import steps
from megatron_anymal.data.micro_batch import MicroBatch
from megatron_anymal.data.records import SAMPLE_KINDS, PlannedSample
from megatron_anymal.train.build import DataSource
from megatron_anymal.train.objective import TokenObjective

KINDS = ("image", "audio", "imu", "text", "mixed")


@pytest.fixture(autouse=True)
def every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pairs and other samples share a pack, which no job does."""
    monkeypatch.setattr(TokenObjective, "sample_kinds", SAMPLE_KINDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> dict[str, str]:
    """One folder per kind of sample."""
    folder = tmp_path_factory.mktemp("kinds")
    return {
        "preference": make_conversations(folder / "pairs", tokenizer_folder, 20, KINDS, pairs=True),
        "messages": make_conversations(folder / "told", tokenizer_folder, 10, KINDS),
        "parts": make_shards(folder / "parts", tokenizer_folder, 10, ("image", "mixed", "text"), seed=2),
    }


@pytest.fixture
def config(folders: dict[str, str], tokenizer_folder: str, tmp_path: Path) -> RunConfig:
    """A configuration with pairs only."""
    config = make_config(folders["preference"], tokenizer_folder, tmp_path / "run")
    config.data.seq_length = 192
    return config


@pytest.fixture
def mixed(folders: dict[str, str], config: RunConfig) -> RunConfig:
    """A configuration with all kinds, so that pairs and other samples share packs."""
    config.data.train = {name: DatasetConfig(path=path) for name, path in folders.items()}
    return config


def micro_batches(data: DataSource, count: int) -> Iterator[MicroBatch]:
    for step in range(count):
        for plan in data.planner.plan(step).of_replica(0):
            batch = data.reader[plan]
            assert not batch.bad
            yield batch


def expected(config: RunConfig, data: DataSource, sample: PlannedSample) -> list[tuple[list[int], list[bool]]]:
    """Tokens and targets of each document of a sample, computed directly from its text."""
    placeholders = {name: SPECIAL.index(section.placeholder) for name, section in config.model.modalities.items()}
    soft = [m.pieces * config.model.modalities[m.modality].projector.num_tokens for m in sample.media]
    read = data.planner.indexes[sample.dataset].sample(sample.sample)
    documents = []
    for parts in read.documents:
        named = name_modalities(parts, [m.modality for m in sample.media])
        document = data.reader._tokenizer.document(named, soft, placeholders, closed=read.closed)
        documents.append((document.tokens, document.is_target))
    return documents


def test_documents_of_a_pair_lie_side_by_side(mixed: RunConfig) -> None:
    data = replica_data(mixed)
    together = 0
    for batch in micro_batches(data, 6):
        assert batch.branch is not None and batch.branch.dtype == torch.int64
        start, lengths = 0, iter(batch.document_lengths)
        for sample in batch.plan.samples:
            wanted = expected(mixed, data, sample)
            assert sample.documents == tuple(len(tokens) for tokens, _ in wanted)
            assert sample.targets == sum(sum(targets) for _, targets in wanted)
            for number, (tokens, targets) in enumerate(wanted):
                assert next(lengths) == len(tokens)
                span = slice(start, start + len(tokens))
                start += len(tokens)
                assert batch.tokens[0, span].tolist() == tokens
                assert batch.labels[0, span].tolist() == [*tokens[1:], 0]
                assert batch.loss_mask[0, span].tolist() == [*map(float, targets[1:]), 0.0]
                assert batch.sample_positions[0, span].eq(sample.position).all()
                assert batch.branch[0, span].eq(number).all()
        rest = list(lengths)
        assert sum(rest) == batch.plan.padded_length - start and len(rest) <= 1
        assert batch.branch[0, start:].eq(-1).all() and batch.loss_mask[0, start:].eq(0).all()
        counts = {len(sample.documents) for sample in batch.plan.samples}
        together += counts == {1, 2}
    assert together > 2, "pairs and other samples never met in a pack"


def places(batch: MicroBatch, name: str, placeholder: int, per_piece: int) -> tuple[list[int], list[int]]:
    """Positions of the soft tokens and their indices, found by walking through the documents."""
    where, which, start, first = [], [], 0, 0
    for sample in batch.plan.samples:
        count = per_piece * sum(m.pieces for m in sample.media if m.modality == name)
        for length in sample.documents:
            positions = [p for p in range(start, start + length) if batch.tokens[0, p] == placeholder]
            assert len(positions) == count
            where += positions
            which += range(first, first + count)
            start += padded(length, batch.plan.document_multiple)
        first += count
    return where, which


def test_media_of_a_pair_are_encoded_once_for_both_documents(mixed: RunConfig) -> None:
    data = replica_data(mixed)
    shared = 0
    for batch in micro_batches(data, 6):
        for name, media in batch.media.items():
            section = mixed.model.modalities[name]
            per_piece = section.projector.num_tokens
            assert len(media.pieces) == sum(
                m.pieces for sample in batch.plan.samples for m in sample.media if m.modality == name
            )
            where, which = places(batch, name, SPECIAL.index(section.placeholder), per_piece)
            soft = list(range(len(media.pieces) * per_piece))
            assert media.token_index.tolist() == where
            assert (soft if media.soft_index is None else media.soft_index.tolist()) == which
            shared += len(which) > len(soft)
            # An index is needed only if there is a pair.
            assert (media.soft_index is None) == all(len(s.documents) == 1 for s in batch.plan.samples)
    assert shared > 5


def test_the_pieces_are_those_of_the_media(config: RunConfig) -> None:
    data = replica_data(config)
    item_count = 0
    for batch in micro_batches(data, 2):
        at = dict.fromkeys(batch.media, 0)
        for sample in batch.plan.samples:
            index = data.planner.indexes[0]
            parts = index.sample(sample.sample).documents[1]
            for planned, item in zip(sample.media, index.read_media(sample.sample, parts, range(len(sample.media)))):
                modality = data.reader._modalities[planned.modality].modality
                start, stop = at[planned.modality], at[planned.modality] + planned.pieces
                pieces = modality.load(item.data, item.extension, item.part.attributes)
                torch.testing.assert_close(batch.media[planned.modality].pieces[start:stop], pieces)
                at[planned.modality], item_count = stop, item_count + 1
        assert {name: len(media.pieces) for name, media in batch.media.items()} == at
    assert item_count > 10


@pytest.mark.parametrize("context_size", [2, 4])
def test_context_parallel_ranks_share_pairs(mixed: RunConfig, context_size: int) -> None:
    readers = [replica_data(mixed, context_rank=rank, context_size=context_size) for rank in range(context_size)]
    alone, multiple = replica_data(mixed).reader, 2 * context_size
    for plan in readers[0].planner.plan(0).of_replica(0):
        assert plan.document_multiple == multiple
        one = alone[plan]
        lengths = [padded(n, multiple) for sample in plan.samples for n in sample.documents]
        assert list(one.document_lengths)[: len(lengths)] == lengths
        assert one.branch is not None
        of_padding = one.sample_positions < 0
        assert one.branch[of_padding].eq(-1).all() and one.branch[~of_padding].ge(0).all()
        soft: dict[str, list[tuple[int, int]]] = {name: [] for name in one.media}
        for rank, data in enumerate(readers):
            mine = data.reader[plan]
            held = held_tokens(one.document_lengths, rank, context_size)
            for field in ("tokens", "labels", "loss_mask", "sample_positions", "branch"):
                torch.testing.assert_close(getattr(mine, field), getattr(one, field)[:, held])
            for name, media in mine.media.items():
                assert media.soft_index is not None
                soft[name] += zip(held[media.token_index].tolist(), media.soft_index.tolist())
        for name, entry in data.reader._modalities.items():
            if name in one.media:
                wanted = places(one, name, entry.placeholder, entry.soft_tokens_per_piece)
                assert sorted(soft[name]) == list(zip(*wanted))


def test_a_gradient_reaches_the_one_encoding_from_both_documents(config: RunConfig) -> None:
    from megatron_anymal.model.embedding_merge import merge

    [plan, *_] = replica_data(config).planner.plan(0).of_replica(0)
    batch = replica_data(config).reader[plan]
    media = batch.media["image"]
    assert media.soft_index is not None
    soft = torch.randn(len(media.pieces) * 2, 4, dtype=torch.float64, requires_grad=True)
    text = torch.zeros(plan.padded_length, 1, 4, dtype=torch.float64)
    merged = merge(text, [soft[media.soft_index]], [media.token_index])
    # Chosen and rejected documents hold the same soft tokens.
    by_branch: list[Tensor] = []
    for branch in (0, 1):
        mask = (batch.branch[0] == branch) & (batch.tokens[0] == SPECIAL.index(SPECIAL[2]))  # type: ignore[index]
        by_branch.append(merged[mask, 0])
    torch.testing.assert_close(by_branch[0], by_branch[1])
    torch.testing.assert_close(by_branch[0], soft.detach())
    (by_branch[0].sum() + 10 * by_branch[1].sum()).backward()
    torch.testing.assert_close(soft.grad, torch.full_like(soft, 11))


def contents(data: DataSource, step: int, replicas: int) -> dict[int, tuple[Any, ...]]:
    """Position in the global batch -> the model's inputs for that sample."""
    inputs = {}
    for replica in range(replicas):
        for plan in data.planner.plan(step).of_replica(replica):
            batch = data.reader[plan]
            assert batch.branch is not None
            for sample in plan.samples:
                sample_mask = batch.sample_positions[0] == sample.position
                inputs[sample.position] = tuple(
                    tensor[0, sample_mask].tolist()
                    for tensor in (batch.tokens, batch.labels, batch.loss_mask, batch.branch)
                )
    return inputs


def test_layouts_read_the_same_pairs(config: RunConfig) -> None:
    one = replica_data(config)
    longest = max(int(one.planner.plan(step).length.max()) for step in range(3))
    config.data.seq_length = longest
    two = replica_data(config, 2)
    for step in range(3):
        plans = [data.planner.plan(step) for data in (one, two)]
        assert plans[0].micro_batches != plans[1].micro_batches
        np.testing.assert_array_equal(plans[0].targets, plans[1].targets)
        wanted = contents(one, step, 1)
        assert len(wanted) == 8 and contents(two, step, 2) == wanted
        # A pair's length counts both documents, so no pack exceeds the limit.
        assert plans[1].padded_length <= longest


def test_workers_hand_pairs_on(config: RunConfig) -> None:
    data = replica_data(config)
    runs = [
        list(steps(data.planner, data.reader, replica=0, start=0, stop=2, num_workers=workers, prefetch_steps=1))
        for workers in (0, 1)
    ]
    for (_, one), (_, other) in zip(*runs, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            torch.testing.assert_close(mine.branch, theirs.branch)
            for name, media in mine.media.items():
                torch.testing.assert_close(media.soft_index, theirs.media[name].soft_index)


def words(count: int) -> str:
    return " ".join(["one"] * count)


def pairs_of(folder: Path, tokenizer_folder: str, **answers: tuple[str, str]) -> str:
    lines = [
        {"key": key, "messages": [{"role": "user", "content": "what"}], "chosen": chosen, "rejected": rejected}
        for key, (chosen, rejected) in answers.items()
    ]
    return shards_of(folder, tokenizer_folder, lines, {})


# The begin token, a user turn of one word, the answer's header and end.
AROUND = 1 + 5 + 4


@pytest.mark.parametrize("context_size", [1, 4])
def test_which_pairs_are_too_long_is_no_matter_of_layout(
    tmp_path: Path, tokenizer_folder: str, context_size: int
) -> None:
    # Padded separately, the documents would have 24 tokens each: more than the pack, which holds 2 x 20.
    fits, longer = (words(20 - AROUND), words(19 - AROUND) + " two"), (words(20 - AROUND), words(21 - AROUND))
    folder = pairs_of(tmp_path / "s", tokenizer_folder, fits=fits, longer=longer)
    config = make_config(folder, tokenizer_folder, tmp_path / "run")
    config.data.seq_length, config.data.too_long, config.model.global_batch_size = 40, "drop", 2
    data = replica_data(config, context_size=context_size)
    plan = data.planner.plan(0)
    assert [data.planner.key(0, int(plan.sample[position])) for position in plan.dropped] == ["mix/longer"]
    [batch] = [data.reader[m] for m in plan.of_replica(0)]
    [sample] = batch.plan.samples
    assert sample.documents == (20, 20) and sample.length == 40 and sample.targets == 2 * (20 - AROUND + 1)
    assert batch.document_lengths == ((20, 20) if context_size == 1 else (24, 24)) and not batch.bad


def test_an_unreadable_pair_keeps_its_places(tmp_path: Path, tokenizer_folder: str) -> None:
    def line(key: str, text: str) -> dict[str, Any]:
        content = [{"text": text}, {"media": f"{key}.png", "modality": "image"}]
        return {"key": key, "messages": [{"role": "user", "content": content}], "chosen": "one", "rejected": "two"}

    keys = [f"k{n}" for n in range(4)]
    folder = shards_of(
        tmp_path / "s",
        tokenizer_folder,
        [line(k, "what") for k in keys],
        {f"{k}.png": png(n) for n, k in enumerate(keys)},
    )
    config = make_config(folder, tokenizer_folder, tmp_path / "run")
    config.model.global_batch_size, config.data.seq_length = 4, 256
    data = replica_data(config)
    [plan] = data.planner.plan(0).of_replica(0)
    whole = data.reader[plan]
    index = data.planner.indexes[0]
    shard = Path(folder) / index.header.shards[0]
    # The text of one sample, a picture of another.
    damaged = {
        int(index.samples[1]["text_offset"]): plan.samples[[s.sample for s in plan.samples].index(1)].position,
        int(index.media[2]["offset"]): plan.samples[[s.sample for s in plan.samples].index(2)].position,
    }
    data_bytes = bytearray(shard.read_bytes())
    for offset in damaged:
        data_bytes[offset] ^= 1
    shard.write_bytes(bytes(data_bytes))
    batch = replica_data(config).reader[plan]
    assert set(batch.bad) == set(damaged.values())
    assert batch.document_lengths == whole.document_lengths and torch.equal(batch.branch, whole.branch)  # type: ignore[arg-type]
    mine, theirs = batch.media["image"], whole.media["image"]
    assert mine.pieces.shape == theirs.pieces.shape and torch.equal(mine.soft_index, theirs.soft_index)  # type: ignore[arg-type]
    assert len(mine.token_index) == len(theirs.token_index)
    [of_text, _] = damaged.values()
    assert batch.loss_mask[batch.sample_positions == of_text].sum() == 0
    good = ~torch.isin(whole.sample_positions, torch.tensor(list(damaged.values())))
    assert torch.equal(batch.tokens[good], whole.tokens[good])
