"""The report states for a human reader what happened, what came first, what it cost and what to do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_anymal.checkpoint.store import Manifest, commit, committed_folder, staging_folder
from megatron_anymal.launcher import report
from megatron_anymal.launcher.goodput import effective_time
from megatron_anymal.launcher.root_cause import failures
from megatron_anymal.resilience import events
from megatron_anymal.resilience.exit_codes import Exit

FIRST = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\nRuntimeError: the first one'
SECOND = 'Traceback (most recent call last):\n  File "b.py", line 2, in g\nRuntimeError: Connection closed by peer'


def save(run_dir: Path, step: int) -> None:
    checkpoints = run_dir / "checkpoints"
    staging = staging_folder(checkpoints, step)
    staging.mkdir(parents=True)
    (staging / "data").write_text("x")
    commit(staging, committed_folder(checkpoints, step), Manifest(step, step, {}, {}, "", "", {}))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Attempt 1: rank 1's exception, then rank 0's as a result. 2: rank 0 killed, recorded after rank 1's. 3: a
    hang."""
    run = tmp_path / "run7"

    def tell(at: float, kind: str, text: str, attempt: int, rank: int = -1, **more: object) -> None:
        events.record(run, kind, text, time=1000.0 + at, attempt=attempt, rank=rank, **more)

    tell(0, "start", "1 x 2 processes", 1)
    tell(20.0, "exception", "RuntimeError: the first one", 1, 1, step=5, traceback=FIRST, exit_code=1)
    tell(20.1, "exception", "RuntimeError: Connection closed by peer", 1, 0, step=5, traceback=SECOND, exit_code=1)
    tell(20.2, "death", "ended with exit code 1", 1, 1, step=5, exit_code=1, output="RuntimeError: the first one")
    tell(21, "restart", "attempt 1: rank 1 ended. Starting again in 1 s", 1)
    tell(22, "start", "1 x 2 processes", 2)
    tell(40.0, "exception", "RuntimeError: Connection closed by peer", 2, 1, step=8, traceback=SECOND, exit_code=1)
    tell(40.3, "death", "was ended by SIGKILL (signal 9)", 2, 0, step=8, signal=9)
    tell(41, "skipped_step", "gradient not finite", 2, 0, step=6, samples=["mixed:image-00003", "mixed:text-00011"])
    tell(42, "save_failed", "step 9: No space left on device", 2, 0, step=9)
    tell(43, "straggler", "rank 1 takes 2.5 times the median", 2, 0, step=10, ranks={"1": 2.5}, median=1.0)
    tell(44, "start", "1 x 2 processes", 3)
    tell(
        60,
        "hang",
        "rank 1 (step 9, data, silent for 10.1 s) waiting for data that does not arrive",
        3,
        1,
        step=9,
        cause="data",
        ranks=[1],
        where={"1": ["/x/dataloader.py:5 in next"]},
        stacks={"0": "stacks/rank_00000_7.txt", "1": "stacks/rank_00001_8.txt"},
    )
    tell(100, "end", "3 restarts in a row without progress", 3, exit_code=79)
    for step in (4, 8):
        save(run, step)
    (run / "checkpoints" / "step_00000012").mkdir()
    rows = [{"step": step, "step_seconds": 5.0} for step in (2, 4, 6, 8, 10)]
    rows.insert(2, {"step": 4, "val_loss": 1.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 11, "st')
    return run


def section(text: str, title: str) -> str:
    return re.split(r"\n## ", text.split(f"\n## {title}\n")[1])[0]


def test_a_person_finds_what_they_look_for(run_dir: Path) -> None:
    path = report.write_report(run_dir, Exit.CRASH_LOOP, "3 restarts in a row without progress")
    text = path.read_text()
    assert path == run_dir / "report.md" and not list(run_dir.glob(".report*"))
    head = text.split("\n## ")[0]
    assert head.startswith("# Run run7: crash loop") and "79" in head and "step 8" in head and "Attempts: 3" in head
    assert "fix the first cause" in section(text, "What to do next")
    failed = section(text, "What failed")
    first, second, third = failed.split("### ")[1:]
    assert first.startswith("Attempt 1: rank 1, step 5, exception")
    assert first.index("the first one") < first.index("Connection closed") and SECOND not in first
    assert FIRST in first and "exit code 1" not in first
    assert second.startswith("Attempt 2: rank 0, step 8, death") and "SIGKILL" in second
    assert third.startswith("Attempt 3: rank 1, step 9, hang (data)")
    assert "dataloader.py:5" in third and "stacks/rank_00000_7.txt" in third
    assert "step 6: mixed:image-00003, mixed:text-00011" in section(text, "Skipped steps")
    assert "step_00000008" in section(text, "Checkpoints") and "No space left" in section(text, "Checkpoints")
    assert "rank 1: slow in 1 log lines" in section(text, "Slow ranks")
    time_section = section(text, "Time")
    # Steps 1 to 8 at 5 s each out of 100 s; the later ones were lost.
    assert "0.4000" in time_section and "productive seconds / wall seconds" in time_section
    order = [line for line in section(text, "What happened").splitlines() if line.startswith("- ")]
    assert len(order) == len(events.read(run_dir)) and "(+1m40s)" in order[-1]


def test_rates_of_operations_are_means_over_time(tmp_path: Path) -> None:
    def row(step: int, seconds: float, rate: float, **shares: float) -> dict[str, float]:
        names = ("tflops_per_gpu", "hardware_tflops_per_gpu", "encoder_tflops", "llama_tflops")
        rates = {name: rate * factor for name, factor in zip(names, (1, 2, 3, 4))}
        return {"step": step, "step_seconds": seconds, **rates, **shares}

    def lines_of(rows: list[dict[str, float]]) -> list[str]:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        text = report.write_report(tmp_path, Exit.DONE, "").read_text()
        return section(text, "Operations").strip().splitlines()

    # A line of an earlier version, a step of 10 s at 100 and, after a validation, 10 steps of 3 s at 20: 40 s in all.
    shares = dict.fromkeys(("mfu", "hfu", "encoder_utilization", "llama_utilization"), 0.25)
    rows = [
        {"step": 5, "step_seconds": 50.0},
        row(6, 10.0, 100.0, **shares),
        {"step": 6, "val_loss": 1.0},
        row(16, 3.0, 20.0, **shares),
    ]
    assert lines_of(rows) == [
        "- Needed operations: 40 TFLOP/s per GPU, 25.0% of the peak (MFU)",
        "- With repeated ones: 80 TFLOP/s per GPU, 25.0% of the peak (HFU)",
        "- Encoders, while they run: 120 TFLOP/s per GPU, 25.0% of the peak",
        "- Llama and projectors, in passes: 160 TFLOP/s per GPU, 25.0% of the peak",
    ]
    # Without a peak there are no shares.
    assert lines_of([row(2, 1.0, 0.5)])[0] == "- Needed operations: 0.5 TFLOP/s per GPU"
    assert lines_of([{"step": 5, "step_seconds": 50.0}]) == ["Not logged."]


@pytest.mark.parametrize("code", Exit)
def test_every_ending_says_what_to_do(tmp_path: Path, code: Exit) -> None:
    text = report.write_report(tmp_path, code, "so it was").read_text()
    assert code.meaning in text and f"**Exit code {int(code)}**" in text and "so it was" in text
    assert len(section(text, "What to do next").strip()) > 20


def test_a_finished_run_counts_all_its_steps(run_dir: Path) -> None:
    goodput = effective_time(run_dir, events.read(run_dir), complete=True, kept=8)
    assert (goodput.wall, goodput.productive, goodput.steps) == (100.0, 50.0, 10)


def test_a_checkpoint_between_two_lines_of_the_log(run_dir: Path) -> None:
    goodput = effective_time(run_dir, events.read(run_dir), complete=False, kept=5)
    assert (goodput.productive, goodput.steps) == (25.0, 5)


def test_an_abort_is_not_before_the_exception_that_led_to_it(tmp_path: Path) -> None:
    events.record(tmp_path, "exception", "NCCL error", time=10.0, rank=0, traceback="")
    events.record(tmp_path, "death", "was ended by SIGABRT", time=10.1, rank=1, signal=6)
    [failure] = failures(events.read(tmp_path))
    assert failure.first["rank"] == 0


def test_half_a_line_is_left_out(tmp_path: Path) -> None:
    events.record(tmp_path, "start", "one")
    with (tmp_path / events.EVENTS).open("a") as file:
        file.write('{"time": 5, "kind"\n[]\n"x"\n')
    events.record(tmp_path, "end", "two", step=3, value=float("nan"))
    assert [event["text"] for event in events.read(tmp_path)] == ["one", "two"]


def test_an_event_that_cannot_be_written_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    events.record(tmp_path / "file", "start", "one")
    assert "could not be written" in capsys.readouterr().err


def test_an_event_names_its_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("ANYMAL_ATTEMPT", "7")
    events.record(tmp_path, "saved", "a checkpoint", step=4)
    [event] = events.read(tmp_path)
    assert (event["rank"], event["attempt"], event["step"]) == (3, 7, 4) and event["node"]
