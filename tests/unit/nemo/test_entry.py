"""`anymal pretrain` from the command line: run folder, loggers, several processes, and refusal of Lightning's loop."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fork_server import Interpreter
from ports import free_port
from tiny import make_config, make_shards, make_tokenizer

from megatron_anymal.config import ConfigError, RunConfig

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A configuration folder with its data."""
    folder = tmp_path_factory.mktemp("pretrain")
    tokenizer = make_tokenizer(folder / "tokenizer")
    data = make_shards(folder / "data", tokenizer, 24, ("image", "audio", "text"))
    values = make_config(data, tokenizer, folder / "run").to_dict()
    values["trainer"]["max_steps"] = 2
    del values["model"]["modalities"]["imu"]
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"defaults": ["anymal", "_self_"], **values}))
    return folder


def anymal(folder: Path, *arguments: str) -> tuple[str, str]:
    """Run `pretrain` on two processes from another working directory; return their output and errors.

    Rank 0 is a new interpreter, so that messages of libraries on import would be seen. Rank 1 is a fork.
    """
    command = ["-m", "megatron_anymal", "pretrain", f"--config-path={folder}", "--config-name=tiny", *arguments]
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    first, second = ({**os.environ, **job, "RANK": rank, "LOCAL_RANK": rank} for rank in "01")
    files = folder / "out", folder / "err"
    other = Interpreter(*command, output=files, cwd=folder, environment=second)
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=first, capture_output=True, text=True, timeout=240
    )
    out, err = (file.read_text() for file in files)
    assert done.returncode == 0 and other.wait(240) == 0, done.stderr[-3000:] + err[-3000:]
    return done.stdout + out, done.stderr + err


def logged_steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_leave_one_run_folder_with_tensorboard(folder):
    run = folder / "two"
    given = ["trainer.devices=2", "model.tensor_model_parallel_size=2", f"exp_manager.explicit_log_dir={run}"]
    printed, errors = anymal(folder, *given)
    # Only the run writes to the console: messages of libraries at startup are silenced.
    own = ("step ", "saved ", "waiting for ", "2 process(es)", "no MFU: ")
    assert errors == "" and all(line.startswith(own) for line in printed.splitlines())
    assert sorted(set(logged_steps(run))) == [1, 2]
    events = list(run.rglob("events.out.tfevents.*"))
    # Only the reporting rank writes; Hydra leaves no files behind and exp_manager creates no folder for earlier files.
    assert len(events) == 1 and events[0].parent == run and not list(run.glob("run_*"))
    assert "pretrain" in (run / "cmd-args.log").read_text()
    assert not (folder / "outputs").exists() and not (folder / ".hydra").exists()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written = EventAccumulator(str(run))
    written.Reload()
    tags = written.Tags()["scalars"]
    (loss,) = [tag for tag in tags if tag in ("loss", "train/loss", "train_loss")]
    assert [event.step for event in written.Scalars(loss)] == [1, 2]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"create_wandb_logger": True}, r"wandb_logger_kwargs\.name"),
        ({"create_wandb_logger": True, "wandb_logger_kwargs": {"name": "a"}}, r"wandb_logger_kwargs\.project"),
        ({"wandb_logger_kwargs": {"name": "a"}}, "create_wandb_logger is false"),
    ],
)
def test_wandb_settings_are_checked_before_anything_starts(changes, says):
    from megatron_anymal.nemo.entry import run

    config = RunConfig()
    for key, value in changes.items():
        setattr(config.exp_manager, key, value)
    with pytest.raises(ConfigError, match=says):
        run(config)


def test_lightnings_loop_is_refused(folder):
    from megatron_anymal.nemo.entry import unfitted_trainer
    from megatron_anymal.nemo.model import MegatronAnyMALModel

    config = make_config("data", "tokenizer", folder / "unused")
    trainer = unfitted_trainer(config.trainer.max_steps)
    model = MegatronAnyMALModel(config, trainer)
    with pytest.raises(RuntimeError, match=r"Call model\.fit\(\)"):
        trainer.fit(model)
    with pytest.raises(RuntimeError, match=r"Call model\.fit\(\)"):
        model.training_step(None, 0)
    assert not (folder / "unused").exists()


def test_setup_of_data_replaces_the_section():
    from megatron_anymal.nemo.model import MegatronAnyMALModel

    model = MegatronAnyMALModel(make_config("data", "tokenizer", Path("run")))
    model.setup_training_data({"a": {"path": "x", "weight": 2}})
    model.setup_validation_data({"b": {"path": "y"}})
    assert model.config.data.train["a"].weight == 2.0 and model.config.data.validation["b"].path == "y"
    assert model.cfg.run.data.train.a.path == "x"
    with pytest.raises(ConfigError, match=r"data\.train\.a\.pth"):
        model.setup_training_data({"a": {"pth": "x"}})
