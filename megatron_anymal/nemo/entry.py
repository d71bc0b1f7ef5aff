"""`anymal pretrain`, `sft` and `dpo`: configuration -> engine setup -> unfitted Trainer -> exp_manager -> loop.

Lightning's loop is not used for training. The engine keeps the only step counter, so that checkpoints, resume, signals
and logs agree on the step. NeMo provides the run folder and the loggers.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import shutil
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_anymal.config import ConfigError, ExpManagerConfig, RunConfig, TrainerConfig, composed_ahead
from megatron_anymal.config.compose import config_folder, print_config
from megatron_anymal.config.validation import check
from megatron_anymal.resilience import heartbeat, stop_signals
from megatron_anymal.resilience.exit_codes import Exit
from megatron_anymal.resilience.failure_record import record_failure

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from megatron_anymal.parallel import ParallelLayout
    from megatron_anymal.planning.layouts.hardware import Hardware

# Files that exp_manager writes into the run folder at every start.
_NEMO_FILES = {"cmd-args.log", "git-info.log", "nemo_error_log.txt", "lightning_logs.txt"}

_EPILOG = """overrides:
  trainer.num_nodes=4                   set a value
  +data.train.extra.path=data/extra     add an entry of a dict
  ~model.modalities.audio               remove one

several processes:
  torchrun --nproc-per-node=8 -m megatron_anymal JOB --config-name=NAME trainer.devices=8 ..."""


def pretrain(argv: Sequence[str]) -> int:
    """Run alignment pre-training; return the exit code.

    Raises:
        ConfigError: a setting cannot work; raised before any process group or file is created.
        DataError, CheckpointError, StorageError: with --dry-run, see `dry_run.simulate.examine`; otherwise as in
            `train.loop.fit`.
    """
    return _main("pretrain", "Align modalities to a frozen Llama.", argv)


def sft(argv: Sequence[str]) -> int:
    """Run instruction tuning; otherwise, including ConfigError, DataError, CheckpointError and StorageError, as
    `pretrain`."""
    return _main("sft", "Tune an aligned model on conversations: adapters, projectors only, or the whole Llama.", argv)


def dpo(argv: Sequence[str]) -> int:
    """Run conservative DPO; otherwise, including ConfigError, DataError, CheckpointError and StorageError, as
    `pretrain`."""
    return _main("dpo", "Continue an SFT run's adapters on pairs of preferred and rejected answers.", argv)


def _main(job: str, description: str, argv: Sequence[str]) -> int:
    arguments = _parser(job, description).parse_intermixed_args(argv)
    composed = composed_ahead.composed(arguments.config_name, config_folder(arguments.config_path), arguments.overrides)
    if arguments.print_config:
        print_config(composed, explained=arguments.explain)
        return 0
    if arguments.explain:
        raise ConfigError("--explain describes what --print-config prints. Add --print-config.")
    if composed.config.job != job:
        raise ConfigError(
            f"--config-name={arguments.config_name} is for the job {composed.config.job!r}. Start it with "
            f"`anymal {composed.config.job}`, or set job={job}."
        )
    check(composed.config)
    gpu = _planned_gpu(composed.config.trainer)
    if arguments.dry_run:
        from megatron_anymal.dry_run.report import print_dry_run

        _check_loggers(composed.config.exp_manager)
        if gpu is not None:
            from megatron_anymal.model.memory.recompute import MARGIN

            composed.config.model.memory_gb = composed.config.model.memory_gb or gpu.memory_gb * (1 - MARGIN)
        print_dry_run(composed.config)
        if gpu is not None and os.environ.get("RANK", "0") == "0":
            from megatron_anymal.planning.layouts.prediction import describe_prediction

            print("\n" + describe_prediction(composed.config, gpu))
        return 0
    # From here on, which is before the slow imports, a signal is a stop request.
    with stop_signals.handle_stop_signals():
        return int(run(composed.config))


def _planned_gpu(trainer: TrainerConfig) -> Hardware | None:
    """Return the hardware that trainer.gpu names; None if it names none."""
    if not trainer.gpu:
        return None
    # Imports yaml.
    from megatron_anymal.planning.layouts.hardware import load_hardware

    return load_hardware(trainer.gpu, "trainer.gpu")


def run(config: RunConfig) -> Exit:
    """Train with the engine, using NeMo's run folder and loggers. Called on every rank.

    Returns:
        DONE, or REQUEUE if the run was asked to stop before its end.
    """
    try:
        return _run(config)
    except BaseException as error:
        record_failure(config.run_dir, error)
        raise


def _run(config: RunConfig) -> Exit:
    from megatron_anymal.checkpoint.run_lock import run_lock
    from megatron_anymal.nemo.model import MegatronAnyMALModel
    from megatron_anymal.parallel import initialize, shutdown
    from megatron_anymal.train.build import check_run

    _check_loggers(config.exp_manager)
    check_run(config)
    with heartbeat.publish(config.run_dir):
        # Must precede the Trainer: after it, Lightning would undo the engine's setup of torch.
        layout = initialize(config)
        trainer = unfitted_trainer(config.trainer.max_steps)
        # Must precede exp_manager, which moves files in the run's folder.
        with run_lock(config.run_dir, config.exp_manager.lock_timeout_seconds):
            manage_experiment(trainer, config.exp_manager, config.run_dir, layout)
            outcome = MegatronAnyMALModel(config, trainer, layout=layout).fit()
        # Only after success: if a rank has failed, the others would wait for it here.
        shutdown()
    gpu = _planned_gpu(config.trainer)
    if gpu is not None and layout.reports and outcome == Exit.DONE:
        from megatron_anymal.planning.layouts.comparison import compare_or_warn

        print(compare_or_warn(config, gpu), flush=True)
    return outcome


def unfitted_trainer(max_steps: int) -> Trainer:
    """Create a Lightning Trainer that only holds the loggers and is never fitted.

    It always gets one CPU device and the plain environment: the engine manages processes and devices, and Lightning's
    own checks of a torchrun or Slurm environment would refuse jobs that the engine can run.
    """
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.pytorch import Trainer

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
        return Trainer(
            accelerator="cpu",
            devices=1,
            plugins=[LightningEnvironment()],
            max_steps=max_steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )


def manage_experiment(trainer: Trainer, section: ExpManagerConfig, run_dir: Path, layout: ParallelLayout) -> None:
    """Create the run folder and, on the reporting rank, the loggers with NeMo's exp_manager.

    The other keys of the section are handled by the engine: max_time_per_run, resume_if_exists,
    resume_ignore_no_checkpoint and checkpoint.
    """
    import logging

    from nemo.utils import logging as nemo_logging
    from nemo.utils.exp_manager import exp_manager

    previous = nemo_logging.getEffectiveLevel()
    # At INFO, exp_manager prints its whole schema.
    nemo_logging.setLevel(logging.WARNING)
    try:
        _move_only_nemos_files()
        exp_manager(
            trainer,
            {
                # All starts of a run share one folder; with exp_dir, a resumed run would open another version's folder.
                "explicit_log_dir": str(run_dir),
                "create_tensorboard_logger": section.create_tensorboard_logger and layout.reports,
                "create_wandb_logger": section.create_wandb_logger and layout.reports,
                "wandb_logger_kwargs": dict(section.wandb_logger_kwargs),
                "create_checkpoint_callback": False,
                "create_preemption_callback": False,
                "resume_if_exists": False,
                "log_step_timing": False,
                "log_tflops_per_sec_per_gpu": False,
                "seconds_to_sleep": 0,
            },
        )
    finally:
        nemo_logging.setLevel(previous)
    if layout.reports:
        # exp_manager creates these even if it has no file to move, as at the first start of a run.
        for folder in run_dir.glob("run_[0-9]*"):
            with suppress(OSError):
                folder.rmdir()


def _move_only_nemos_files() -> None:
    """Restrict exp_manager to moving its own files.

    When a run is restarted, exp_manager moves every file in its folder to run_N/. The engine, however, continues its
    metrics and its list of skipped samples where the run was interrupted.
    """
    module = importlib.import_module("nemo.utils.exp_manager")

    def move(source: str, target: str) -> None:
        name = Path(source).name
        if name in _NEMO_FILES or name.startswith("nemo_log_"):
            shutil.move(source, target)

    module.move = move  # type: ignore[attr-defined]


def _check_loggers(section: ExpManagerConfig) -> None:
    if not section.create_wandb_logger:
        if section.wandb_logger_kwargs:
            raise ConfigError(
                "exp_manager.wandb_logger_kwargs is set but exp_manager.create_wandb_logger is false. Set it to true, "
                "or remove the arguments."
            )
        return
    missing = [name for name in ("name", "project") if name not in section.wandb_logger_kwargs]
    if missing:
        raise ConfigError(
            f"exp_manager.create_wandb_logger=true needs exp_manager.wandb_logger_kwargs.{missing[0]}. "
            f"Add +exp_manager.wandb_logger_kwargs.{missing[0]}=..."
        )
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "exp_manager.create_wandb_logger=true needs the package wandb. Install it with `pip install wandb`, or set "
            "exp_manager.create_wandb_logger=false."
        )


def _parser(job: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"anymal {job}",
        description=description,
        epilog=_EPILOG.replace("JOB", job),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-name", "-cn", required=True, help="YAML file of the configuration folder")
    parser.add_argument("--config-path", "-cp", help="configuration folder; default: the shipped nemo_configs")
    parser.add_argument("--print-config", action="store_true", help="print every value and its origin, then stop")
    parser.add_argument("--explain", action="store_true", help="with --print-config: also what each key means")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan for each rank, then stop; needs no GPU"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="see below")
    return parser
