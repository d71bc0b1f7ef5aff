"""What a run's folder shows about failures, recoveries, saves and steps: events at known times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_anymal.config import ConfigError
from megatron_anymal.planning.goodput import shares
from megatron_anymal.planning.goodput_inputs import job_of, resolve
from megatron_anymal.planning.measured_run import measure
from megatron_anymal.resilience.events import record


def tell(run: Path, at: float, kind: str, attempt: int, rank: int = -1, **more: object) -> None:
    record(run, kind, kind, time=5000.0 + at, attempt=attempt, rank=rank, **more)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Two processes. Attempt 1 dies at 59 s, 2 hangs from 128 s on, 3 is killed with its launcher, 4 completes."""
    run = tmp_path / "run"
    tell(run, 0, "start", 1, launcher="torchrun")
    tell(run, 10, "start", 1, 0, processes=2)
    tell(run, 14, "first_step", 1, 0, step=1)
    tell(run, 35, "saved", 1, 0, step=10, seconds=3.0, stalled=1.0)
    tell(run, 55, "saved", 1, 0, step=20, seconds=5.0, stalled=2.0)
    tell(run, 59, "exception", 1, 1, step=23, traceback="", exit_code=1)
    tell(run, 60, "death", 1, 0, step=23, signal=9)
    tell(run, 63, "restart", 1, pause=1.0)
    tell(run, 64, "start", 2, launcher="torchrun")
    tell(run, 75, "start", 2, 0, processes=2)
    tell(run, 79, "resume", 2, 0, step=20)
    tell(run, 85, "first_step", 2, 0, step=21)
    tell(run, 110, "saved", 2, 0, step=30, seconds=4.0, stalled=1.5)
    tell(run, 140, "hang", 2, 1, step=36, cause="data", ranks=[1], silent=12.0)
    tell(run, 141, "restart", 2, pause=1.0)
    tell(run, 142, "start", 3, launcher="torchrun")
    tell(run, 151, "start", 3, 0, processes=2)
    tell(run, 157, "resume", 3, 0, step=30)
    tell(run, 161, "first_step", 3, 0, step=31)
    tell(run, 180, "saved", 3, 0, step=40, seconds=4.0, stalled=1.5)
    tell(run, 1000, "start", 4, launcher="torchrun")
    tell(run, 1010, "start", 4, 0, processes=2)
    tell(run, 1016, "resume", 4, 0, step=40)
    tell(run, 1020, "first_step", 4, 0, step=41)
    tell(run, 1050, "end", 4, 0, step=50)
    tell(run, 1051, "end", 4, exit_code=0)
    rows = [{"step": step, "step_seconds": 9.0 if step == 1 else 2.0, "loss": 1.0} for step in range(1, 51)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_phases_failures_and_saves(run_dir: Path) -> None:
    run = measure(run_dir)
    numbers = {name: value.number for name, value in run.values.items()}
    assert run.processes == 2
    assert numbers == pytest.approx(
        {
            "step_seconds": 2.0,
            "save_every": 10,
            "stall_seconds": (1.0 + 2.0 + 1.5 + 1.5) / 4,
            "write_seconds": (2.0 + 3.0 + 2.5 + 2.5) / 4,
            # From the first sign of a failure to the decision to restart; the hang was silent for 12 s before.
            "detection_seconds": ((63 - 59) + (141 - 140 + 12)) / 2,
            # From there until the ranks were built.
            "processes_seconds": ((75 - 63) + (151 - 141)) / 2,
            "groups_seconds": 0.0,
            "restore_seconds": ((79 - 75) + (157 - 151) + (1016 - 1010)) / 3,
            "first_step_seconds": ((14 - 10) + (85 - 79) + (161 - 157) + (1020 - 1016)) / 4 - 2.0,
            "lost_node_share": 0.0,
            # Three failures in the attempts and the two pauses between them; not the night before attempt 4.
            "mtbf_per_gpu_hours": 2 * (63 + 1 + 77 + 1 + 38 + 51) / 3 / 3600,
        }
    )
    assert "3 failures in 3m51s on 2 processes, +- 58%" in run.values["mtbf_per_gpu_hours"].origin
    first, second = run.notes
    # 85 - 59 and 161 - 128.
    assert "took 29.5 s (mean of 2 recoveries, 26.0 to 33.0 s)" in first
    # 107 s of steps in 1051 s.
    assert "10.18%" in second and "17m31s" in second


def test_copies_in_memory(run_dir: Path) -> None:
    for attempt, seconds in ((1, 0.2), (2, 0.4)):
        tell(run_dir, 20, "copies", attempt, 0, interval=2, seconds=seconds, bytes=100)
    rows = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    for row in rows:
        if row["kind"] == "resume" and row["attempt"] == 3:
            row["source"] = "memory"
    (run_dir / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = measure(run_dir).values
    assert values["peer_every"].number == 2 and values["peer_stall_seconds"].number == pytest.approx(0.3)
    assert values["peer_restore_seconds"].number == 157 - 151
    assert values["restore_seconds"].number == ((79 - 75) + (1016 - 1010)) / 2
    # The model takes them as they are.
    assert 0 < shares(job_of(resolve({}, values), 2), int(values["save_every"].number)).ratio < 1


def test_copies_that_the_model_cannot_represent(run_dir: Path) -> None:
    tell(run_dir, 20, "copies", 1, 0, interval=3, seconds=0.1, bytes=100)
    run = measure(run_dir)
    assert "peer_every" not in run.values and any("every 3 steps are left out" in note for note in run.notes)


def test_a_mistake_is_not_a_failure(tmp_path: Path) -> None:
    tell(tmp_path, 0, "start", 1, launcher="torchrun")
    tell(tmp_path, 5, "start", 1, 0, processes=8)
    tell(tmp_path, 6, "exception", 1, 3, exit_code=2, traceback="")
    tell(tmp_path, 100, "end", 1, exit_code=2)
    run = measure(tmp_path)
    assert "mtbf_per_gpu_hours" not in run.values and "No failure in 1m40s." in run.notes
    # A start shows how long processes take, even if nothing failed.
    assert run.values["processes_seconds"].number == 5.0 and "detection_seconds" not in run.values


def test_without_the_launcher(tmp_path: Path) -> None:
    tell(tmp_path, 5, "start", 0, 0, processes=8)
    tell(tmp_path, 9, "first_step", 0, 0)
    run = measure(tmp_path)
    assert [name for name in run.values] == ["first_step_seconds"] and run.values["first_step_seconds"].number == 4.0
    assert any("anymal launch" in note for note in run.notes)


def test_a_run_in_progress_has_no_ratio_of_its_own(run_dir: Path) -> None:
    tell(run_dir, 2000, "start", 5, launcher="torchrun")
    assert not [note for note in measure(run_dir).notes if "ratio" in note]


def test_old_logs(run_dir: Path) -> None:
    """Without the fields that the phases need, only what is there is used."""
    kept = []
    for line in (run_dir / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["kind"] != "first_step":
            kept.append({k: v for k, v in event.items() if k not in ("processes", "stalled", "silent")})
    (run_dir / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in kept))
    run = measure(run_dir)
    assert {"step_seconds", "save_every", "restore_seconds", "processes_seconds"} <= set(run.values)
    assert not {"mtbf_per_gpu_hours", "stall_seconds", "first_step_seconds"} & set(run.values)
    assert any("number of processes is not known" in note for note in run.notes)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        measure(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"neither events\.jsonl nor metrics\.jsonl"):
        measure(tmp_path)
