"""Encoding on all pipeline stages gives, bit for bit, the losses and gradients of encoding on the first one."""

from __future__ import annotations

import copy
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import train
from parity.data import make_parity_shards, parity_config
from parity.layouts import Layout
from parity.runs import configured, whole_gradients
from ranks import run_ranks

from megatron_anymal.config import DatasetConfig, RunConfig

STEPS = 4
LAYOUTS = (
    Layout(pipeline=2),
    Layout(pipeline=4),
    Layout(pipeline=2, virtual=2),
    Layout(pipeline=2, tensor=2, sequence=True),
    Layout(pipeline=2, data=2, overlap=True, trains="full"),
    Layout(pipeline=2, context=2, packs=2),
    Layout(pipeline=2, uneven=True, trains="lora", noise="all", recompute="full"),
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> str:
    return make_parity_shards(tmp_path_factory.mktemp("placement") / "shards", tokenizer_folder, "pretrain", "mixed")


@pytest.fixture
def config(shards: str, tokenizer_folder: str, tmp_path: Path) -> RunConfig:
    config = parity_config(shards, tokenizer_folder, "pretrain", "mixed")
    config.exp_manager.explicit_log_dir = str(tmp_path / "run")
    config.exp_manager.checkpoint.every_n_train_steps = 0
    config.trainer.max_steps = STEPS
    for modality in config.model.modalities.values():
        modality.encoder.freeze = True
    return config


def placed(config: RunConfig, placement: str, run: Path | None = None) -> RunConfig:
    config = copy.deepcopy(config)
    config.model.encoder_placement = placement
    if run is not None:
        config.exp_manager.explicit_log_dir = str(run)
    return config


def stepped(config: RunConfig, before: Callable[[], None] | None = None) -> dict[str, Any]:
    """In a rank: some steps, with the gradients of each, and the pieces that this rank encodes and decodes."""
    from megatron_anymal.data.loader import steps
    from megatron_anymal.parallel import initialize
    from megatron_anymal.train.build import build
    from megatron_anymal.train.stage_encoding import with_coming
    from megatron_anymal.train.step import train_step

    if before is not None:
        before()
    state = build(config, initialize(config))
    encoded: dict[str, int] = {}

    def count(name: str) -> Any:
        return lambda module, given: encoded.update({name: encoded.get(name, 0) + len(given[0])})

    encoding = state.stage_encoding
    for name, encoder in (encoding.encoders if encoding else dict(state.models[0].encoders)).items():
        encoder.register_forward_pre_hook(count(name))
    gradients: list[Any] = []
    update: Any = state.optimizer.step
    state.optimizer.step = lambda: (gradients.append(whole_gradients(state)), update())[1]  # type: ignore
    data, losses, decoded = state.train_data, [], 0
    planned = steps(
        data.planner, data.reader, replica=state.layout.data_rank, start=0, stop=STEPS, num_workers=0, prefetch_steps=1
    )
    for plan, batches, coming in with_coming(planned, ahead=encoding is not None):
        decoded += sum(len(media.pieces) for batch in batches for media in batch.media.values())
        losses.append(train_step(state, plan, batches, coming).loss)
    return {"losses": losses, "gradients": gradients, "encoded": encoded, "decoded": decoded}


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["losses"] == other["losses"] and len(one["losses"]) == STEPS
    for mine, theirs in zip(one["gradients"], other["gradients"], strict=True):
        assert mine.keys() == theirs.keys() and len(mine) > 4
        for name, gradient in mine.items():
            np.testing.assert_array_equal(gradient, theirs[name], err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_the_same_bits_under_every_layout(layout: Layout, config: RunConfig) -> None:
    config = configured(config, layout)
    first = run_ranks(layout.processes, stepped, placed(config, "first_stage"))
    spread = run_ranks(layout.processes, stepped, placed(config, "all_stages"))
    same(first[0], spread[0])
    # Later stages encode most, and each piece is decoded and encoded once in the job.
    stages = [rank // (layout.processes // layout.pipeline) for rank in range(layout.processes)]
    assert all(rank["encoded"] == {} for rank, stage in zip(first, stages) if stage)
    for name in first[0]["encoded"]:
        totals = [sum(rank["encoded"].get(name, 0) for rank in ranks) for ranks in (first, spread)]
        assert totals[0] == totals[1] > 0, name
    assert sum(rank["decoded"] for rank in first) == sum(rank["decoded"] for rank in spread)
    images = [sum(r["encoded"].get("image", 0) for r, at in zip(spread, stages) if at == s) for s in set(stages)]
    assert sum(images[1:]) > images[0]


def _other_micro_batch() -> None:
    """The first stage gives features to its micro-batches in the wrong order."""
    from megatron_anymal.train.stage_encoding import StageEncoding

    attach = StageEncoding._attach

    def reversed_order(self: Any, received: Any) -> None:
        self._coming = self._coming[::-1]
        attach(self, received)
        self._coming = self._coming[::-1]

    StageEncoding._attach = reversed_order  # type: ignore[method-assign]


def _earlier_step() -> None:
    """The first stage uses a step's features in the next one, too."""
    from megatron_anymal.train.stage_encoding import StageEncoding

    attach, kept = StageEncoding._attach, {}

    def stale(self: Any, received: Any) -> None:
        fresh = {key: tensor.clone() for key, tensor in received.items()}
        for key, tensor in received.items():
            rows = min(len(tensor), len(kept.get(key, ())))
            if rows:
                tensor[:rows] = kept[key][:rows]
        kept.update(fresh)
        attach(self, received)

    StageEncoding._attach = stale  # type: ignore[method-assign]


@pytest.mark.parametrize("bug", [_other_micro_batch, _earlier_step], ids=lambda bug: bug.__name__.strip("_"))
def test_a_planted_bug_is_caught(bug: Callable[[], None], config: RunConfig) -> None:
    config = configured(config, Layout(pipeline=2))
    right = run_ranks(2, stepped, placed(config, "all_stages"))[0]
    wrong = run_ranks(2, stepped, placed(config, "all_stages"), bug)[0]
    differences = [abs(a - b) / abs(a) for a, b in zip(right["losses"], wrong["losses"])]
    assert max(differences) > 1e-4
    with pytest.raises(AssertionError):
        same(right, wrong)


def alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["losses"] == other["losses"] and one["losses"]
    for name, weight in one["weights"].items():
        np.testing.assert_array_equal(weight, other["weights"][name], err_msg=name)


def validations(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["val_loss"] for row in rows if "val_loss" in row]


def test_whole_runs_with_validations_workers_and_a_resume(config: RunConfig, shards: str, tmp_path: Path) -> None:
    config = configured(config, Layout(pipeline=2))
    config.data.validation = {"mix": DatasetConfig(path=shards)}
    config.trainer.val_check_interval, config.trainer.limit_val_batches = 1, 2
    config.data.num_workers, config.exp_manager.checkpoint.every_n_train_steps = 1, 2
    config.exp_manager.checkpoint.keep_last = 0
    first = run_ranks(2, train, placed(config, "first_stage", tmp_path / "first"))[0]
    spread = run_ranks(2, train, placed(config, "all_stages", tmp_path / "spread"))[0]
    alike(first, spread)
    assert validations(tmp_path / "first") == validations(tmp_path / "spread")
    # The first steps of a start are encoded when they begin.
    shutil.rmtree(next((tmp_path / "spread" / "checkpoints").glob("step_*4")))
    alike(first, run_ranks(2, train, placed(config, "all_stages", tmp_path / "spread"))[0])


def test_encoders_of_another_run_reach_every_stage(config: RunConfig, tmp_path: Path) -> None:
    """The IMU encoder was trained by an earlier run, and is nowhere but in its checkpoint."""
    trained = copy.deepcopy(config)
    trained.model.modalities["imu"].encoder.freeze = False
    trained.exp_manager.explicit_log_dir = str(tmp_path / "trained")
    trained.exp_manager.checkpoint.every_n_train_steps = STEPS
    run_ranks(1, train, trained)
    config = configured(config, Layout(pipeline=2))
    config.model.restore_from_path = str(tmp_path / "trained")
    first = run_ranks(2, train, placed(config, "first_stage", tmp_path / "first"))[0]
    alike(first, run_ranks(2, train, placed(config, "all_stages", tmp_path / "spread"))[0])


def test_policy_and_reference_use_the_same_features(config: RunConfig, tokenizer_folder: str, tmp_path: Path) -> None:
    folder, layout = tmp_path / "turns", Layout(job="sft", trains="lora", pipeline=2)
    sft = configured(config, layout)
    sft.job, sft.data.seq_length, sft.trainer.max_steps = "sft", 64, 2
    sft.data.train["mix"].path = make_parity_shards(folder, tokenizer_folder, "sft", "mixed")
    sft.exp_manager.explicit_log_dir = str(tmp_path / "sft")
    sft.exp_manager.checkpoint.every_n_train_steps = 2
    run_ranks(2, train, sft)
    dpo = configured(config, Layout(job="dpo", trains="lora", pipeline=2, reference="recomputed"))
    dpo.job, dpo.data.seq_length, dpo.model.restore_from_path = "dpo", 128, str(tmp_path / "sft")
    dpo.data.train["mix"].path = make_parity_shards(tmp_path / "pairs", tokenizer_folder, "dpo", "mixed")
    first = run_ranks(2, counted, placed(dpo, "first_stage", tmp_path / "first"))
    spread = run_ranks(2, counted, placed(dpo, "all_stages", tmp_path / "spread"))
    alike(first[0], spread[0])
    # The second stage encodes for both passes at once.
    assert spread[1]["images"] > 0 and spread[1]["images"] + spread[0]["images"] / 2 == first[0]["images"] / 2


def counted(config: RunConfig) -> dict[str, Any]:
    """In a rank: train, and count the images that it encodes."""
    from megatron_anymal.model.encoders.vision import CLIPEncoder

    forward, images = CLIPEncoder.forward, []
    CLIPEncoder.forward = lambda self, pieces: (images.append(len(pieces)), forward(self, pieces))[1]  # type: ignore
    return {**train(config), "images": sum(images)}


def test_a_feature_cache_is_filled_and_read_by_all_stages(config: RunConfig, tmp_path: Path) -> None:
    config = configured(config, Layout(pipeline=2))
    config.data.feature_cache.gib, config.data.feature_cache.folder = 0.01, str(tmp_path / "cache")
    config.trainer.max_steps = 8
    cold = run_ranks(2, counted, placed(config, "all_stages", tmp_path / "cold"))
    warm = run_ranks(2, counted, placed(config, "all_stages", tmp_path / "warm"))
    first = run_ranks(2, counted, placed(config, "first_stage", tmp_path / "first"))
    alike(cold[0], warm[0])
    alike(first[0], warm[0])
    # One further image compares the encoder with the cache.
    assert cold[1]["images"] > 4 and [rank["images"] for rank in warm] == [1, 1]


def damaged(config: RunConfig) -> dict[str, Any]:
    """In a rank: train while a third of the images cannot be decoded."""
    from megatron_anymal.modalities.base import MediaError
    from megatron_anymal.modalities.image import ImageModality

    decode = ImageModality.decode_with_size

    def failing(self: Any, data: bytes, *more: Any) -> Any:
        if zlib.crc32(data) % 3 == 0:
            raise MediaError("is damaged")
        return decode(self, data, *more)

    ImageModality.decode_with_size = failing  # type: ignore[method-assign]
    return train(config)


def test_unreadable_samples_are_skipped_alike(config: RunConfig, tmp_path: Path) -> None:
    """A sample that a later stage cannot read is left out of the loss of the last one."""
    config = configured(config, Layout(pipeline=4))
    config.data.max_bad_share = 1.0
    first = run_ranks(4, damaged, placed(config, "first_stage", tmp_path / "first"))[0]
    spread = run_ranks(4, damaged, placed(config, "all_stages", tmp_path / "spread"))[0]
    alike(first, spread)
    ledgers = [(tmp_path / name / "skipped_samples.jsonl").read_text().splitlines() for name in ("first", "spread")]
    assert ledgers[0] == ledgers[1] and len(ledgers[0]) > 1
