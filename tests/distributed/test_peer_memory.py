"""A run that fails continues from copies in memory, bit-identical to a run that was left alone."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import attempt, train
from ranks import run_ranks
from tiny import make_config

from megatron_anymal.config import RunConfig
from megatron_anymal.peer_memory.rank_copies import RankCopies
from megatron_anymal.peer_memory.server import MEMORY, MemoryServer
from megatron_anymal.peer_memory.slots import SlotFile
from megatron_anymal.resilience.events import read
from megatron_anymal.train.peer_copies import PeerCopies

STEPS, FAULT = 6, 5


@pytest.fixture
def config(mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> RunConfig:
    config = make_config(mixed_shards, tokenizer_folder, tmp_path / "run")
    config.trainer.max_steps, config.trainer.devices = STEPS, 2
    # The only checkpoint is the last one.
    config.exp_manager.checkpoint.every_n_train_steps = 0
    config.resilience.peer_memory_interval = 1
    return config


@pytest.fixture
def server() -> Iterator[MemoryServer]:
    server = MemoryServer(2)
    yield server
    server.close()


def interrupted(config: RunConfig, server: MemoryServer) -> dict[str, Any]:
    """Fail in step FAULT, then run to the end."""
    first = copy.deepcopy(config)
    first.resilience.faults = [f"exception:rank=1,step={FAULT}"]
    assert all(str(outcome).startswith("failed") for outcome in run_ranks(2, attempt, first, server.environment()))
    # Faults are part of the configuration, but each happens once in a run.
    return run_ranks(2, attempt, first, server.environment())[0]


def undisturbed(config: RunConfig, tmp_path: Path) -> dict[str, Any]:
    whole = copy.deepcopy(config)
    whole.resilience.faults = []
    whole.exp_manager.explicit_log_dir = str(tmp_path / "whole")
    return run_ranks(2, train, whole)[0]


def resumed_at(config: RunConfig) -> list[tuple[str, int]]:
    return [(event["text"], event["step"]) for event in read(config.run_dir) if event["kind"] == "resume"]


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["losses"] == other["losses"] and len(one["losses"]) == STEPS
    for name, weight in one["weights"].items():
        np.testing.assert_array_equal(weight, other["weights"][name], err_msg=name)


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize(
    ("precision", "distributed", "overlap", "layout"),
    [
        ("32", False, False, "pp"),
        ("32", True, False, "dp"),
        ("bf16", False, False, "tp"),
        ("bf16", True, False, "dp"),
        ("bf16", True, True, "dp"),
    ],
)
def test_every_optimizer_continues_bit_identically(
    config: RunConfig,
    server: MemoryServer,
    tmp_path: Path,
    precision: str,
    distributed: bool,
    overlap: bool,
    layout: str,
    freeze: bool,
) -> None:
    config.trainer.precision, config.model.ddp.use_distributed_optimizer = precision, distributed
    config.model.ddp.overlap_param_gather = config.model.ddp.overlap_grad_reduce = overlap
    config.model.pipeline_model_parallel_size = 2 if layout == "pp" else 1
    config.model.tensor_model_parallel_size = 2 if layout == "tp" else 1
    config.model.language_model.freeze = freeze
    continued = interrupted(config, server)
    assert resumed_at(config) == [("from memory, at step 4", 4)]
    assert_same(continued, undisturbed(config, tmp_path))


def test_ranks_that_change_places_find_their_copies(config: RunConfig, tmp_path: Path) -> None:
    # On the first stage everything trains, on the second one nothing does.
    config.model.pipeline_model_parallel_size = 2
    config.resilience.faults = [f"exception:rank=1,step={FAULT}"]
    server = MemoryServer(2, "127.0.0.1")

    def elsewhere(config: RunConfig, variables: dict[str, str]) -> Any:
        os.environ["LOCAL_RANK"] = str(1 - int(os.environ["RANK"]))
        return attempt(config, variables)

    run_ranks(2, attempt, config, server.environment())
    continued = run_ranks(2, elsewhere, config, server.environment())[0]
    server.close()
    assert resumed_at(config) == [("from memory, at step 4", 4)]
    assert_same(continued, undisturbed(config, tmp_path))


def without_background_work(config: RunConfig, variables: dict[str, str]) -> Any:
    """In a rank: `attempt`, in which each copy is left as by a process that is killed right after it."""
    RankCopies._finish = lambda *_: None  # type: ignore[method-assign]
    return attempt(config, variables)


def test_a_copy_counts_before_its_checksum_is_known(config: RunConfig, server: MemoryServer, tmp_path: Path) -> None:
    config.resilience.faults = [f"exception:rank=1,step={FAULT}"]
    run_ranks(2, without_background_work, config, server.environment())
    continued = run_ranks(2, attempt, config, server.environment())[0]
    assert resumed_at(config) == [("from memory, at step 4", 4)]
    assert_same(continued, undisturbed(config, tmp_path))


def damage(server: MemoryServer, rank: int, step: int) -> None:
    file = SlotFile(json.loads(server.environment()[MEMORY])["files"][rank])
    [slot] = [slot for slot, copy in file.copies().items() if copy.step == step]
    file.data(slot)[0] ^= 1


def test_a_damaged_copy_costs_one_more_step(config: RunConfig, server: MemoryServer, tmp_path: Path) -> None:
    config.resilience.faults = [f"exception:rank=1,step={FAULT}"]
    run_ranks(2, attempt, config, server.environment())
    damage(server, 0, FAULT - 1)
    continued = run_ranks(2, attempt, config, server.environment())[0]
    assert resumed_at(config) == [("from memory, at step 3", 3)]
    assert_same(continued, undisturbed(config, tmp_path))


def test_without_a_common_step_the_checkpoint_counts(config: RunConfig, server: MemoryServer, tmp_path: Path) -> None:
    config.exp_manager.checkpoint.every_n_train_steps = 2
    config.resilience.faults = [f"exception:rank=1,step={FAULT + 1}"]
    run_ranks(2, attempt, config, server.environment())
    for step in (FAULT - 1, FAULT):
        damage(server, 1, step)
    continued = run_ranks(2, attempt, config, server.environment())[0]
    assert resumed_at(config) == [("from step_00000004, at step 4", 4)]
    assert_same(continued, undisturbed(config, tmp_path))


def test_copies_of_another_run_are_not_used(config: RunConfig, server: MemoryServer) -> None:
    config.resilience.faults = [f"exception:rank=1,step={FAULT}"]
    run_ranks(2, attempt, config, server.environment())
    config.resilience.faults, config.model.optim.lr = [], 2 * config.model.optim.lr
    run_ranks(2, attempt, config, server.environment())
    assert resumed_at(config) == []


def test_the_interval_and_the_switch(config: RunConfig, server: MemoryServer) -> None:
    config.resilience.faults = [f"exception:rank=1,step={FAULT}"]
    config.resilience.peer_memory_interval = 3
    run_ranks(2, attempt, config, server.environment())
    run_ranks(2, attempt, config, server.environment())
    assert resumed_at(config) == [("from memory, at step 3", 3)]
    server.clear()
    config.resilience.peer_memory, config.resilience.peer_memory_interval = False, 0
    config.exp_manager.explicit_log_dir = f"{config.run_dir}_off"
    run_ranks(2, attempt, config, server.environment())
    run_ranks(2, attempt, config, server.environment())
    assert resumed_at(config) == []


def checkpoints(config: RunConfig) -> list[str]:
    return sorted(path.name for path in (config.run_dir / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("every", [0, 4])
def test_a_checkpoint_that_was_lost_while_it_was_written_is_made_up(
    config: RunConfig, server: MemoryServer, every: int
) -> None:
    """A copy in memory is complete before the checkpoint of its step."""
    config.exp_manager.checkpoint.every_n_train_steps = every
    config.resilience.faults = [f"exception:rank=1,step={FAULT}"] if every else []
    run_ranks(2, attempt, config, server.environment())
    lost = config.run_dir / "checkpoints" / f"step_{4 if every else STEPS:08d}"
    before = (lost / "manifest.json").read_text()
    shutil.rmtree(lost)
    run_ranks(2, attempt, config, server.environment())
    assert resumed_at(config)[0][0].startswith("from memory")
    assert checkpoints(config) == sorted({lost.name, f"step_{STEPS:08d}"})
    assert json.loads((lost / "manifest.json").read_text())["step"] == json.loads(before)["step"]


def stopped(config: RunConfig, variables: dict[str, str]) -> Any:
    """In a rank: `attempt`, with a SIGTERM to rank 0 between the resume and the first step."""
    resume = PeerCopies.resume

    def then_stop(copies: PeerCopies) -> bool:
        resumed = resume(copies)
        if os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        return resumed

    PeerCopies.resume = then_stop  # type: ignore[method-assign]
    return attempt(config, variables)


def test_a_stop_before_the_first_step_saves_what_memory_holds(config: RunConfig, server: MemoryServer) -> None:
    config.resilience.faults = [f"exception:rank=1,step={FAULT}"]
    run_ranks(2, attempt, config, server.environment())
    assert checkpoints(config) == []
    run_ranks(2, stopped, config, server.environment())
    assert checkpoints(config) == ["step_00000004"]
    server.clear()
    run_ranks(2, attempt, config, server.environment())
    assert resumed_at(config)[-1] == ("from step_00000004, at step 4", 4)
