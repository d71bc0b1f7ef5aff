"""Two jobs in the same run folder."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml
from engine import train
from ranks import run_ranks
from test_sigkill import finish, kill, start
from tiny import make_config

from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.run_lock import LOCK, Owner
from megatron_anymal.config import ConfigError, RunConfig


@pytest.fixture
def config(mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> RunConfig:
    return make_config(mixed_shards, tokenizer_folder, tmp_path / "run")


@pytest.mark.slow
def test_a_second_job_is_refused_and_a_killed_ones_folder_taken_over(config: RunConfig, tmp_path: Path) -> None:
    config.trainer.max_steps, config.exp_manager.checkpoint.every_n_train_steps = 100_000, 2
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"defaults": ["anymal", "_self_"], **config.to_dict()}))
    run = tmp_path / "run"
    [first] = start(tmp_path, run, "pretrain", 1, tmp_path / "first.log")
    try:
        deadline = time.monotonic() + 240
        while not store.committed(tmp_path / "run" / "checkpoints") and time.monotonic() < deadline:
            time.sleep(0.05)
        names = {path.name for path in (tmp_path / "run").iterdir()}
        [second] = start(tmp_path, run, "pretrain", 1, tmp_path / "second.log")
        assert second.wait(240) > 0
        output = (tmp_path / "second.log").read_text()
        assert (
            "is in use by process" in output and str(first.pid) in output and "exp_manager.explicit_log_dir" in output
        )
        # The second job did not touch the folder, including NeMo's files.
        assert {path.name for path in (tmp_path / "run").iterdir()} >= names and first.poll() is None
        assert not list((tmp_path / "run").glob("run_*"))
    finally:
        kill(first)
    step = store.step_of(store.committed(tmp_path / "run" / "checkpoints")[0])
    more, third = (f"trainer.max_steps={step + 1}", "model.optim.sched.decay_steps=100000"), tmp_path / "third.log"
    output = finish(start(tmp_path, run, "pretrain", 1, third, *more), third)
    assert "taking over" in output and str(first.pid) in output and f"at step {step}" in output
    assert not (tmp_path / "run" / LOCK).exists()


def refused(config: RunConfig) -> str:
    with pytest.raises(ConfigError) as error:
        train(config)
    return str(error.value)


def test_every_rank_is_refused_and_a_crashed_machines_lock_taken_over(config: RunConfig, tmp_path: Path) -> None:
    config.trainer.devices, config.trainer.max_steps = 2, 1
    owner = Owner.this_process()
    lock = tmp_path / "run" / LOCK
    lock.parent.mkdir()
    lock.write_text(json.dumps(vars(owner)))
    messages = run_ranks(2, refused, config)
    assert messages[0] == messages[1] and f"process {owner.pid} on" in messages[0]
    lock.write_text(json.dumps({**vars(owner), "host": "node7"}))
    config.exp_manager.lock_timeout_seconds = 1.0
    run_ranks(2, train, config)
    assert not lock.exists() and len(store.committed(tmp_path / "run" / "checkpoints")) == 1


def taken_over(config: RunConfig) -> str:
    """In a rank: train while another job takes over the folder."""
    from megatron_anymal.checkpoint.store import CheckpointError
    from megatron_anymal.train import loop

    step = loop.train_step

    def stolen(state, *arguments):  # type: ignore[no-untyped-def]
        if state.step == 1 and state.layout.reports:
            lock = Path(config.exp_manager.explicit_log_dir) / LOCK
            owner = json.loads(lock.read_text())
            lock.write_text(json.dumps({**owner, "host": "node7", "token": "another"}))
        return step(state, *arguments)

    loop.train_step = stolen
    with pytest.raises(CheckpointError) as error:
        train(config)
    return str(error.value)


@pytest.mark.slow
def test_a_job_that_was_taken_over_stops_on_every_rank(config: RunConfig, tmp_path: Path) -> None:
    config.trainer.devices, config.trainer.max_steps = 2, 100
    messages = run_ranks(2, taken_over, config)
    assert messages[0] == messages[1] and "taken over by process" in messages[0] and "node7" in messages[0]
    assert store.newest_valid(tmp_path / "run" / "checkpoints") == (None, [])
    assert (tmp_path / "run" / LOCK).is_file()
