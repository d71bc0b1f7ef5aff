"""SIGTERM, SIGUSR1 and the time limit: all ranks stop after the same step and save; resuming is bit-identical."""

from __future__ import annotations

import copy
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml
from engine import losses, train
from ranks import run_ranks
from test_sigkill import figures, finish, kill, start, steps_of
from tiny import make_config

from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.async_writer import CheckpointWriter
from megatron_anymal.config import DatasetConfig, RunConfig
from megatron_anymal.parallel import initialize
from megatron_anymal.resilience import events, stop_signals
from megatron_anymal.resilience.exit_codes import Exit
from megatron_anymal.train import loop
from megatron_anymal.train.build import build

STEPS = 5
# Maximum seconds from a signal to the end of the run.
GRACE = 20.0


@pytest.fixture(scope="module")
def config(
    mixed_shards: str, text_shards: str, tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> RunConfig:
    """Five steps with two replicas of two ranks; validation after steps 2 and 4, a checkpoint after step 3."""
    config = make_config(mixed_shards, tokenizer_folder, tmp_path_factory.mktemp("signals") / "run")
    config.trainer.max_steps, config.trainer.devices = STEPS, 4
    config.model.tensor_model_parallel_size = 2
    config.trainer.val_check_interval, config.trainer.limit_val_batches = 2, 2
    config.exp_manager.checkpoint.async_save = False
    config.data.validation = {"text": DatasetConfig(path=text_shards)}
    return config


def in_folder(config: RunConfig, folder: Path) -> RunConfig:
    config = copy.deepcopy(config)
    config.exp_manager.explicit_log_dir = str(folder)
    return config


@pytest.fixture(scope="module")
def whole(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An undisturbed run: its folder and the result of rank 0."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run_ranks(4, train, in_folder(config, folder))[0]


# Points at which a signal arrives: the function called there, and the step after which all ranks must stop.
PLACES: dict[str, tuple[Any, str, int]] = {
    "start-up": (loop.Trainer, "_start", 0),
    "step": (loop, "train_step", 3),
    "validation": (loop, "validation_step", 2),
    "save": (CheckpointWriter, "start", 4),
}


def stopped(config: RunConfig, phase: str, number: int, by: int) -> tuple[int, int, list[str], float]:
    """In a rank: train; rank `by` gets a signal at the given point.

    Returns the exit code, the step, the committed checkpoints and the seconds from the signal to the end.
    """
    state = build(config, initialize(config))
    owner, name, _ = PLACES[phase]
    before, calls, asked = getattr(owner, name), 0, 0.0

    def disturbed(*args: Any, **more: Any) -> Any:
        nonlocal calls, asked
        calls += 1
        # The third step, but the first call of the other functions.
        if calls == (3 if phase == "step" else 1):
            asked = time.monotonic()
            if dist.get_rank() == by:
                os.kill(os.getpid(), number)
        return before(*args, **more)

    setattr(owner, name, disturbed)
    run_dir = Path(config.exp_manager.explicit_log_dir)
    outcome = loop.fit(state, run_dir)
    committed = sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))
    return int(outcome), state.step, committed, time.monotonic() - asked


def stop_and_go_on(
    config: RunConfig, whole: tuple[Path, dict[str, Any]], folder: Path, phase: str, number: int, by: int
) -> None:
    config = in_folder(config, folder)
    at = PLACES[phase][2]
    outcomes = run_ranks(4, stopped, config, phase, number, by)
    assert all(one[:2] == (Exit.REQUEUE, at) and one[2] == outcomes[0][2] for one in outcomes)
    # Schedulers allow 30 s or more.
    assert all(seconds < GRACE for *_, seconds in outcomes)
    if at:
        assert outcomes[0][2][-1] == f"step_{at:08d}"
        store.read_manifest(folder / "checkpoints" / outcomes[0][2][-1], verify=True)
    event_steps = [(event["kind"], event["step"]) for event in events.read(folder)]
    assert ("stopped", at) in event_steps and "stop_requested" in dict(event_steps)
    continued = run_ranks(4, train, config)[0]
    assert figures(folder) == figures(whole[0]) and losses(folder) == whole[1]["losses"]
    for name, weight in whole[1]["weights"].items():
        assert (continued["weights"][name] == weight).all(), name


def test_a_signal_in_a_step(config: RunConfig, whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    stop_and_go_on(config, whole, tmp_path / "run", "step", signal.SIGTERM, by=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "number", "by"),
    [
        ("start-up", signal.SIGTERM, 1),
        ("start-up", signal.SIGUSR1, 0),
        ("step", signal.SIGUSR1, 2),
        ("validation", signal.SIGUSR1, 1),
        ("validation", signal.SIGTERM, 3),
        ("save", signal.SIGTERM, 0),
        ("save", signal.SIGUSR1, 2),
    ],
)
def test_a_signal_elsewhere(
    config: RunConfig, whole: tuple[Path, dict[str, Any]], tmp_path: Path, phase: str, number: int, by: int
) -> None:
    stop_and_go_on(config, whole, tmp_path / "run", phase, number, by)


def test_wishes_are_named_and_forgotten() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with stop_signals.handle_stop_signals():
        assert stop_signals.agreed(stop_signals.stop_flags()) == ""
        os.kill(os.getpid(), signal.SIGUSR1)
        stop_signals.stop_after(0)
        # The sum over two ranks, one of which has no stop request.
        assert stop_signals.agreed([a + b for a, b in zip(stop_signals.stop_flags(), [0.0, 0.0, 0.0])]) == (
            "SIGUSR1 and exp_manager.max_time_per_run"
        )
        with stop_signals.handle_stop_signals():
            pass
        assert stop_signals.agreed(stop_signals.stop_flags())
    assert stop_signals.agreed(stop_signals.stop_flags()) == "" and signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.slow
def test_the_command_ends_with_75_and_goes_on(
    config: RunConfig, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    alone = in_folder(config, tmp_path / "run")
    alone.trainer.devices, alone.trainer.max_steps, alone.data.num_workers = 1, 400, 1
    alone.exp_manager.checkpoint.every_n_train_steps = 0
    values = {"defaults": ["anymal", "_self_"], **alone.to_dict()}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    [process] = start(tmp_path, tmp_path / "run", "pretrain", 1, tmp_path / "first.log")
    try:
        wait_for(lambda: len(steps_of(tmp_path / "run")) >= 3 or process.poll() is not None)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(240) == Exit.REQUEUE, (tmp_path / "first.log").read_text()[-3000:]
    finally:
        kill(process)
    reached = max(steps_of(tmp_path / "run"))
    assert 3 <= reached < 400
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved == [f"step_{reached:08d}"]
    more = (f"trainer.max_steps={reached + 2}", "model.optim.sched.decay_steps=400")
    again = tmp_path / "again.log"
    assert f"at step {reached}" in finish(start(tmp_path, tmp_path / "run", "pretrain", 1, again, *more), again)
    assert steps_of(tmp_path / "run") == list(range(1, reached + 3))
    run_events = events.read(tmp_path / "run")
    assert [event["step"] for event in run_events if event["kind"] == "first_step"] == [1, reached + 1]
    kinds = [event["kind"] for event in run_events]
    first = ["start", "first_step", "stop_requested", "saved", "stopped"]
    assert kinds == [*first, "start", "resume", "first_step", "saved", "end"]


def wait_for(condition: Callable[[], bool], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
