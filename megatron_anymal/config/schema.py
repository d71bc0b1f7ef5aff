"""The configuration of a run: every option, its default and what it means.

Plain dataclasses, so that the engine, tests and benchmarks need no configuration library. `config.compose` builds this
schema from YAML files and overrides; `config.validation` rejects combinations that cannot work. The string below each
field is its documentation: `help()`, `--print-config --explain` and docs/reference/configuration.md show it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_anymal.config.data_section import DataConfig
from megatron_anymal.config.field_docs import add_field_docs
from megatron_anymal.config.model_section import ModelConfig


class ConfigError(ValueError):
    """A setting that cannot work. The message names the key and the fix."""


@dataclass
class TrainerConfig:
    """Job size, step count and logging. Key names follow NeMo's `trainer:` section."""

    num_nodes: int = 1
    """Number of nodes."""
    devices: int = 1
    """Processes per node, one per GPU."""
    gpu: str = ""
    """The job's GPU as `anymal plan --gpu` names it. If set, `--dry-run` prints what the plan predicts for the run,
    the log gives MFU as a share of its data sheet's rate, and a run that ends compares itself with the plan. If empty,
    MFU is a share of a rate measured at the start; on CPUs there is none. `anymal plan --write` sets it."""
    precision: str = "bf16"
    """`bf16` (bf16 compute, fp32 main weights and gradients) or `32` (fp32 throughout)."""
    max_steps: int = 1000
    """Optimizer steps of the whole run, including those before a resume."""
    log_every_n_steps: int = 10
    """Steps between log lines."""
    val_check_interval: int = 500
    """Steps between validations. 0 validates only after the last step."""
    limit_val_batches: int = 8
    """Global batches per validation."""
    sampled_answers: int = 0
    """Validation samples that the model answers at each validation, for reading: answers.jsonl and TensorBoard."""
    gradient_clip_val: float = 1.0
    """Maximum global L2 norm of the gradient. 0 disables clipping."""


@dataclass
class CheckpointConfig:
    """When checkpoints are written and how many are kept."""

    every_n_train_steps: int = 500
    """Steps between checkpoints. 0 writes one only after the last step."""
    async_save: bool = True
    """Write and commit in a background thread: training waits only for the copy to host memory, which must have room
    for it. The next checkpoint, and the end of the run, wait for the one in progress."""
    keep_last: int = 3
    """Number of newest checkpoints to keep; older ones are deleted after a newer one is committed. 0 keeps all."""
    keep_every_n_steps: int = 0
    """Also keep checkpoints whose step is a multiple of this. 0 disables the rule."""
    keep_best: int = 0
    """Also keep this many of the best checkpoints, ranked by the validation at the same step. 0 disables the rule."""
    keep_best_metric: str = "val_loss"
    """Metric that ranks them: val_loss, val_loss/NAME of a modality or text, or in DPO another metric of its
    validation such as val_rewards/accuracy."""
    keep_best_mode: str = "min"
    """`min` or `max`: which end of the metric is best."""


@dataclass
class ExpManagerConfig:
    """Run folder, loggers and resume. Key names follow NeMo's `exp_manager:` section."""

    explicit_log_dir: str = ""
    """The run's folder. Empty: exp_dir/name."""
    exp_dir: str = "runs"
    """Parent folder of runs; used if explicit_log_dir is empty."""
    name: str = "anymal"
    """Name of the run; used if explicit_log_dir is empty."""
    create_tensorboard_logger: bool = True
    """Write TensorBoard event files into the run's folder."""
    create_wandb_logger: bool = False
    """Log to Weights & Biases; needs the package wandb."""
    wandb_logger_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of Lightning's WandbLogger (project, name, ...), passed unchanged."""
    max_time_per_run: str = ""
    """Stop with a checkpoint after this time, `DD:HH:MM:SS`. Empty: no limit."""
    resume_if_exists: bool = True
    """Continue from the newest valid checkpoint in the run's folder."""
    resume_ignore_no_checkpoint: bool = True
    """Start from step 0 if there is no checkpoint; false makes that an error."""
    lock_timeout_seconds: float = 120.0
    """Seconds without a sign of life after which a job on another node no longer holds the run's folder."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When checkpoints are written and how many are kept."""


@dataclass
class ResilienceConfig:
    """Hangs, stragglers, non-finite gradients, fault rehearsals, and what may change at a resume."""

    hang_timeout: float = 600.0
    """Seconds without progress in a step, its data or a validation, or of a stopped process anywhere, after which the
    launcher ends all processes. 0: never."""
    startup_timeout: float = 1800.0
    """The same, in seconds, from the start to the end of the first step."""
    checkpoint_timeout: float = 1800.0
    """The same, in seconds, while waiting for a checkpoint."""
    max_skipped_steps: int = 3
    """Consecutive steps with a non-finite gradient (they change no weights) after which the run stops."""
    straggler_ratio: float = 2.0
    """A rank is reported as slow if its own compute time exceeds this multiple of its pipeline stage's median."""
    faults: list[str] = field(default_factory=list)
    """Faults to rehearse, such as `kill:rank=1,step=7`; see config/fault_grammar.py."""
    standby: bool = True
    """`anymal launch` on Linux: fork the ranks of a node from a process that has imported everything, so that a start
    or a restart takes none of the time of the imports. It takes about 0.5 GiB of the node's memory, most of it shared
    with the ranks."""
    keep_survivors: bool = True
    """`anymal launch` on Linux, with `standby`: when a rank is killed or crashes, the others keep their process and
    their frozen weights, leave the job and join that of the next attempt. Has no effect on machines with an NVIDIA GPU:
    a GPU may be stuck in a collective with the lost rank, so all ranks are restarted there."""
    peer_memory: bool = True
    """`anymal launch` on Linux: keep copies of the trainable weights and optimizer state in memory that outlives the
    ranks: twice on the rank's own node and, with several nodes, twice on the next one. A restart continues from the
    newest step for which a copy of every rank's part survives, instead of from a checkpoint."""
    peer_memory_interval: int = 0
    """Steps between two copies. 0: the smallest number for which they take at most 1 % of the time."""
    allow_changes: list[str] = field(default_factory=list)
    """What may differ from the checkpoint that a run continues from: config, tokenizer, base, data."""


@dataclass
class RunConfig:
    """A whole run."""

    job: str = "pretrain"
    """`pretrain`, `sft` or `dpo`; set by the command that starts the run."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Job size and step count."""
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)
    """Run folder, loggers and checkpoints."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Model, layout and optimizer."""
    data: DataConfig = field(default_factory=DataConfig)
    """Datasets and loading."""
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    """Behaviour on faults and at a resume."""

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain dicts and lists."""
        return asdict(self)

    @property
    def run_dir(self) -> Path:
        """Folder of the run: logs, checkpoints, reports."""
        chosen = self.exp_manager.explicit_log_dir
        return Path(chosen) if chosen else Path(self.exp_manager.exp_dir) / self.exp_manager.name

    @property
    def world_size(self) -> int:
        """Processes of the whole job."""
        return self.trainer.num_nodes * self.trainer.devices

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the model."""
        return self.world_size // self.model.model_parallel_size


add_field_docs(__name__)
