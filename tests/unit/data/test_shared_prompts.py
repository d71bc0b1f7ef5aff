"""Preference pairs whose packs hold the prompt once: lengths, packs and tensors against those of whole documents."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from manifests import shards_of
from replicas import replica_data
from tiny import SPECIAL, make_config, make_conversations

from megatron_anymal import backend
from megatron_anymal.checkpoint.compatibility import _is_harmless
from megatron_anymal.config import ConfigError, RunConfig
from megatron_anymal.data.context_parallel import held_tokens, padded
from megatron_anymal.data.micro_batch import MicroBatch
from megatron_anymal.data.records import DataError, PackedPrompt, PlannedMicroBatch, PlannedSample
from megatron_anymal.data.shared_prompts import introduction, shares_prompts, token_lengths, token_positions
from megatron_anymal.planning.layouts.workload import measured_workload
from megatron_anymal.train.build import DataSource


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> str:
    kinds = ("image", "audio", "imu", "text", "mixed")
    return make_conversations(tmp_path_factory.mktemp("pairs") / "s", tokenizer_folder, 20, kinds, pairs=True)


@pytest.fixture
def config(folder: str, tokenizer_folder: str, tmp_path: Path) -> RunConfig:
    config = make_config(folder, tokenizer_folder, tmp_path / "run")
    config.job, config.data.seq_length = "dpo", 192
    return config


def apart(config: RunConfig) -> RunConfig:
    """The same run with whole documents."""
    config = copy.deepcopy(config)
    config.model.dpo.share_prompt = "never"
    return config


def batches_of(data: DataSource, step: int, replicas: int = 1) -> list[MicroBatch]:
    read = [data.reader[plan] for replica in range(replicas) for plan in data.planner.plan(step).of_replica(replica)]
    assert not any(batch.bad for batch in read)
    return read


def rows(batch: MicroBatch, positions: torch.Tensor, index: torch.Tensor) -> list[list[float]]:
    columns = (batch.tokens[0], batch.labels[0], batch.loss_mask[0], positions)
    return torch.stack([column[index].double() for column in columns], dim=1).tolist()


def whole_documents(batches: list[MicroBatch]) -> dict[tuple[int, int], list[list[float]]]:
    """(Sample, 0 or 1) -> token, label, mask and position of each token, with the prompt put before both answers."""
    documents = {}
    for batch in batches:
        positions = token_positions(batch.document_lengths, batch.prompts)
        starts = np.cumsum([0, *batch.document_lengths])
        number = 0
        for sample in batch.plan.samples:
            for answer, length in enumerate(sample.documents):
                span = number + answer + bool(sample.shared)
                index = torch.arange(length - sample.shared) + int(starts[span])
                if sample.shared:
                    first, count = batch.prompts[span]
                    assert (first, count) == (starts[number], sample.shared)
                    index = torch.cat([torch.arange(first, first + count), index])
                assert batch.sample_positions[0, index].eq(sample.position).all()
                assert batch.branch is not None and batch.branch[0, index[sample.shared :]].eq(answer).all()
                documents[sample.position, answer] = rows(batch, positions, index)
            number += len(sample.spans)
    return documents


@pytest.mark.parametrize(("replicas", "context_size"), [(1, 1), (2, 1), (1, 2), (1, 4)])
def test_prompt_and_answer_in_a_row_are_the_whole_document(config: RunConfig, replicas: int, context_size: int) -> None:
    shared = replica_data(config, replicas, context_size=context_size)
    for step in range(2):
        # A reader of one rank reads whole packs.
        plans = [plan for r in range(replicas) for plan in shared.planner.plan(step).of_replica(r)]
        assert all(s.shared for plan in plans for s in plan.samples)
        mine = whole_documents([replica_data(config).reader[plan] for plan in plans])
        assert mine == whole_documents(batches_of(replica_data(apart(config)), step))


def test_soft_tokens_lie_in_the_prompt_once(config: RunConfig) -> None:
    token_count = 0
    for batch in batches_of(replica_data(config), 0):
        for name, media in batch.media.items():
            section = config.model.modalities[name]
            places = (batch.tokens[0] == SPECIAL.index(section.placeholder)).nonzero().flatten()
            assert media.soft_index is None and media.token_index.tolist() == places.tolist()
            assert len(places) == len(media.pieces) * section.projector.num_tokens
            token_count += len(places)
    assert token_count > 10


def test_a_plan_counts_shared_lengths(config: RunConfig) -> None:
    shared, whole = (replica_data(one).planner for one in (config, apart(config)))
    for step in range(2):
        mine, theirs = shared.plan(step), whole.plan(step)
        # The same samples, documents and media at the same positions.
        for name in ("dataset", "sample", "documents", "targets"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
        index = shared.indexes[0]
        _, targets = index.lengths(mine.sample)
        prompts = mine.documents - targets
        np.testing.assert_array_equal(prompts[:, 0], prompts[:, 1])
        # The last token of the prompt is in both answers' spans.
        np.testing.assert_array_equal(mine.length, prompts[:, 0] + targets.sum(axis=1) + 1)
        assert mine.tokens == mine.length.sum() < theirs.tokens == theirs.documents.sum()
        for batch in mine.of_replica(0):
            assert sum(sample.length for sample in batch.samples) <= mine.padded_length <= config.data.seq_length


@pytest.mark.parametrize("context_size", [2, 4])
def test_context_parallel_ranks_hold_shares_of_each_span(config: RunConfig, context_size: int) -> None:
    multiple = 2 * context_size
    ranks = [replica_data(config, context_rank=rank, context_size=context_size) for rank in range(context_size)]
    for plan in ranks[0].planner.plan(0).of_replica(0):
        one = replica_data(config).reader[plan]
        spans = [padded(length, multiple) for sample in plan.samples for length in sample.spans]
        assert list(one.document_lengths)[: len(spans)] == spans
        for rank, data in enumerate(ranks):
            mine, held = data.reader[plan], held_tokens(one.document_lengths, rank, context_size)
            assert mine.prompts == one.prompts
            for name in ("tokens", "labels", "loss_mask", "sample_positions", "branch"):
                torch.testing.assert_close(getattr(mine, name), getattr(one, name)[:, held])
        own = token_lengths(plan)
        for sample, start in zip(
            plan.samples, np.cumsum([0, *(sum(spans[i : i + 3]) for i in range(0, len(spans), 3))])
        ):
            assert own[start] == sample.documents[0] and own[start + spans[0]] >= 0


def pair(tmp_path: Path, tokenizer_folder: str, prompt: int, chosen: int, rejected: int) -> str:
    def words(count: int) -> str:
        return " ".join(["one"] * count)

    line: dict[str, Any] = {"key": "k", "messages": [{"role": "user", "content": words(prompt)}]}
    return shards_of(
        tmp_path / "s", tokenizer_folder, [{**line, "chosen": words(chosen), "rejected": words(rejected)}], {}
    )


# The begin token, the user turn's header and end, the answer's header; the end of an answer.
AROUND, END = 1 + 4 + 3, 1


def test_a_pair_is_too_long_by_the_tokens_that_it_takes(tmp_path: Path, tokenizer_folder: str) -> None:
    config = make_config(pair(tmp_path, tokenizer_folder, 30, 5, 8), tokenizer_folder, tmp_path / "run")
    config.job, config.model.global_batch_size = "dpo", 1
    takes = AROUND + 30 + (5 + END) + (8 + END) + 1
    [plan] = replica_data(config).planner.plan(0).of_replica(0)
    assert plan.samples[0].length == takes and sum(plan.samples[0].documents) == takes + AROUND + 30 - 1
    config.data.seq_length = takes
    assert replica_data(config).planner.plan(0).dropped == ()
    with pytest.raises(DataError, match=f"data.seq_length={takes}; the longest is 'mix/k' with {takes + AROUND + 29}"):
        replica_data(apart(config))
    config.data.seq_length = takes - 1
    with pytest.raises(DataError, match=f"with {takes} tokens"):
        replica_data(config)


def test_an_unreadable_pair_keeps_its_span_and_its_media(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    data = replica_data(config)
    [plan, *_] = data.planner.plan(0).of_replica(0)
    whole = data.reader[plan]
    number = next(n for n, sample in enumerate(plan.samples) if sample.media)
    position, read = plan.samples[number].position, data.reader._fill_text

    def fails(batch: MicroBatch, sample: Any, spans: Any) -> Any:
        if sample.position == position:
            raise DataError("damaged")
        return read(batch, sample, spans)

    monkeypatch.setattr(data.reader, "_fill_text", fails)
    damaged = data.reader[plan]
    assert list(damaged.bad) == [position] and damaged.prompts == whole.prompts
    own = whole.sample_positions[0] == position
    assert not damaged.loss_mask[0, own].any() and torch.equal(damaged.tokens[0, ~own], whole.tokens[0, ~own])
    for name, media in whole.media.items():
        assert len(damaged.media[name].token_index) == len(media.token_index)


def test_documents_that_begin_differently_are_refused_by_name(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = replica_data(config)
    document, calls = data.reader._tokenizer.document, [0]

    def split_differently(*given: Any, **more: Any) -> Any:
        laid_out = document(*given, **more)
        calls[0] += 1
        laid_out.tokens[1] += calls[0] % 2
        return laid_out

    monkeypatch.setattr(data.reader._tokenizer, "document", split_differently)
    [plan, *_] = data.planner.plan(0).of_replica(0)
    [reason, *_] = data.reader[plan].bad.values()
    assert reason.startswith("mix/") and reason.endswith("Set model.dpo.share_prompt=never.")


def test_which_runs_share_prompts(config: RunConfig) -> None:
    model = config.model
    assert shares_prompts("dpo", model, "sdpa") and shares_prompts("dpo", model, "flash_attn")
    assert not shares_prompts("sft", model, "sdpa") and introduction("sft", model, "sdpa") == ""
    assert introduction("dpo", model, "sdpa") == "both answers of a pair share its prompt"
    assert "model.transformer_impl=local" in introduction("dpo", model, "transformer_engine")
    for key, value in (("neftune.alpha", 5.0), ("lora.dropout", 0.1)):
        noisy = copy.deepcopy(model)
        section, name = key.split(".")
        setattr(getattr(noisy, section), name, value)
        assert not shares_prompts("dpo", noisy, "flex") and f"model.{section}" in introduction("dpo", noisy, "flex")
        noisy.dpo.share_prompt = "always"
        assert shares_prompts("dpo", noisy, "flex")
    model.dpo.share_prompt = "never"
    assert introduction("dpo", model, "sdpa").endswith("computes its prompt: model.dpo.share_prompt=never")


def test_always_is_refused_with_transformer_engine(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "transformer_impl", lambda model: "transformer_engine")
    backend.check_backend(config.model, "32")
    config.model.dpo.share_prompt = "always"
    with pytest.raises(ConfigError, match=r"model.dpo.share_prompt=always: Transformer Engine's .*share_prompt=auto"):
        backend.check_backend(config.model, "32")


def test_a_resume_may_change_it_unless_it_decides_what_is_dropped(config: RunConfig) -> None:
    key = "model.dpo.share_prompt"
    assert _is_harmless(key, asdict(config))
    refused = [replica_data(one).planner.fingerprint() for one in (config, apart(config))]
    assert refused[0] == refused[1]
    config.data.too_long = "drop"
    assert not _is_harmless(key, asdict(config))
    dropped = [replica_data(one).planner.fingerprint() for one in (config, apart(config))]
    assert dropped[0] != dropped[1] == refused[1]


def test_planned_work_counts_the_prompt_once(config: RunConfig, folder: str) -> None:
    planner = replica_data(config).planner
    kinds = list(planner._by_kind.values())
    shared, whole = (measured_workload([(folder, 1.0)], kinds, 20, 192, shared_prompts=on) for on in (True, False))
    rows = planner.measure(planner.indexes[0], np.arange(20))
    assert shared.tokens == pytest.approx(rows.length.sum()) and whole.tokens == pytest.approx(rows.documents.sum())
    # Query-key pairs of causal attention, counted one query at a time.
    pairs = sum(
        sum(range(1, prompt + 1)) + sum(sum(range(prompt + 1, length + 1)) for length in documents)
        for prompt, documents in zip(rows.shared.tolist(), rows.documents.tolist())
    )
    assert shared.squares == pytest.approx(2 * pairs - shared.tokens)
    assert shared.labels == whole.labels and shared.longest < whole.longest


def test_noise_scales_by_the_length_of_the_whole_document() -> None:
    planned = (PlannedSample(0, 0, 0, (6, 5), 3, (), shared=3), PlannedSample(1, 0, 1, (4,), 2, ()))
    lengths = token_lengths(PlannedMicroBatch(0, 18, planned, document_multiple=4))
    assert lengths.tolist() == [6] * 4 + [6] * 4 + [5] * 4 + [4] * 4 + [0] * 2


def test_positions_go_on_from_the_prompt() -> None:
    positions = token_positions((4, 2, 3, 2), {1: PackedPrompt(0, 3), 2: PackedPrompt(0, 3)})
    assert positions.tolist() == [0, 1, 2, 3, 3, 4, 3, 4, 5, 0, 1]
