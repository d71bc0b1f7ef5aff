"""A tiny AnyMAL whose ranks and nodes are lost continues from copies in memory and ends as if left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine import train
from launched import assert_same, faults, finish, launch, options, told, wait_for_step, write_config
from ranks import run_ranks
from test_launch_nodes import Nodes
from test_sigkill import kill

from megatron_anymal.config.compose import compose

STEPS = 12
EVERY_STEP = "resilience.peer_memory_interval=1"


@pytest.fixture(scope="module")
def folder(
    mixed_shards: str, text_shards: str, tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Configuration of a run whose only checkpoint is its last."""
    folder = tmp_path_factory.mktemp("memory")
    write_config(folder, mixed_shards, text_shards, tokenizer_folder, STEPS, 0)
    return folder


def whole(folder: Path, processes: int) -> Path:
    """An undisturbed run."""
    run = folder / f"whole_{processes}"
    if not run.exists():
        run_ranks(processes, train, compose("tiny", folder, options(run, processes)).config, timeout=400)
    return run


def resumed_at(run: Path) -> list[int]:
    events = [event for event in told(run, "resume")]
    assert all(event["text"].startswith("from memory") for event in events), events
    return [event["step"] for event in events]


def test_faults_cost_the_step_in_progress(folder: Path) -> None:
    run, log = folder / "run", folder / "log"
    planned = faults("kill:rank=1,step=4,place=compute", "kill:rank=0,step=7,place=update", "exception:rank=0,step=10")
    finish(launch(folder, run, 2, planned, EVERY_STEP, log=log), log, patience=200)
    assert resumed_at(run) == [3, 6, 9]
    assert_same(run, whole(folder, 2))


def test_a_launcher_that_is_killed_and_started_again_costs_no_checkpoint(folder: Path) -> None:
    run, log = folder / "killed", folder / "killed.log"
    slow = faults("slow:rank=0,seconds=0.3,every=1")
    process = launch(folder, run, 2, slow, EVERY_STEP, log=log)
    wait_for_step(run, 5, process)
    # With all its children.
    kill(process)
    finish(launch(folder, run, 2, slow, EVERY_STEP, log=log), log, patience=200)
    [step] = resumed_at(run)
    assert 4 <= step <= 7
    assert_same(run, whole(folder, 2))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("lost", [0, 1])
def test_ranks_of_either_node_are_killed(folder: Path, lost: int) -> None:
    run = folder / f"ranks_{lost}"
    nodes = Nodes(folder, run, EVERY_STEP, faults(f"kill:rank={2 * lost},step=6"))
    nodes.finish()
    assert resumed_at(run) == [5]
    assert_same(run, whole(folder, 4))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lost_node_is_restored_from_its_neighbour(folder: Path) -> None:
    run = folder / "node"
    nodes = Nodes(folder, run, EVERY_STEP, faults("slow:rank=0,seconds=0.5,every=1"))
    wait_for_step(run, 5, nodes.processes[0])
    # The launcher with all its processes, and so its memory.
    kill(nodes.processes[1])
    nodes.processes[1] = nodes.start(1)
    nodes.finish()
    [step] = resumed_at(run)
    assert 4 <= step <= 8
    assert_same(run, whole(folder, 4))
