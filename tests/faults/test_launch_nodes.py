"""A tiny AnyMAL on two nodes, each with its own launcher, in which ranks and launchers are killed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from engine import train
from launched import assert_same, faults, finish, launch, options, told, wait_for_step, write_config
from ports import free_port
from ranks import run_ranks
from test_sigkill import kill

from megatron_anymal.config.compose import compose

STEPS, EVERY = 14, 4
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(
    mixed_shards: str, text_shards: str, tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    write_config(folder, mixed_shards, text_shards, tokenizer_folder, STEPS, EVERY)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """An undisturbed run of the same layout on one machine."""
    run = folder / "whole"
    run_ranks(4, train, compose("tiny", folder, options(run, 4)).config, timeout=400)
    return run


class Nodes:
    """Two launchers with two ranks each."""

    def __init__(self, folder: Path, run: Path, *overrides: str) -> None:
        self.folder, self.run = folder, run
        # Two replicas of two ranks, as in the run on one machine.
        self.overrides = ("trainer.num_nodes=2", "model.tensor_model_parallel_size=2", *overrides)
        self.port = free_port()
        self.logs = [folder / f"{run.name}_{node}.log" for node in range(2)]
        self.processes = [self.start(node) for node in range(2)]

    def start(self, node: int) -> subprocess.Popen[bytes]:
        more = [f"--node-rank={node}", f"--rdzv-endpoint=127.0.0.1:{self.port}", "--local-addr=127.0.0.1"]
        return launch(
            self.folder, self.run, 2, *self.overrides, log=self.logs[node], node=[*more, "--rdzv-timeout=240"]
        )

    def finish(self) -> None:
        try:
            for process, log in zip(self.processes, self.logs):
                finish(process, log, patience=600)
        finally:
            for process in self.processes:
                kill(process)


def test_ranks_killed_on_either_node(folder: Path, whole: Path) -> None:
    run = folder / "killed"
    nodes = Nodes(folder, run, faults("kill:rank=3,step=6", "exception:rank=0,step=10"))
    nodes.finish()
    assert_same(run, whole)
    assert [(death["rank"], death["step"]) for death in told(run, "death") if "signal" in death] == [(3, 6)]
    assert [event["attempt"] for event in told(run, "start") if event["rank"] < 0] == [1, 2, 3]
    report = (run / "report.md").read_text()
    assert "Attempt 1: rank 3, step 6, death" in report and "Attempt 2: rank 0, step 10, exception" in report


@pytest.mark.parametrize("node", [1, 0])
def test_a_launcher_is_killed_and_started_again(folder: Path, whole: Path, node: int) -> None:
    run = folder / f"lost_{node}"
    nodes = Nodes(folder, run, faults("slow:rank=0,seconds=0.5,every=1"))
    wait_for_step(run, 5, nodes.processes[0])
    kill(nodes.processes[node])
    nodes.processes[node] = nodes.start(node)
    nodes.finish()
    assert_same(run, whole)
    log = nodes.logs[1 - node].read_text()
    assert ("node 0's launcher is gone" in log) == (node == 0)
    assert len([event for event in told(run, "start") if event["rank"] < 0]) == 2
