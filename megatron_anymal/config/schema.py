"""The configuration of a run: every option and its default.

Plain dataclasses, so that the engine, the tests and the benchmarks need no configuration library. `config_io`
composes YAML files and overrides into this schema; `config_checks` refuses what cannot work.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# What the sizes of FP8 matrix products must divide by.
FP8_MULTIPLE = 16


class ConfigError(ValueError):
    """A setting that cannot work. The message names the key and the mend."""


@dataclass
class TrainerConfig:
    """Size of the job and its clock. Key names follow NeMo's `trainer:` section."""

    num_nodes: int = 1
    # Processes (one a GPU) on each node.
    devices: int = 1
    # "32" (everything fp32) or "bf16" (bf16 compute, fp32 main weights and gradients).
    precision: str = "bf16"
    # Optimizer steps of the whole run.
    max_steps: int = 1000
    log_every_n_steps: int = 10
    # Steps between validations; 0 validates only after the last step.
    val_check_interval: int = 500
    # Global batches per validation.
    limit_val_batches: int = 8
    # Validation samples that are answered with each validation, to be read: answers.jsonl and TensorBoard.
    sampled_answers: int = 0
    # Largest global gradient norm; 0 switches clipping off.
    gradient_clip_val: float = 1.0


@dataclass
class CheckpointConfig:
    """When a checkpoint is written and how many are kept."""

    # Steps between checkpoints; 0 writes one only after the last step.
    every_n_train_steps: int = 500
    # Write and commit while training goes on: a step waits only for the copy to host memory, which must be free. A
    # newer checkpoint waits for the one under way, and so does the run's end.
    async_save: bool = True
    # Newest checkpoints kept; older ones go after a newer one is committed. 0 keeps all.
    keep_last: int = 3
    # Kept besides: those whose step divides by this; 0: none.
    keep_every_n_steps: int = 0
    # Kept besides: so many of the best, by what the validation of the same step measured; 0: none.
    keep_best: int = 0
    # val_loss, val_loss/NAME of a modality or text, or for the job dpo another of its validation's, such as
    # val_rewards/accuracy.
    keep_best_metric: str = "val_loss"
    # min or max: which of them is best.
    keep_best_mode: str = "min"


@dataclass
class ExpManagerConfig:
    """Run folder and loggers. Key names follow NeMo's `exp_manager:` section."""

    # The run's folder. Empty: exp_dir/name.
    explicit_log_dir: str = ""
    exp_dir: str = "runs"
    name: str = "anymal"
    create_tensorboard_logger: bool = True
    create_wandb_logger: bool = False
    # Passed to the W&B logger as they are (project, name, ...).
    wandb_logger_kwargs: dict[str, Any] = field(default_factory=dict)
    # Stop with a checkpoint after this time, "DD:HH:MM:SS". Empty: no limit.
    max_time_per_run: str = ""
    # Continue from the newest valid checkpoint in the run's folder.
    resume_if_exists: bool = True
    # Start afresh when there is none; false makes that an error.
    resume_ignore_no_checkpoint: bool = True
    # A job on another machine that holds the run's folder counts as gone after so long without a sign of life.
    lock_timeout_seconds: float = 120.0
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass
class EncoderConfig:
    """One modality's encoder: an architecture, and weights or a small random shape."""

    # clip, dinov2, videomae, clap (transformers), imu2clip, identity, or one a plug-in registers.
    type: str = ""
    # A local HuggingFace folder (config.json and weights). Empty: random weights from `config`.
    path: str = ""
    # Keys of the architecture's own configuration; with `path` they must stay empty.
    config: dict[str, Any] = field(default_factory=dict)
    # How media are prepared for it, as a preprocessor_config.json says it. Empty: as the folder's own does.
    preprocessor: dict[str, Any] = field(default_factory=dict)
    freeze: bool = True
    # Pieces run through the encoder at once; bounds its activation memory.
    max_pieces_per_call: int = 64


@dataclass
class ProjectorConfig:
    """One modality's projector (AnyMAL Table 11: a resampler for vision, linear for the rest)."""

    # resampler or linear.
    type: str = "resampler"
    num_layers: int = 6
    # Soft tokens per media piece.
    num_tokens: int = 64
    # Width of the resampler, or of a deeper linear projector's hidden layers. 0: the encoder's width.
    hidden_size: int = 0
    # Resampler only.
    num_attention_heads: int = 16
    ffn_multiplier: int = 4
    freeze: bool = False


@dataclass
class ModalityConfig:
    """What turns one kind of media into soft tokens."""

    # Class that loads the media: image, video, audio, imu, or one a plug-in registers. Empty: the section's name.
    kind: str = ""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    # The modality's own options (grid size, clip length, ...); see megatron_anymal/modalities/.
    options: dict[str, Any] = field(default_factory=dict)
    # Reserved token of the vocabulary that stands for one soft token of this modality.
    placeholder: str = ""


@dataclass
class LanguageModelConfig:
    """The Llama."""

    # A local HuggingFace folder: config.json, and weights where load_weights is true.
    path: str = ""
    # Keys of a transformers LlamaConfig, instead of `path`: random weights of that shape.
    config: dict[str, Any] = field(default_factory=dict)
    load_weights: bool = True
    # A checkpoint of this trainer whose Llama is taken as the base (it brings its own shape).
    checkpoint: str = ""
    freeze: bool = True


@dataclass
class LoraConfig:
    """Low-rank adapters on the frozen Llama (AnyMAL: r 8, alpha 32, all linear layers)."""

    # Rank of each adapter; 0: none.
    r: int = 0
    # What an adapter gives is scaled by alpha / r.
    alpha: float = 32.0
    # Share of an adapter's input dropped in training.
    dropout: float = 0.0
    # Which projections get one: patterns over q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj, or over
    # their whole names such as layers.3.self_attn.q_proj.
    targets: list[str] = field(default_factory=lambda: ["*"])


@dataclass
class NeftuneConfig:
    """Noise on the Llama's input embeddings, in training only (NEFTune; AnyMAL: alpha 10 in SFT and DPO)."""

    # Uniform noise within alpha / sqrt(document's tokens x hidden size); 0: none.
    alpha: float = 0.0
    # all: text and soft tokens alike, as in NEFTune's algorithm; text: soft tokens stay clean, as in implementations
    # that hook the table of word embeddings.
    embeddings: str = "all"


@dataclass
class DpoConfig:
    """Conservative DPO (AnyMAL eq. 5; Mitchell 2023). Only for the job dpo."""

    # How strongly the policy is held to the reference. The paper does not say.
    beta: float = 0.1
    # Share of preferences taken to be the wrong way round.
    label_smoothing: float = 0.05
    # cached: the reference's log-probabilities are kept in the run folder; recomputed: in every step.
    reference: str = "cached"


@dataclass
class ScheduleConfig:
    """Learning rate over the steps: linear warm-up, then `name`."""

    # cosine, linear or constant.
    name: str = "cosine"
    warmup_steps: int = 0
    # The rate at the end, as a share of optim.lr.
    min_lr_ratio: float = 0.1
    # Step at which the end is reached. 0: trainer.max_steps.
    decay_steps: int = 0


@dataclass
class OptimConfig:
    """AdamW."""

    lr: float = 2.0e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1.0e-8
    weight_decay: float = 0.0
    sched: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass
class DistributedDataParallelConfig:
    """How gradients and parameters travel between data-parallel replicas."""

    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    # Parameters per gradient bucket; 0 lets megatron-core choose.
    bucket_size: int = 0


@dataclass
class ModelConfig:
    """The model, its layout over processes, and its optimizer."""

    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    modalities: dict[str, ModalityConfig] = field(default_factory=dict)
    lora: LoraConfig = field(default_factory=LoraConfig)
    neftune: NeftuneConfig = field(default_factory=NeftuneConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    # What every target counts the same of: token (the mean over the batch's target tokens), or sample (the mean over
    # samples of each one's mean, so that short answers count as much as long ones). Not for the job dpo.
    loss_normalization: str = "token"
    # Files of Python code to import first: each registers a modality or an encoder.
    plugins: list[str] = field(default_factory=list)

    tensor_model_parallel_size: int = 1
    sequence_parallel: bool = False
    pipeline_model_parallel_size: int = 1
    # Layers of the first and last stage, where they should hold fewer than the others. 0: an even split.
    num_layers_in_first_pipeline_stage: int = 0
    num_layers_in_last_pipeline_stage: int = 0
    # Parts that each stage is cut into, so that stages wait less for each other (interleaved 1F1B).
    virtual_pipeline_model_parallel_size: int = 1
    # Virtual pipelines only: send and receive while computing.
    overlap_p2p_comm: bool = True
    context_parallel_size: int = 1

    # Packs that one forward pass of one replica takes.
    micro_batch_size: int = 1
    # Samples per optimizer step.
    global_batch_size: int = 128

    # "", full, selective, or auto: the cheapest of them that fits in memory (train/auto_recompute.py).
    recompute_granularity: str = ""
    # uniform or block; with full only.
    recompute_method: str = "uniform"
    recompute_num_layers: int = 1
    # Parts that selective recompute repeats.
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    # Memory of one process that auto fits in, in GB (1e9 bytes), all of it. 0: a tenth less than its card has; on CPUs
    # its share of what the machine has free.
    memory_gb: float = 0.0

    # auto (Transformer Engine where it can run), local or transformer_engine.
    transformer_impl: str = "auto"
    # Where Transformer Engine's attention is not used: auto (the fastest that can run), flash_attn, flex or sdpa.
    attention: str = "auto"
    # "", hybrid or e4m3; needs Transformer Engine and a card with FP8.
    fp8: str = ""
    # How FP8 numbers are scaled: tensorwise (by the tensor at hand: "current scaling") or delayed (by those before it,
    # whose history then is part of a checkpoint).
    fp8_recipe: str = "tensorwise"
    # Hold the frozen Llama's matrices in FP8 alone, one byte a number.
    fp8_primary_weights: bool = False

    seed: int = 1234
    # A checkpoint whose trainable weights this run starts from (not its step or optimizer).
    restore_from_path: str = ""
    optim: OptimConfig = field(default_factory=OptimConfig)
    ddp: DistributedDataParallelConfig = field(default_factory=DistributedDataParallelConfig)


@dataclass
class DatasetConfig:
    """One prepared folder of shards and its index."""

    path: str = ""
    # Share of the mix, relative to the other datasets' weights.
    weight: float = 1.0


@dataclass
class LimitsConfig:
    """Largest inputs that are accepted. What exceeds one is refused by name: left out of an index, skipped in training.

    The defaults bound what the worst accepted sample costs a loader process to 512 MiB.
    """

    # Bytes of a media file and of what its decoder takes, by estimate: pixels x bytes a pixel of a picture's format;
    # for a video, the frames that its codec and level let a decoder hold.
    max_load_bytes: int = 512 * 2**20
    # Width x height of a picture.
    max_pixels: int = 30_000_000
    # Width x height of a video's frames: 4096 x 2160.
    max_frame_pixels: int = 8_900_000
    # Length of a video, a recording or an IMU signal: 4 hours. They are read block by block, so this bounds time.
    max_seconds: float = 14_400.0
    # Numbers in an IMU file (rows x columns), samples of a recording (frames x channels): 4 hours of stereo at 48 kHz.
    max_values: int = 1_500_000_000
    # Bytes of one member of a shard, or of one media file of a manifest.
    max_member_bytes: int = 256 * 2**20
    # Bytes of a sample's .txt or .json, or of one line of a manifest.
    max_text_bytes: int = 2**20
    # Objects and lists inside each other in a sample's .json.
    max_json_depth: int = 32


DEFAULT_LIMITS = LimitsConfig()


@dataclass
class DataConfig:
    """What is read, in which order, and how it is packed."""

    train: dict[str, DatasetConfig] = field(default_factory=dict)
    validation: dict[str, DatasetConfig] = field(default_factory=dict)
    # A local folder with a HuggingFace tokenizer.
    tokenizer: str = ""
    # Longest document and longest pack, in tokens.
    seq_length: int = 4096
    # A sample longer than seq_length: "refuse" stops before training; "drop" leaves its place empty and counts it.
    too_long: str = "refuse"
    # Share of a step's samples that may be unreadable (they are skipped, counted and named) before the run stops.
    max_bad_share: float = 0.01
    # Loader processes per training process; 0 reads in the training process itself.
    num_workers: int = 2
    # Steps that the loader may be ahead.
    prefetch_steps: int = 2
    limits: LimitsConfig = field(default_factory=LimitsConfig)


@dataclass
class ResilienceConfig:
    """What a run does about hangs, signals and numbers that are none, and what it may find changed at a resume."""

    # Seconds without progress in a step, its data or a validation, or of a stopped process anywhere, until the launcher
    # ends all processes; 0: never.
    hang_timeout: float = 600.0
    # The same from the start to the end of the first step.
    startup_timeout: float = 1800.0
    # The same while a checkpoint is waited for.
    checkpoint_timeout: float = 1800.0
    # Steps in a row without a finite gradient (they change no weight) after which the run stops.
    max_skipped_steps: int = 3
    # A rank whose own compute time is above this multiple of the median of its pipeline stage is named.
    straggler_ratio: float = 2.0
    # Rehearsals, such as "kill:rank=1,step=7"; see resilience/fault_injection.py.
    faults: list[str] = field(default_factory=list)
    # What may differ from the checkpoint that a run continues from: config, tokenizer, base, data.
    allow_changes: list[str] = field(default_factory=list)


@dataclass
class RunConfig:
    """A whole run."""

    # pretrain, sft or dpo: what the run learns from, and the verb that starts it.
    job: str = "pretrain"
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)

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
    def model_parallel_size(self) -> int:
        """Processes that hold one replica of the model."""
        m = self.model
        return m.tensor_model_parallel_size * m.pipeline_model_parallel_size * m.context_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the model."""
        return self.world_size // self.model_parallel_size
