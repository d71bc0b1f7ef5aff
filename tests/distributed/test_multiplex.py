"""Alignments in one run and alone: the same losses, rates and weights, under every layout and after a kill."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine import attempt, train
from export_server import run_in_rank
from multiplexed import (
    LENGTH,
    NAMES,
    Trace,
    alone,
    apart,
    make_data,
    make_data_of_one_length,
    multiplexed_config,
    traces,
    trained,
)
from ranks import run_ranks, start_ranks
from safetensors.torch import load_file
from tiny import LLAMA, make_shards

import megatron_anymal.train.alignment_updates as alignment_updates
import megatron_anymal.train.objective as objective
import megatron_anymal.train.step as step
from checkpoint_tools import export_hf
from megatron_anymal.config import ConfigError, DatasetConfig, RunConfig
from megatron_anymal.config.validation import check
from megatron_anymal.data.loader import steps
from megatron_anymal.data.records import DataError
from megatron_anymal.parallel import initialize
from megatron_anymal.peer_memory.server import MemoryServer
from megatron_anymal.train.build import build
from megatron_anymal.train.step import train_step

# Rounding of fp32 sums in another order, after six steps.
TOLERANCE = 1e-6
STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> dict[str, str]:
    return make_data(tmp_path_factory.mktemp("alignments"), tokenizer_folder)


def configuration(data: dict[str, str], tokenizer: str, run_dir: Path, world: int = 1, **model: Any) -> RunConfig:
    """Six steps; two alignments end earlier, and leave their places in the packs."""
    config = multiplexed_config(data, tokenizer, run_dir)
    config.trainer.max_steps, config.trainer.devices = STEPS, world
    config.model.multiplex["audio"].max_steps, config.model.multiplex["imu"].max_steps = 2, 4
    for name, value in model.items():
        section, _, key = name.rpartition(".")
        setattr(getattr(config.model, section) if section else config.model, key, value)
    if config.model.encoder_placement == "all_stages":
        config.model.modalities["imu"].encoder.freeze = True
    check(config)
    return config


@pytest.fixture(scope="module")
def separate(data: dict[str, str], tokenizer_folder: str) -> dict[str, Trace]:
    """The four alignments one after the other, in one process."""
    config = configuration(data, tokenizer_folder, Path("unused"))
    return {name: run_ranks(1, traces, alone(config, name))[0][name] for name in NAMES}


def differences(joint: dict[str, Trace], separate: dict[str, Trace]) -> dict[str, float]:
    assert joint.keys() == separate.keys()
    return {name: apart(joint[name], trace) for name, trace in separate.items()}


@pytest.mark.parametrize(
    ("world", "model"),
    [
        (1, {}),
        (1, {"micro_batch_size": 2, "loss_normalization": "token"}),
        (2, {}),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (2, {"pipeline_model_parallel_size": 2}),
        (2, {"context_parallel_size": 2}),
        (2, {"ddp.overlap_grad_reduce": True, "ddp.overlap_param_gather": True, "ddp.bucket_size": 1000}),
        (2, {"pipeline_model_parallel_size": 2, "encoder_placement": "all_stages"}),
        (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    ],
    ids=["1", "1 with longer packs", "DP2", "TP2", "PP2", "CP2", "DP2 overlapped", "PP2 all stages", "VPP2"],
)
def test_each_alignment_trains_as_it_does_alone(
    data: dict[str, str], tokenizer_folder: str, separate: dict[str, Trace], world: int, model: dict[str, Any]
) -> None:
    config = configuration(data, tokenizer_folder, Path("unused"), world, **model)
    joint = run_ranks(world, traces, config)[0]
    assert {name: len(trace.losses) for name, trace in joint.items()} == {"image": 6, "audio": 2, "video": 6, "imu": 4}
    if world > 1:
        # A layout by itself changes results by rounding.
        separate = {name: run_ranks(world, traces, alone(config, name))[0][name] for name in NAMES}
    worst = differences(joint, separate)
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.slow
def test_over_a_hundred_steps(data: dict[str, str], tokenizer_folder: str) -> None:
    config = multiplexed_config(data, tokenizer_folder, Path("unused"))
    config.trainer.max_steps = 100
    joint = run_ranks(1, traces, config, timeout=600)[0]
    separate = {name: run_ranks(1, traces, alone(config, name), timeout=600)[0][name] for name in NAMES}
    worst = differences(joint, separate)
    assert max(worst.values()) < TOLERANCE, worst


@pytest.fixture(scope="module")
def equal_lengths(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> dict[str, str]:
    """Samples of 14 tokens: a pack holds one."""
    folder = tmp_path_factory.mktemp("equal")
    return {name: make_data_of_one_length(folder / name, tokenizer_folder, name) for name in NAMES}


@pytest.mark.parametrize("normalization", ["token", "sample"])
def test_bit_by_bit_if_packs_hold_one_alignment_each(
    equal_lengths: dict[str, str], tokenizer_folder: str, normalization: str
) -> None:
    config = configuration(equal_lengths, tokenizer_folder, Path("unused"), loss_normalization=normalization)
    config.data.seq_length = LENGTH
    joint = run_ranks(1, traces, config)[0]
    for name in NAMES:
        trace = run_ranks(1, traces, alone(config, name))[0][name]
        assert (joint[name].losses, joint[name].norms) == (trace.losses, trace.norms)
        for key, weight in trace.weights.items():
            np.testing.assert_array_equal(joint[name].weights[key], weight)


def kill_at(config: RunConfig, step: int) -> None:
    """Train until the first rank is killed in a step, counted from 1."""
    killed = copy.deepcopy(config)
    killed.resilience.faults = [f"kill:rank=0,step={step}"]
    processes, _ = start_ranks(config.world_size, train, (killed,))
    processes[0].join(240)
    assert processes[0].exitcode == -signal.SIGKILL
    for process in processes[1:]:
        process.kill()
        process.join()


# Audio has ended after two steps and IMU after four: the checkpoints are from before, between and after.
@pytest.mark.parametrize(
    ("world", "model", "killed"),
    [
        (1, {}, [2, 4, 6]),
        (1, {"precision": "bf16"}, [4]),
        (1, {"precision": "bf16", "ddp.use_distributed_optimizer": False}, [4]),
        (2, {}, [4]),
        (2, {"ddp.use_distributed_optimizer": False}, [4]),
        (2, {"tensor_model_parallel_size": 2}, [4]),
        (2, {"pipeline_model_parallel_size": 2}, [4]),
        (2, {"context_parallel_size": 2}, [4]),
    ],
    ids=["1", "bf16", "bf16 without sharding", "DP2", "DP2 without sharding", "TP2", "PP2", "CP2"],
)
def test_a_killed_run_continues_bit_by_bit(
    data: dict[str, str], tokenizer_folder: str, tmp_path: Path, world: int, model: dict[str, Any], killed: list[int]
) -> None:
    settings = {name: value for name, value in model.items() if name != "precision"}
    config = configuration(data, tokenizer_folder, tmp_path / "whole", world, **settings)
    config.trainer.precision = model.get("precision", "32")
    config.exp_manager.checkpoint.every_n_train_steps, config.exp_manager.checkpoint.async_save = 1, False
    whole = run_ranks(world, train, config)[0]
    for number in killed:
        config.exp_manager.explicit_log_dir = str(tmp_path / str(number))
        kill_at(config, number)
        resumed = run_ranks(world, train, config)[0]
        assert resumed["losses"] == whole["losses"]
        assert steps_of(tmp_path / str(number)) == steps_of(tmp_path / "whole")
        for name, weight in whole["weights"].items():
            np.testing.assert_array_equal(resumed["weights"][name], weight)


# Differ between runs: times and memory.
MEASURED = ("second", "tflops", "memory", "growth", "wait", "passes", "share")


def steps_of(run_dir: Path) -> list[dict[str, float]]:
    """A run's metrics, without those that depend on timing."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not any(m in name for m in MEASURED)} for row in rows]


def test_a_run_continues_from_copies_in_memory_bit_by_bit(
    data: dict[str, str], tokenizer_folder: str, tmp_path: Path
) -> None:
    config = configuration(data, tokenizer_folder, tmp_path / "whole", 2)
    # The only checkpoint is the last one.
    config.exp_manager.checkpoint.every_n_train_steps, config.resilience.peer_memory_interval = 0, 1
    whole = run_ranks(2, train, config)[0]
    config.exp_manager.explicit_log_dir = str(tmp_path / "run")
    # One alignment has ended, and one ends with the step before.
    config.resilience.faults = ["exception:rank=1,step=5"]
    server = MemoryServer(2)
    try:
        assert all(str(outcome).startswith("failed") for outcome in run_ranks(2, attempt, config, server.environment()))
        resumed = run_ranks(2, attempt, config, server.environment())[0]
    finally:
        server.close()
    assert (tmp_path / "run" / "events.jsonl").read_text().count("from memory, at step 4") == 1
    assert resumed["losses"] == whole["losses"]
    for name, weight in whole["weights"].items():
        np.testing.assert_array_equal(resumed["weights"][name], weight)


def test_cached_features_change_nothing(data: dict[str, str], tokenizer_folder: str, tmp_path: Path) -> None:
    config = configuration(data, tokenizer_folder, tmp_path / "plain")
    for modality in config.model.modalities.values():
        modality.encoder.freeze, modality.encoder.max_pieces_per_call = True, 1
    plain = run_ranks(1, train, config)[0]
    config.exp_manager.explicit_log_dir = str(tmp_path / "cached")
    config.data.feature_cache.gib, config.data.feature_cache.folder = 1.0, str(tmp_path / "features")
    check(config)
    cached = run_ranks(1, train, config)[0]
    assert cached["losses"] == plain["losses"]
    for name, weight in plain["weights"].items():
        np.testing.assert_array_equal(cached["weights"][name], weight)


def _rate_of_another() -> None:
    def rotated(optimizer: Any, alignments: Any, max_steps: int, step: int) -> dict[str, float]:
        rates = set_rates(optimizer, alignments, max_steps, step)
        groups = optimizer.param_groups
        alignment_rates = {group["alignment"]: group["lr"] for group in groups}
        for group in groups:
            group["lr"] = alignment_rates[(group["alignment"] + 1) % len(alignment_rates)]
        return rates

    set_rates, step.set_alignment_rates = step.set_alignment_rates, rotated


def _one_denominator() -> None:
    objective.sum_of_means = lambda losses, mask, groups, counts: objective.batch_mean(losses, mask, int(counts.sum()))


def _clipped_together() -> None:
    def whole(optimizer: Any, numbers: Any) -> Any:
        return contextlib.nullcontext()

    alignment_updates._only = whole


def _denominator_of_a_rank() -> None:
    def own(losses: Any, mask: Any, groups: Any, counts: Any) -> Any:
        present = torch.zeros_like(counts).index_add(0, groups.clamp(min=0).flatten(), mask.long().flatten())
        return right(losses, mask, groups, present)

    right, objective.sum_of_means = objective.sum_of_means, own


def _moments_of_ended_alignments_decay() -> None:
    """An alignment that has ended is updated with a gradient of zero."""
    alignment_updates.running = lambda alignments, step: list(alignments)
    step.update_alignments = lambda optimizer, alignments, chosen: update(optimizer, alignments, list(alignments))


update = step.update_alignments


@pytest.mark.parametrize(
    "plant",
    [
        _rate_of_another,
        _one_denominator,
        _clipped_together,
        _denominator_of_a_rank,
        _moments_of_ended_alignments_decay,
    ],
)
def test_planted_bugs_are_found(
    data: dict[str, str], tokenizer_folder: str, separate: dict[str, Trace], plant: Callable[[], None]
) -> None:
    config = configuration(data, tokenizer_folder, Path("unused"))
    joint = run_ranks(1, traces, config, plant)[0]
    worst = differences(joint, separate)
    assert max(worst.values()) > 10 * TOLERANCE, worst


def test_only_the_alignment_whose_gradient_is_not_finite_is_left_out(
    equal_lengths: dict[str, str], tokenizer_folder: str
) -> None:
    """Packs hold one alignment each, so that the others do not see the non-finite values."""
    config = configuration(equal_lengths, tokenizer_folder, Path("unused"))
    config.data.seq_length, config.trainer.max_steps = LENGTH, 2
    config.model.multiplex["audio"].max_steps = config.model.multiplex["imu"].max_steps = 0
    results, start, end = run_ranks(1, with_a_weight_of_infinity, config, "projectors.audio.")[0]
    assert [result.skipped_alignments for result in results] == [("audio",)] * 2
    assert all(result.skipped and math.isinf(result.grad_norms["audio"]) for result in results)
    same = {name for name in start if np.array_equal(start[name], end[name], equal_nan=True)}
    assert {name for name in same if name.startswith("projectors.")} == {
        name for name in start if name.startswith("projectors.audio.")
    }


def with_a_weight_of_infinity(config: RunConfig, prefix: str) -> Any:
    state = build(config, initialize(config))
    parameters = {name: p for name, p in state.models[0].named_parameters() if name.startswith(prefix)}
    with torch.no_grad():
        next(iter(parameters.values())).fill_(math.inf)
    state.optimizer.reload_model_params()
    start, results, data = trained(state), [], state.train_data
    for plan, batches in steps(
        data.planner, data.reader, replica=0, start=0, stop=config.trainer.max_steps, num_workers=0, prefetch_steps=1
    ):
        results.append(train_step(state, plan, batches))
    return results, start, trained(state)


def test_the_log_names_each_alignment(
    data: dict[str, str], tokenizer_folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = configuration(data, tokenizer_folder, tmp_path / "run")
    config.data.validation = {"imu_text": DatasetConfig(data["imu"]), "audio_text": DatasetConfig(data["audio"])}
    config.trainer.val_check_interval, config.trainer.limit_val_batches = 3, 2
    check(config)
    run_ranks(1, train, config)
    rows = [row for row in steps_of(tmp_path / "run") if "loss" in row]
    assert [sorted(name for name in row if name.startswith("lr")) for row in rows[1:5]] == [
        ["lr/audio", "lr/image", "lr/imu", "lr/video"],
        *[["lr/image", "lr/imu", "lr/video"]] * 2,
        ["lr/image", "lr/video"],
    ]
    assert [row["consumed_samples"] for row in rows] == [27, 54, 80, 106, 130, 154]
    assert "grad norm [image " in capfd.readouterr().out
    # Alone, each has the same validation.
    validations = [row for row in steps_of(tmp_path / "run") if "val_loss" in row]
    separate = alone(config, "imu")
    separate.exp_manager.explicit_log_dir = str(tmp_path / "imu")
    run_ranks(1, train, separate)
    theirs = [row for row in steps_of(tmp_path / "imu") if "val_loss" in row]
    assert theirs[0]["val_loss"] == pytest.approx(validations[0]["val_loss/imu"], rel=TOLERANCE)


def test_a_changed_alignment_is_refused_at_a_resume(
    data: dict[str, str], tokenizer_folder: str, tmp_path: Path
) -> None:
    config = configuration(data, tokenizer_folder, tmp_path)
    config.exp_manager.checkpoint.every_n_train_steps = 0
    run_ranks(1, train, config)
    changes: list[tuple[Callable[[RunConfig], Any], str]] = [
        (lambda c: setattr(c.model.multiplex["imu"].optim, "lr", 1.0), r"model.multiplex.imu.optim.lr 0.004 -> 1.0"),
        (lambda c: setattr(c.model.multiplex["imu"], "max_steps", 5), r"model.multiplex.imu.max_steps 4 -> 5"),
        (lambda c: setattr(c.model.multiplex["imu"], "global_batch_size", 3), r"data \(its shards, weights"),
        # Those of the image and the video end with the run, and the rate of the video is constant.
        (
            lambda c: setattr(c.trainer, "max_steps", 9),
            r"9 instead of 6 \(model.multiplex.image.optim.sched.decay_steps, or trainer.max_steps if that is 0\): "
            r"[^;]*to keep it\. ",
        ),
    ]
    for change, message in changes:
        other = copy.deepcopy(config)
        change(other)
        run_ranks(1, refused, other, ConfigError, message)


def refused(config: RunConfig, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        train(config)


def test_a_checkpoint_exports_as_any_other(
    data: dict[str, str], tokenizer_folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = configuration(data, tokenizer_folder, tmp_path / "run")
    # The head of an export has a row for each id of the tokenizer.
    config.model.language_model.config["vocab_size"] = LLAMA["vocab_size"]
    run_ranks(1, train, config)
    # The export is compared with the trainer's model before it is published.
    assert run_in_rank(export_hf.main, ["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {name.split(".")[1] for name in saved if name.startswith("projectors.")} == set(NAMES)


def test_media_of_another_alignment_are_refused(data: dict[str, str], tokenizer_folder: str, tmp_path: Path) -> None:
    config = configuration(data, tokenizer_folder, tmp_path / "run")
    config.data.train["image_text"].path = make_shards(tmp_path / "mixed", tokenizer_folder, 12, ("image", "audio"))
    message = r"data.train.image_text.path: .*contains audio, but model.multiplex.image trains on media of 'image' only"
    run_ranks(1, refused, config, DataError, message)


def test_too_many_bad_samples_of_one_alignment_stop_the_run(
    data: dict[str, str], tokenizer_folder: str, tmp_path: Path
) -> None:
    """One of two IMU signals, but one of 27 samples."""
    config = configuration(data, tokenizer_folder, tmp_path / "run")
    folder = shutil.copytree(data["imu"], tmp_path / "imu")
    for shard in folder.glob("*.tar"):
        content = shard.read_bytes()
        shard.write_bytes(content.replace(b"\x93NUMPY", b"\x93NOTNP"))
    config.data.train["imu_text"].path = str(folder)
    config.data.max_bad_share = 0.2
    run_ranks(1, refused, config, DataError, r"step 1: 2 of 2 samples cannot be read")
