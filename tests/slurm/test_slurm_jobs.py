"""The scripts in slurm/, with a tiny run on two nodes of a Slurm cluster on loopback."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from engine import train
from loopback import Cluster, missing
from ranks import run_ranks
from tiny import make_config, make_conversations

from megatron_anymal.config import LoraConfig
from megatron_anymal.config.compose import compose
from megatron_anymal.resilience.events import read
from megatron_anymal.train.memory_metrics import MEMORY_METRICS
from megatron_anymal.train.pass_times import PASS_METRICS
from megatron_anymal.train.utilization import UTILIZATION_METRICS

ROOT = Path(__file__).parents[2]
SCRIPT = "pretrain_70b.sh"
STEPS, EVERY = 40, 10
# Makes steps long enough for a stop request to arrive during one; does not change any results.
SLOW = "resilience.faults=['slow:rank=0,seconds=0.3,every=1']"
TIMED = ("tokens_per_second", "step_seconds", "data_wait_share", *MEMORY_METRICS, *PASS_METRICS, *UTILIZATION_METRICS)
pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(mixed_shards: str, tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with tiny.yaml: a run of 40 steps with a checkpoint every 10 steps."""
    folder = tmp_path_factory.mktemp("jobs")
    config = make_config(mixed_shards, tokenizer_folder, folder / "run")
    config.trainer.max_steps = STEPS
    config.exp_manager.checkpoint.every_n_train_steps = EVERY
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"defaults": ["anymal", "_self_"], **config.to_dict()}))
    return folder


class Run:
    """A submitted job and its run folder."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        name: str,
        *overrides: str,
        processes: int = 1,
        script: str = SCRIPT,
        sbatch: tuple[str, ...] = ("--nodes=2",),
    ) -> None:
        self.cluster, self.run_dir = cluster, folder / name
        environment = {
            **cluster.environment,
            "ANYMAL_HOME": str(ROOT),
            "ANYMAL_VENV": sys.prefix,
            "ANYMAL_PROCS_PER_NODE": str(processes),
            "OMP_NUM_THREADS": "1",
        }
        config = "tiny" if script == SCRIPT else script.removesuffix("_70b.sh")
        arguments = [
            f"--config-path={folder}",
            f"--config-name={config}",
            f"exp_manager.explicit_log_dir={self.run_dir}",
        ]
        options = (*sbatch, "--gpus-per-node=0", "--time=60")
        self.number = cluster.sbatch(
            ROOT / "slurm" / script, *arguments, *overrides, options=options, env=environment, cwd=folder
        )
        self.log = folder / f"slurm-{self.number}.out"

    def wait(self, *states: str, seconds: float = 240) -> dict[str, str]:
        """Wait until the job is in one of the given states."""
        deadline = time.monotonic() + seconds
        while (job := self.cluster.job(self.number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"{job['JobState']} after {seconds} s\n{self.said()}"
            time.sleep(0.2)
        return job

    def end(self, seconds: float = 500) -> int:
        """Wait for the job to end and return its exit code."""
        job = self.wait("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", seconds=seconds)
        return int(job["ExitCode"].partition(":")[0])

    def restarted(self, times: int, seconds: float = 300) -> None:
        """Wait until the job is running after `times` restarts."""
        deadline = time.monotonic() + seconds
        while (job := self.cluster.job(self.number))["Restarts"] != str(times) or job["JobState"] != "RUNNING":
            assert job["JobState"] in ("RUNNING", "COMPLETING", "PENDING", "REQUEUED"), (
                f"{job['JobState']}\n{self.said()}"
            )
            assert time.monotonic() < deadline, f"{job['JobState']}, {job['Restarts']} restarts\n{self.said()}"
            self.cluster.release(self.number)
            time.sleep(0.2)

    def reach(self, step: int, seconds: float = 600) -> None:
        """Wait until a step is logged."""
        deadline = time.monotonic() + seconds
        while max(steps_of(self.run_dir), default=0) < step:
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.1)

    def said(self) -> str:
        """Return the job's output and its nodes' logs."""
        logs = [self.log, *sorted(self.run_dir.glob("logs/slurm_*/*.log"))]
        return "\n".join(f"== {path}\n{path.read_text()[-4000:]}" for path in logs if path.exists())

    @property
    def summary(self) -> str:
        return (self.run_dir / "slurm.log").read_text()


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the complete lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def steps_of(run: Path) -> list[int]:
    return [row["step"] for row in metrics(run) if "loss" in row]


def figures(run: Path) -> list[dict[str, float]]:
    """Return the metrics that must be bit-identical, which excludes timings."""
    return [{name: value for name, value in row.items() if name not in TIMED} for row in metrics(run)]


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of the last checkpoint, including the optimizer state."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state_dict: dict[str, Any] = {}
    reader = FileSystemReader(run / "checkpoints" / f"step_{STEPS:08d}")
    _load_state_dict(state_dict, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    flat = torch.utils._pytree.tree_flatten_with_path(state_dict)[0]
    return {str(path): value for path, value in flat if isinstance(value, torch.Tensor)}


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """An undisturbed run without Slurm or the launcher."""
    run = folder / "whole"
    sizes = ["trainer.num_nodes=2", "trainer.devices=1", f"exp_manager.explicit_log_dir={run}"]
    run_ranks(2, train, compose("tiny", folder, sizes).config, timeout=400)
    return run


def assert_same(run: Path, whole: Path) -> None:
    assert steps_of(run) == list(range(1, STEPS + 1))
    assert figures(run) == figures(whole)
    ours, theirs = final_weights(run), final_weights(whole)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_from_start_to_end(cluster: Cluster, folder: Path) -> None:
    run = Run(cluster, folder, "a whole run", "trainer.max_steps=4", "model.tensor_model_parallel_size=2", processes=2)
    assert run.end(500) == 0, run.said()
    assert steps_of(run.run_dir) == [1, 2, 3, 4]
    assert "2 node(s) ok" in run.summary and "all-reduce over 4 process(es): correct" in run.summary
    assert "ended with code 0: the run is complete" in run.summary
    logs = run.run_dir / "logs" / f"slurm_{run.number}"
    assert {path.name for path in logs.iterdir()} == {"n1.log", "n2.log", "preflight.log"}
    assert not (run.run_dir / ".preflight").exists()


@pytest.mark.timeout(900)
def test_sft_and_dpo(cluster: Cluster, folder: Path, tokenizer_folder: str) -> None:
    for job in ("sft", "dpo"):
        data = make_conversations(folder / f"{job}_data", tokenizer_folder, 40, pairs=job == "dpo")
        config = make_config(data, tokenizer_folder, folder / "run")
        config.job, config.trainer.max_steps, config.data.seq_length = job, 3, 96
        config.model.lora = LoraConfig(r=4, alpha=8.0)
        if job == "dpo":
            config.model.restore_from_path = str(folder / "sft run")
            for modality in config.model.modalities.values():
                modality.projector.freeze = modality.encoder.freeze = True
        (folder / f"{job}.yaml").write_text(yaml.safe_dump({"defaults": ["anymal", "_self_"], **config.to_dict()}))
        run = Run(cluster, folder, f"{job} run", script=f"{job}_70b.sh")
        assert run.end(400) == 0, run.said()
        assert steps_of(run.run_dir) == [1, 2, 3] and "the run is complete" in run.summary


def test_wrong_override(cluster: Cluster, folder: Path) -> None:
    run = Run(cluster, folder, "wrong", "trainer.max_step=4")
    assert run.end() == 2, run.said()
    lines = [line for line in run.log.read_text().splitlines() if "max_step" in line and "start 0" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: unknown key trainer.max_step "), run.said()
    assert not run.run_dir.exists()


def test_unwritable_folder_on_one_node(cluster: Cluster, folder: Path) -> None:
    run_dir = folder / "unwritable"
    # Root can write anywhere, so make the file that n2 has to write a folder.
    (run_dir / ".preflight" / "n2").mkdir(parents=True)
    run = Run(cluster, folder, "unwritable")
    assert run.end() == 2, run.said()
    lines = [line for line in run.log.read_text().splitlines() if line.startswith("error: node")]
    named = [line for line in lines if f"{str(run_dir)!r} cannot be written (Is a directory). Fix: " in line]
    assert len(named) == 1 and named[0].startswith("error: node n2: run folder:"), run.said()
    assert "1 of 2 node(s) failed: the run is not started" in run.summary
    assert not (run_dir / "metrics.jsonl").exists()


@pytest.mark.timeout(3600)
def test_five_stops_change_nothing(cluster: Cluster, folder: Path, whole: Path) -> None:
    run = Run(cluster, folder, "stopped", SLOW)
    for times in range(1, 6):
        run.reach(max(steps_of(run.run_dir), default=0) + 2)
        cluster.run("scancel", "--batch", "--signal=USR1", str(run.number))
        run.restarted(times)
    assert run.end(1500) == 0, run.said()
    assert run.summary.count("requeueing the job") == 5 and run.summary.count("asked to stop") == 5
    assert_same(run.run_dir, whole)


@pytest.mark.timeout(3600)
def test_a_node_dies(cluster: Cluster, folder: Path, whole: Path) -> None:
    run = Run(cluster, folder, "node died", SLOW)
    run.reach(EVERY + 2)
    cluster.kill_node("n2")
    cluster.wait(lambda: "DOWN" in cluster.node_states()["n2"], 90, "node that is down")
    cluster.start_node("n2")
    run.restarted(1)
    assert run.end(1500) == 0, run.said()
    assert_same(run.run_dir, whole)


@pytest.mark.timeout(3600)
def test_a_spare_node_takes_over(folder: Path, whole: Path) -> None:
    if why := missing():
        pytest.skip(why)
    short = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    try:
        with Cluster(short, nodes=3) as cluster:
            one_step = "resilience.peer_memory_interval=1"
            run = Run(cluster, folder, "spare", SLOW, one_step, "--spare-nodes=1", sbatch=("--nodes=3", "--no-kill"))
            # After the checkpoint of step 10, and well before the next one.
            run.reach(EVERY + 4)
            cluster.kill_node("n2")
            assert run.end(1500) == 0, run.said()
            assert cluster.job(run.number)["Restarts"] == "0", run.said()
    finally:
        shutil.rmtree(short, ignore_errors=True)
    [resumed] = [event for event in read(run.run_dir) if event["kind"] == "resume"]
    assert resumed["source"] == "memory" and resumed["step"] >= EVERY + 3
    assert_same(run.run_dir, whole)
