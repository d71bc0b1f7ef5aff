"""Fault injection: its grammar, when faults happen, and how a lost or stuck loader process shows."""

from __future__ import annotations

import errno
import gc
import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from engine import train
from ranks import run_ranks
from tiny import make_config
from torch.utils.data import DataLoader, Dataset

from megatron_anymal.config import ConfigError, RunConfig
from megatron_anymal.config.fault_grammar import KINDS
from megatron_anymal.config.validation import check
from megatron_anymal.data import loader_workers
from megatron_anymal.data.loader import _read
from megatron_anymal.data.loader_workers import WorkerDied, death_behind, worker_died
from megatron_anymal.resilience import events, fault_injection, heartbeat
from megatron_anymal.resilience.exit_codes import Exit, code_of
from megatron_anymal.resilience.heartbeat import Phase
from megatron_anymal.resilience.stragglers import stragglers


@pytest.fixture
def config(mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> RunConfig:
    config = make_config(mixed_shards, tokenizer_folder, tmp_path / "run")
    config.trainer.max_steps = 4
    return config


@pytest.mark.parametrize(
    ("text", "expected_message"),
    [
        ("explode:rank=1", "unknown kind 'explode'. Known: kill, exception"),
        ("kill:rnk=1", "'kill' has no key 'rnk'. It has: rank, step, place"),
        ("kill:seconds=3", "'kill' has no key 'seconds'"),
        ("nan:place=update", "'nan' has no key 'place'"),
        ("kill:rank", "'kill' has no key 'rank'. It has: rank, step, place, write, every, as KEY=VALUE"),
        ("kill:rank=first", "rank='first' is not a number"),
        ("kill:step=0", "step=0 is out of range"),
        ("kill:step=2,step=3", "'step' is given twice"),
        ("slow:step=2", "'slow' needs seconds=NUMBER"),
        ("slow:seconds=nan", "seconds=nan is out of range"),
        ("kill:place=lunch", "place='lunch' is not one of start, data, compute"),
        ("kill:write=2", "'write' has no effect without place=checkpoint"),
        ("kill:place=start,step=2", "'step' has no effect with place=start"),
        ("kill:rank=1", "there is no rank 1 among 1 process(es)"),
        ("loader_hang:step=2", "data.num_workers=0"),
    ],
)
def test_what_cannot_happen_is_refused(config: RunConfig, text: str, expected_message: str) -> None:
    config.resilience.faults = ["kill:step=3", text]
    with pytest.raises(ConfigError) as error:
        check(config)
    assert str(error.value).startswith(f"resilience.faults: {text!r}") and expected_message in str(error.value)


def test_each_happens_once_where_it_is_due(tmp_path: Path) -> None:
    entries = ["exception:step=2,place=data", "eio:step=2,write=2", "exception:rank=1", "exception:step=3,every=1"]
    for start in range(2):
        fault_injection.schedule(entries, 0, tmp_path)
        fault_injection.inject("data", 1)
        fault_injection.inject("compute", 2)
        if start == 0:
            with pytest.raises(fault_injection.InjectedFault, match="step=2,place=data"):
                fault_injection.inject("data", 2)
        fault_injection.inject("data", 2)
        fault_injection.inject("checkpoint", 2)
        if start == 0:
            with pytest.raises(OSError) as error:
                fault_injection.inject("checkpoint", 2)
            assert error.value.errno == errno.EIO
        fault_injection.inject("checkpoint", 2)
        for _ in range(2):
            with pytest.raises(fault_injection.InjectedFault, match="every=1"):
                fault_injection.inject("compute", 3)
    fault_injection.schedule(entries, 1, tmp_path)
    with pytest.raises(fault_injection.InjectedFault, match="rank=1"):
        fault_injection.inject("compute", 9)
    fault_injection.schedule([], 0, tmp_path)
    fault_injection.inject("compute", 3)


def test_one_bit_of_the_newest_checkpoint(tmp_path: Path) -> None:
    content = bytes(range(256))
    for step in (3, 12):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "__0_0.distcp").write_bytes(content)
        (folder / "common.pt").write_bytes(content * 2)
    fault_injection.schedule(["corrupt:step=13"], 0, tmp_path)
    fault_injection.inject("compute", 13)
    fault_injection.schedule([], 0, tmp_path)
    changed = {
        path: sum(a != b for a, b in zip(path.read_bytes(), content))
        for path in tmp_path.rglob("*.*")
        if path.suffix == ".distcp"
    }
    assert {path.parent.name: count for path, count in changed.items()} == {"step_00000003": 0, "step_00000012": 1}


def lose_a_worker(config: RunConfig) -> str:
    with pytest.raises(WorkerDied) as error:
        train(config)
    assert code_of(error.value) is Exit.CRASH
    return str(error.value)


def test_a_loader_process_that_is_killed_is_named(config: RunConfig) -> None:
    config.data.num_workers, config.resilience.faults = 2, ["loader_kill:step=3,worker=1"]
    message = run_ranks(1, lose_a_worker, config)[0]
    assert message.startswith("The loader process ") and "of rank 0" in message and "killed by a signal" in message
    exceptions = [event for event in events.read(config.run_dir) if event["kind"] == "exception"]
    assert len(exceptions) == 1 and "WorkerDied" in exceptions[0]["text"] and "Traceback" in exceptions[0]["traceback"]
    # The fault does not happen again in the second start.
    run_ranks(1, train, config)


def test_torchs_words_for_it() -> None:
    error = worker_died(RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly"))
    assert error is not None and "process 12, 13 of rank" in str(error) and worker_died(error) is None
    assert worker_died(RuntimeError("something else")) is None


def test_an_exit_code_tells_of_a_signal() -> None:
    """torch reports a killed process as "exited unexpectedly", too, if it looks before the signal handler runs."""
    workers: list[Any] = [SimpleNamespace(pid=pid, exitcode=code) for pid, code in ((12, -9), (13, None), (14, -11))]
    error = worker_died(RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly"), workers)
    assert "process 12 of rank" in str(error) and "was killed by a signal (Killed)" in str(error)
    error = worker_died(RuntimeError("DataLoader worker (pid(s) 13) exited unexpectedly"), workers)
    assert "exited while it was reading" in str(error)


class KillsItsReader(Dataset[tuple["Killer", torch.Tensor]]):
    """Items whose receipt kills the loader process that read them, before their tensor has been received from it."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[Killer, torch.Tensor]:
        return Killer(), torch.zeros(4096)


class Killer:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.kill, (os.getpid(), signal.SIGKILL)


class CutOff:
    """A loader whose connection to its process fails with an error."""

    def __init__(self, error: Exception, process: Any) -> None:
        self.error, self._workers = error, [process]

    def __iter__(self) -> CutOff:
        return self

    def __next__(self) -> None:
        raise self.error


def die_later() -> None:
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)


def lose_workers_while_receiving(times: int) -> tuple[list[str], Any]:
    """The messages for processes that die after their connection, then real loaders; the answer for a living one."""
    # Before the loaders, whose threads may outlive them.
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=time.sleep, args=(1000,))
    process.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader_workers, "_EXIT_SECONDS", 0.1)
        no_death = death_behind(ConnectionResetError(), [process])
    process.kill()
    process.join()
    messages = []
    for reset in (ConnectionResetError(104, "Connection reset by peer"), EOFError()):
        process = fork.Process(target=die_later)
        process.start()
        with pytest.raises(WorkerDied) as died:
            next(_read(CutOff(reset, process), None, None))  # type: ignore[arg-type]
        messages.append(str(died.value))
    for _ in range(times):
        loader: Any = DataLoader(KillsItsReader(), batch_size=None, num_workers=1, multiprocessing_context="fork")
        with pytest.raises(RuntimeError) as error:
            next(_read(loader, None, None))  # type: ignore[arg-type]
        # As `fit` does: torch's handler of SIGCHLD may raise at any time.
        messages.append(str(worker_died(error.value) or error.value))
        # Later loader processes would inherit the iterator, and complain about it.
        del error, loader
        gc.collect()
    return messages, no_death


def test_a_loader_process_that_is_killed_while_it_hands_over_a_tensor() -> None:
    """In about one of ten cases torch raises the connection's error."""
    messages, no_death = run_ranks(1, lose_workers_while_receiving, 20)[0]
    assert len(messages) == 22 and no_death is None
    for message in messages:
        assert message.startswith("The loader process ") and "was killed by a signal (Killed)" in message


def get_stuck(config: RunConfig, folder: Path) -> tuple[heartbeat.Beat, heartbeat.Beat]:
    """Train with a loader process that hangs; read the rank's heartbeat twice, then kill the loader process."""
    os.environ[heartbeat.ENVIRONMENT] = str(folder)
    seen = []

    def look() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            beat = heartbeat.read(folder / "rank_00000")
            if beat and beat.step >= 2 and beat.phase is Phase.DATA and time.monotonic_ns() - beat.beat_ns > 1e9:
                break
            time.sleep(0.05)
        for _ in range(2):
            seen.append(heartbeat.read(folder / "rank_00000"))
            time.sleep(1.2)
        for child in psutil.Process().children():
            child.kill()

    watcher = threading.Thread(target=look)
    watcher.start()
    with pytest.raises(WorkerDied), heartbeat.publish(Path(config.exp_manager.explicit_log_dir)):
        train(config)
    watcher.join()
    first, second = seen
    assert first is not None and second is not None
    return first, second


def test_a_loader_process_that_hangs_shows_as_data_without_progress(config: RunConfig, tmp_path: Path) -> None:
    config.data.num_workers, config.resilience.faults = 1, ["loader_hang:step=3"]
    first, second = run_ranks(1, get_stuck, config, tmp_path)[0]
    assert first.phase is second.phase is Phase.DATA and first.settled
    assert first.progress == second.progress and first.beat_ns == second.beat_ns
    # The rank process itself is alive.
    assert second.alive_ns > first.alive_ns


def test_a_full_disk_and_a_slow_rank(config: RunConfig) -> None:
    config.trainer.devices, config.exp_manager.checkpoint.every_n_train_steps = 2, 2
    config.resilience.faults = ["enospc:rank=0,step=2,write=2", "slow:rank=1,step=3,seconds=4"]
    run_ranks(2, train, config)
    run_events = events.read(config.run_dir)
    [failed] = [event for event in run_events if event["kind"] == "save_failed"]
    assert failed["step"] == 2 and "rank 0" in failed["text"] and "No space left" in failed["text"]
    assert [path.name for path in (config.run_dir / "checkpoints").iterdir()] == ["step_00000004"]
    [slow] = [event for event in run_events if event["kind"] == "straggler" and event["step"] == 3]
    assert set(slow["ranks"]) == {"1"} and slow["ranks"]["1"] > 4 and "rank 1" in slow["text"]
    rows = [json.loads(line) for line in (config.run_dir / "rank_seconds.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(len(row["seconds"]) == 2 for row in rows)
    assert rows[2]["seconds"][1] > 4


def test_who_is_slow() -> None:
    # The second stage has more work than the first, and its last rank is slow.
    seconds, stages = [1.0, 1.1, 0.9, 3.0, 3.1, 7.0], [0, 0, 0, 1, 1, 1]
    assert stragglers(seconds, stages, 2.0) == {5: (7.0, 3.1)}
    assert stragglers([1.0, 2.5], [0, 0], 2.0) == {1: (2.5, 1.0)}
    assert stragglers([1.0], [0], 2.0) == {}


def test_each_kind_is_documented(config: RunConfig) -> None:
    page = (Path(__file__).parents[2] / "docs" / "operations" / "failures.md").read_text()
    examples = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert {example.partition(":")[0] for example in examples} == set(KINDS)
    config.trainer.devices, config.data.num_workers, config.resilience.faults = 4, 1, examples
    check(config)
