"""Stops, requeues and a node failure in a real Slurm cluster, with a trainer stand-in that records its starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from loopback import Cluster

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slurm, pytest.mark.slow]

# "Saves" a checkpoint at each stop, and completes in its third start.
PYTHON = """#!{python}
import os, pathlib, signal, sys, time
run = pathlib.Path("{run}")
if "--run-dir" in sys.argv:
    print(run)
elif "launch" in sys.argv:
    stops = []
    signal.signal(signal.SIGUSR1, lambda *_: stops.append(1))
    start, node = int(os.environ.get("SLURM_RESTART_COUNT", "0")), os.environ["SLURMD_NODENAME"]
    (run / f"start_{{start}}_{{node}}").touch()
    while not stops and start < 2:
        time.sleep(0.05)
    (run / "checkpoints" / f"step_{{start:08d}}").mkdir(parents=True, exist_ok=True)
    sys.exit(75 if stops else 0)
"""


def submit(cluster: Cluster, folder: Path) -> tuple[int, Path]:
    run, python = folder / "run", folder / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON.format(python=sys.executable, run=run))
    python.chmod(0o755)
    stand_in = {"ANYMAL_HOME": str(ROOT), "ANYMAL_VENV": str(folder / "venv"), "ANYMAL_PROCS_PER_NODE": "2"}
    options = ("--nodes=2", "--gpus-per-node=0", "--time=10")
    environment = {**cluster.environment, **stand_in}
    number = cluster.sbatch(ROOT / "slurm" / "sft_70b.sh", options=options, env=environment, cwd=folder)
    return number, run


def await_start(cluster: Cluster, number: int, run: Path, start: int) -> None:
    def begun() -> bool:
        cluster.release(number)
        return all((run / f"start_{start}_{node}").exists() for node in ("n1", "n2"))

    cluster.wait(begun, 90, f"start {start}")


def await_end(cluster: Cluster, number: int, *states: str) -> None:
    cluster.wait(lambda: cluster.job(number)["JobState"] in states, 60, " or ".join(states))


def test_stopped_twice(cluster: Cluster, tmp_path: Path) -> None:
    number, run = submit(cluster, tmp_path)
    for start in range(2):
        await_start(cluster, number, run, start)
        cluster.run("scancel", "--batch", "--signal=USR1", str(number))
    await_start(cluster, number, run, 2)
    await_end(cluster, number, "COMPLETED")
    log = (run / "slurm.log").read_text()
    assert log.count("asked to stop") == 2 and "stopped at step_00000001: requeueing the job" in log
    assert "ended with code 0: the run is complete" in log
    nodes = (run / "logs" / f"slurm_{number}" / "n2.log").read_text()
    assert [line.split(" of ")[0] for line in nodes.splitlines()] == [f"--- start {start}" for start in range(3)]


def test_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    number, run = submit(cluster, tmp_path)
    await_start(cluster, number, run, 0)
    cluster.run("scancel", str(number))
    await_end(cluster, number, "CANCELLED")
    assert "terminated from outside" in (run / "slurm.log").read_text()
    assert cluster.job(number)["Restarts"] == "0"


def test_a_node_dies(cluster: Cluster, tmp_path: Path) -> None:
    number, run = submit(cluster, tmp_path)
    await_start(cluster, number, run, 0)
    cluster.kill_node("n2")
    cluster.wait(lambda: "DOWN" in cluster.node_states()["n2"], 90, "node that is down")
    cluster.start_node("n2")
    await_start(cluster, number, run, 1)
    cluster.run("scancel", "--batch", "--signal=USR1", str(number))
    await_start(cluster, number, run, 2)
    await_end(cluster, number, "COMPLETED")
