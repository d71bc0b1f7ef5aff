"""The optimizer of a run, and of each alignment of a multiplexed run (`model.optim`, `model.multiplex`)."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_anymal.config.field_docs import add_field_docs


@dataclass
class ScheduleConfig:
    """Learning-rate schedule: linear warm-up, then `name`."""

    name: str = "cosine"
    """`cosine`, `linear` or `constant`."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a fraction of optim.lr."""
    decay_steps: int = 0
    """Step at which the final learning rate is reached. 0: trainer.max_steps."""


@dataclass
class OptimConfig:
    """AdamW."""

    lr: float = 2.0e-4
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of the first and second moment."""
    eps: float = 1.0e-8
    """Term added to the denominator."""
    weight_decay: float = 0.0
    """Decoupled weight decay; never applied to biases and norm weights."""
    sched: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning-rate schedule."""


@dataclass
class AlignmentConfig:
    """One of several alignments in a run, each as if it ran alone; NAME is its modality in `model.modalities`."""

    datasets: list[str] = field(default_factory=list)
    """Its datasets in `data.train`, and those of the same names in `data.validation`. They hold media of its modality
    only, and belong to no other alignment."""
    global_batch_size: int = 0
    """Its samples per optimizer step, over all replicas."""
    max_steps: int = 0
    """Its optimizer steps; it then leaves its place in the packs to the others. 0: trainer.max_steps."""
    gradient_clip_val: float = 1.0
    """Maximum L2 norm of the gradient of its own weights. 0 disables clipping."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Its optimizer. Schedules end at its own last step, unless decay_steps is set."""


add_field_docs(__name__)
