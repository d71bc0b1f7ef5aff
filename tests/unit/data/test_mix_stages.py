"""The order of a run with stages is that of its definition; each dataset continues where the stage before left it."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from test_planner import MODALITIES, SEQ_LENGTH, AnyTokenizer, by_hand, write_index

from megatron_anymal.config import DatasetConfig, StageConfig
from megatron_anymal.data import mix_stages
from megatron_anymal.data.global_order import GlobalOrder, mix64, permute
from megatron_anymal.data.mix_stages import MixStage, StagedOrder, mean_shares, mean_tokens, plan_stages, stage_lines
from megatron_anymal.data.planner import BatchLayout, BatchPlanner
from megatron_anymal.data.records import DataError

SIZES = (40, 300, 90, 7)
# MIO's, for image-text pairs, text, interleaved documents and speech (Table 2); the borders fall within blocks.
STAGES = [
    MixStage("align", 0, (12.0, 2.0, 0.0, 2.0)),
    MixStage("interleave", 700, (2.0, 2.0, 6.0, 6.0)),
    MixStage("speech", 703, (0.0, 0.1, 0.7, 0.0)),
    MixStage("last", 1300, (1.0, 0.0, 0.0, 0.0)),
]


def one_by_one(sizes: tuple[int, ...], stages: list[MixStage], seed: int, end: int) -> list[tuple[int, int]]:
    """The order as its definition states it: a stage consists of blocks that are shuffled one by one, and each dataset
    is read from front to back in the shuffled order of its epoch."""
    taken, samples = [0] * len(sizes), []
    for number, (stage, stop) in enumerate(zip(stages, [*(later.start for later in stages[1:]), end])):
        weights = [Fraction(weight) for weight in stage.weights]
        bounds = [sum(weights[:d], Fraction(0)) / sum(weights) for d in range(len(weights) + 1)]
        block = max(256, int(2 / (min(w for w in stage.weights if w) / sum(stage.weights))) + 1)
        for at in range(0, stop - stage.start, block):
            before, after = ([round(position * bound) for bound in bounds] for position in (at, at + block))
            shares = [(b - a) - (d - c) for (a, b), (c, d) in zip(pairwise(after), pairwise(before))]
            of_stage = mix64(seed, 3, number) if number else seed
            slots = permute(np.arange(block), block, mix64(of_stage, 1, at // block)).tolist()
            for slot in slots[: stop - stage.start - at]:
                d = next(d for d in range(len(shares)) if slot < sum(shares[: d + 1]))
                epoch, turn = divmod(taken[d], sizes[d])
                taken[d] += 1
                samples.append((d, int(permute(np.array([turn]), sizes[d], mix64(seed, 2, d, epoch))[0])))
    return samples


def as_pairs(samples: tuple[np.ndarray, np.ndarray]) -> list[tuple[int, int]]:
    return list(zip(*(values.tolist() for values in samples)))


def test_the_order_is_that_of_its_definition_from_any_position() -> None:
    expected = one_by_one(SIZES, STAGES, 6, 1900)
    for start, stop in ((0, 1900), (650, 710), (699, 700), (700, 703), (702, 704), (703, 703), (1299, 1900), (5, 9)):
        assert as_pairs(StagedOrder(SIZES, STAGES, 6).samples(start, stop)) == expected[start:stop]


def test_steps_of_any_size_are_the_same_stream() -> None:
    order = StagedOrder(SIZES, STAGES, 2)
    whole = as_pairs(order.samples(0, 1800))
    for size in (1, 36, 100):
        assert [pair for at in range(0, 1800, size) for pair in as_pairs(order.samples(at, at + size))] == whole


def test_a_single_stage_is_the_order_without_a_schedule() -> None:
    plain = GlobalOrder((50, 60), (1.0, 2.5), 3).samples(100, 900)
    staged = StagedOrder((50, 60), [MixStage("only", 0, (1.0, 2.5))], 3).samples(100, 900)
    np.testing.assert_array_equal(plain, staged)


def test_no_sample_repeats_before_its_dataset_is_used_up() -> None:
    dataset, sample = StagedOrder(SIZES, STAGES, 4).samples(0, 1900)
    for number, size in enumerate(SIZES):
        mine = sample[dataset == number]
        assert len(mine) > size or number == 1
        for at in range(0, len(mine), size):
            assert len(set(mine[at : at + size].tolist())) == len(mine[at : at + size])


def test_stages_have_their_shares_and_leave_out_what_has_none() -> None:
    stages = [MixStage("a", 0, (12.0, 2.0, 0.0, 2.0)), MixStage("b", 4096, (2.0, 1.0, 1.0, 12.0))]
    dataset, _ = StagedOrder(SIZES, stages, 1).samples(0, 8192)
    # 4096 positions are 16 blocks of 256, which every share divides.
    assert np.bincount(dataset[:4096], minlength=4).tolist() == [3072, 512, 0, 512]
    assert np.bincount(dataset[4096:], minlength=4).tolist() == [512, 256, 256, 3072]


def test_samples_depend_on_earlier_stages_only() -> None:
    whole = StagedOrder(SIZES, STAGES, 5).samples(0, 700)
    for later in ([], [MixStage("other", 700, (0.0, 0.0, 0.0, 1.0))], [MixStage("later", 900, (1.0, 1.0, 1.0, 1.0))]):
        np.testing.assert_array_equal(StagedOrder(SIZES, [STAGES[0], *later], 5).samples(0, 700), whole)


def test_stages_are_shuffled_differently() -> None:
    same = (1.0, 1.0)
    dataset, _ = StagedOrder((500, 500), [MixStage("a", 0, same), MixStage("b", 256, same)], 1).samples(0, 512)
    assert 80 < (dataset[:256] == dataset[256:]).sum() < 176


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DatasetConfig]:
    """Two datasets; the second one's samples are three times as long in text."""
    root = tmp_path_factory.mktemp("mix")
    long = write_index(root / "long")
    samples = np.load(long / "index" / "samples.npy")
    samples["tokens"] *= 3
    np.save(long / "index" / "samples.npy", samples)
    return {"short": DatasetConfig(str(write_index(root / "short"))), "long": DatasetConfig(str(long))}


def planner(datasets: dict[str, DatasetConfig], schedule: list[StageConfig], **layout: Any) -> BatchPlanner:
    sizes = {"data_parallel_size": 2, "micro_batch_size": 1, "seq_length": SEQ_LENGTH, **layout}
    tokenizer: Any = AnyTokenizer()
    return BatchPlanner(
        datasets,
        MODALITIES,
        tokenizer,
        BatchLayout(**sizes),
        global_batch_size=200,
        seed=1,
        too_long="drop",
        check_shards=False,
        schedule=schedule,
    )


def test_shares_of_tokens_hold_over_whole_epochs(folders: dict[str, DatasetConfig]) -> None:
    run = planner(folders, [StageConfig(weights={"short": 1, "long": 3}, by="token")])
    # Means by hand: samples that are longer than a pack are not trained on, and count as nothing.
    means = []
    for index in run.indexes:
        lengths = [by_hand(index, row)[0] for row in range(len(index))]
        means.append(np.mean([sum(length) if sum(length) <= SEQ_LENGTH else 0 for length in lengths]))
    assert run.stages[0].weights == pytest.approx((1 / means[0], 3 / means[1]))
    tokens = np.zeros(2)
    for step in range(60):
        plan = run.plan(step)
        used = plan.documents.sum(axis=1) * ~np.isin(np.arange(200), plan.dropped)
        tokens += np.bincount(plan.dataset, used, minlength=2)
    assert tokens[1] / tokens.sum() == pytest.approx(0.75, abs=0.01)
    # The shares of samples differ from these.
    assert run.stages[0].weights[1] / sum(run.stages[0].weights) < 0.73


def test_means_of_large_datasets_come_from_a_random_choice(
    folders: dict[str, DatasetConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = planner(folders, [])
    index = run.indexes[0]
    whole = mean_tokens(lambda rows: run.measure(index, rows), len(index), SEQ_LENGTH)
    monkeypatch.setattr(mix_stages, "_MEASURED", 1000)
    asked: list[np.ndarray] = []

    def measure(rows: np.ndarray) -> Any:
        asked.append(rows)
        return run.measure(index, rows)

    assert mean_tokens(measure, len(index), SEQ_LENGTH) == pytest.approx(whole, rel=0.05)
    assert len(set(asked[0].tolist())) == 1000 and asked[0].max() > 2900


def test_steps_are_those_of_their_stage_under_every_layout(folders: dict[str, DatasetConfig]) -> None:
    schedule = [
        StageConfig("a", 3, {"short": 1, "long": 0}),
        StageConfig("b", 2, {"long": 1}, "token"),
        StageConfig("c", 0, {"short": 1, "long": 1}),
    ]
    run = planner(folders, schedule)
    assert [run.stage_of(step) for step in range(7)] == [0, 0, 0, 1, 1, 2, 2]
    assert [run.steps_of(stage, 9) for stage in range(3)] == [range(3), range(3, 5), range(5, 9)]
    wide = planner(folders, schedule, data_parallel_size=4, document_multiple=4, length_multiple=8)
    for step, used in ((0, {0}), (2, {0}), (3, {1}), (4, {1}), (5, {0, 1})):
        plan = run.plan(step)
        assert set(plan.dataset.tolist()) == used
        np.testing.assert_array_equal(wide.plan(step).dataset, plan.dataset)
        np.testing.assert_array_equal(wide.plan(step).sample, plan.sample)


def test_the_fingerprint_knows_all_stages_but_not_where_the_run_ends(folders: dict[str, DatasetConfig]) -> None:
    def fingerprint(*stages: StageConfig) -> str:
        return planner(folders, list(stages)).fingerprint()

    first, second = StageConfig("a", 3, {"short": 1}), StageConfig("b", 2, {"long": 1, "short": 1})
    assert fingerprint(first, second) == fingerprint(first, StageConfig("renamed", 5, second.weights))
    others = [
        fingerprint(first, StageConfig("b", 2, {"long": 2, "short": 1})),
        fingerprint(StageConfig("a", 4, {"short": 1}), second),
        fingerprint(first, second, first),
        fingerprint(first),
    ]
    assert len({fingerprint(first, second), *others}) == 5
    assert fingerprint(StageConfig("a", 3, {"short": 1, "long": 1})) == fingerprint()


def test_what_cannot_be_mixed_by_tokens_is_named(folders: dict[str, DatasetConfig]) -> None:
    def planned(*tokens: float) -> tuple[MixStage, ...]:
        stages = [StageConfig(weights={"short": 1}), StageConfig(weights={"short": 1, "long": 1}, by="token")]
        return plan_stages(folders, stages, 8, tokens.__getitem__)

    with pytest.raises(DataError, match=r"data.schedule\[1\].by=token: no sample of data.train.long is within"):
        planned(5, 0)
    with pytest.raises(DataError, match=r"data.schedule\[1\].weights: data.train.long would be less than 1e-05"):
        planned(1, 200_000)
    assert planned(2, 4)[1].weights == (0.5, 0.25)


def test_a_types_weight_is_divided_by_its_datasets_weights() -> None:
    datasets = {
        "cc3m": DatasetConfig("a", 3, "pairs"),
        "laion": DatasetConfig("b", 9, "pairs"),
        "text": DatasetConfig("c"),
    }
    stage = StageConfig(weights={"pairs": 12, "text": 4})
    assert stage.weights_of(datasets) == {"cc3m": 3, "laion": 9, "text": 4}
    assert StageConfig(weights={"laion": 1}).weights_of(datasets) == {"cc3m": 0, "laion": 1, "text": 0}


def test_stages_in_words() -> None:
    datasets = {"pictures": DatasetConfig("a"), "text": DatasetConfig("b")}
    schedule = [StageConfig("align", 1000, {"pictures": 3, "text": 1}, "token"), StageConfig(weights={"text": 1})]
    planned = [MixStage("align", 0, (1, 1)), MixStage("2", 8000, (0, 1))]
    assert stage_lines(datasets, schedule, 2500, planned) == [
        "stage 1 of 2, align: steps 1 to 1,000, pictures 75.00%, text 25.00% of the tokens (pictures 50.00%, text "
        "50.00% of the samples)",
        "stage 2 of 2: steps 1,001 to 2,500, text 100.00% of the samples",
    ]
    assert mean_shares(planned, 20_000) == pytest.approx([0.2, 0.8])
