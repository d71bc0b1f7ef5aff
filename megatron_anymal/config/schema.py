"""The configuration of a run: every option, its default and what it means.

Plain dataclasses, so that the engine, tests and benchmarks need no configuration library. `config.compose` builds this
schema from YAML files and overrides; `config.validation` rejects combinations that cannot work. The string below each
field is its documentation: `help()`, `--print-config --explain` and docs/reference/configuration.md show it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_anymal.config.field_docs import add_field_docs

# FP8 matrix dimensions must be multiples of this (Transformer Engine).
FP8_MULTIPLE = 16


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
    """The job's GPU as `anymal plan --gpu` names it. If set, `--dry-run` prints what the plan predicts for the run, and
    a run that ends compares itself with it. `anymal plan --write` sets it."""
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
class EncoderConfig:
    """Encoder of one modality: its architecture, and pre-trained weights or a small random shape."""

    type: str = ""
    """clip, dinov2, videomae, clap (transformers), imu2clip, identity, or a type that a plug-in registers."""
    path: str = ""
    """Local HuggingFace folder (config.json and weights). Empty: random weights of the shape in `config`."""
    config: dict[str, Any] = field(default_factory=dict)
    """Keys of the architecture's own configuration. Must be empty if `path` is set."""
    preprocessor: dict[str, Any] = field(default_factory=dict)
    """Preprocessing, as in a preprocessor_config.json. Empty: the one in the encoder's folder."""
    freeze: bool = True
    """Keep the encoder's weights fixed (AnyMAL section 3.1)."""
    max_pieces_per_call: int = 64
    """Pieces (image tiles, video clips, audio or IMU windows) per encoder call; bounds activation memory."""


@dataclass
class ProjectorConfig:
    """Projector of one modality (AnyMAL table 11: a Perceiver resampler for vision, linear layers otherwise)."""

    type: str = "resampler"
    """`resampler` or `linear`."""
    num_layers: int = 6
    """Number of layers."""
    num_tokens: int = 64
    """Soft tokens per piece."""
    hidden_size: int = 0
    """Width of the resampler, or of the hidden layers of a deeper linear projector. 0: the encoder's width."""
    num_attention_heads: int = 16
    """Attention heads of a resampler."""
    ffn_multiplier: int = 4
    """Feed-forward width of a resampler, as a multiple of its width."""
    freeze: bool = False
    """Keep the projector's weights fixed."""


@dataclass
class ModalityConfig:
    """How one kind of media becomes soft tokens."""

    kind: str = ""
    """Loader of the media: image, video, audio, imu, or one that a plug-in registers. Empty: the section's name."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """Encoder of the pieces."""
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    """Maps encoder features to soft tokens."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the modality itself (max_grid, clip_seconds, ...); see the data guide and
    megatron_anymal/modalities/."""
    placeholder: str = ""
    """Reserved vocabulary token that stands for one soft token of this modality."""
    cost_per_piece: float = 0.0
    """Encoder time of one piece relative to the other modalities', in any unit. Needed for, and used by,
    model.encoder_costs=configured only."""


@dataclass
class LanguageModelConfig:
    """The Llama."""

    path: str = ""
    """Local HuggingFace folder: config.json, and weights if load_weights is true."""
    config: dict[str, Any] = field(default_factory=dict)
    """Keys of a transformers LlamaConfig, instead of `path`: random weights of that shape."""
    load_weights: bool = True
    """Load the weights in `path`; false starts from random weights of its shape."""
    checkpoint: str = ""
    """A checkpoint of this trainer (e.g. from import_hf) whose Llama is the base; it defines the shape, too."""
    freeze: bool = True
    """Keep the Llama's weights fixed. LoRA adapters train regardless."""


@dataclass
class LoraConfig:
    """Low-rank adapters on the frozen Llama (AnyMAL section 4: r 8, alpha 32, all linear layers)."""

    r: int = 0
    """Rank of each adapter. 0: no adapters."""
    alpha: float = 32.0
    """The adapter's output is scaled by alpha / r."""
    dropout: float = 0.0
    """Dropout probability on the adapter's input during training."""
    targets: list[str] = field(default_factory=lambda: ["*"])
    """Which linear layers get an adapter: patterns over q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and
    down_proj, or over full names such as layers.3.self_attn.q_proj."""


@dataclass
class NeftuneConfig:
    """Uniform noise on the Llama's input embeddings during training (NEFTune; AnyMAL uses alpha 10 in SFT and DPO)."""

    alpha: float = 0.0
    """Noise magnitude: values are uniform within alpha / sqrt(document length x hidden size). 0: no noise."""
    embeddings: str = "all"
    """`all` adds noise to text and soft tokens alike, as in NEFTune's algorithm 1; `text` leaves soft tokens clean,
    like implementations that hook the word embedding."""


@dataclass
class DpoConfig:
    """Conservative DPO (AnyMAL equation 5; Mitchell 2023). Used by `anymal dpo` only."""

    beta: float = 0.1
    """Strength of the KL constraint to the reference model. The paper states no value; 0.1 is DPO's usual one."""
    label_smoothing: float = 0.05
    """Assumed probability that a preference label is flipped."""
    reference: str = "cached"
    """`cached` keeps the reference's log-probabilities in the run's folder; `recomputed` computes them in every step.
"""


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
class DistributedDataParallelConfig:
    """Gradient and parameter communication between data-parallel replicas."""

    use_distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks (ZeRO stage 1)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass runs; needs the distributed optimizer."""
    bucket_size: int = 0
    """Parameters per gradient bucket. 0: megatron-core's default."""


@dataclass
class ModelConfig:
    """The model, its parallel layout, and its optimizer."""

    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    """The Llama."""
    modalities: dict[str, ModalityConfig] = field(default_factory=dict)
    """Encoder and projector of each modality, by a name of your choice."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters."""
    neftune: NeftuneConfig = field(default_factory=NeftuneConfig)
    """Embedding noise."""
    dpo: DpoConfig = field(default_factory=DpoConfig)
    """Preference optimization."""
    loss_normalization: str = "token"
    """`token` averages the loss over the batch's target tokens; `sample` averages over samples of each sample's mean,
    so that short answers count as much as long ones. Not used by DPO."""
    plugins: list[str] = field(default_factory=list)
    """Python files to import first; each registers a modality or an encoder. Their code runs: see the trust guide."""

    tensor_model_parallel_size: int = 1
    """Tensor-parallel ranks."""
    sequence_parallel: bool = False
    """Shard activations of norms and residuals over the tensor-parallel ranks."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages."""
    num_layers_in_first_pipeline_stage: int = 0
    """Transformer layers of the first stage, if it should hold fewer than the others (it also runs encoders). 0: an
    even split."""
    num_layers_in_last_pipeline_stage: int = 0
    """The same for the last stage, which also computes the logits."""
    virtual_pipeline_model_parallel_size: int = 1
    """Model chunks per stage (interleaved 1F1B), to shrink the pipeline bubble."""
    overlap_p2p_comm: bool = True
    """Overlap pipeline sends and receives with compute; interleaved schedules only."""
    context_parallel_size: int = 1
    """Context-parallel ranks: each holds a zig-zag share of every document's tokens."""

    micro_batch_size: int = 1
    """Packs per forward pass and replica."""
    global_batch_size: int = 128
    """Samples per optimizer step, over all replicas."""
    encoder_costs: str = "operations"
    """Costs of encoder inputs by which packs are balanced: `operations` (floating-point operations, from the encoders'
    shapes), `measured` (rank 0 times the encoders at the run's first start; encoder_costs.json in the run's folder
    keeps the times for all later ones) or `configured` (modalities.NAME.cost_per_piece)."""

    recompute_granularity: str = ""
    """Activation recomputation: `""` (none), `full`, `selective`, or `auto` (the cheapest setting that fits in
    memory)."""
    recompute_method: str = "uniform"
    """`uniform` or `block`; full recomputation only."""
    recompute_num_layers: int = 1
    """Layers per recomputed group (uniform) or recomputed layers per stage (block); full recomputation only."""
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    """Modules that selective recomputation repeats."""
    memory_gb: float = 0.0
    """Memory budget per process for recompute_granularity=auto, in GB (1e9 bytes). 0: 90 % of the GPU's memory, or on
    CPUs this process's share of the free memory."""

    transformer_impl: str = "auto"
    """`auto` (Transformer Engine if it can run), `local` or `transformer_engine`."""
    attention: str = "auto"
    """Attention kernel of local layers: `auto` (the fastest that can run), `flash_attn`, `flex` or `sdpa`."""
    fp8: str = ""
    """`""` (off), `hybrid` or `e4m3`; needs Transformer Engine and a GPU with FP8."""
    fp8_recipe: str = "tensorwise"
    """FP8 scaling: `tensorwise` (current scaling) or `delayed` (from an amax history, which checkpoints then hold)."""
    fp8_primary_weights: bool = False
    """Store the frozen Llama's matrices in FP8 only, one byte per parameter."""

    seed: int = 1234
    """Seed of initialization, data order, dropout and noise."""
    restore_from_path: str = ""
    """Checkpoint whose trained weights this run starts from (without its step and optimizer state). DPO: the SFT run.
"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    ddp: DistributedDataParallelConfig = field(default_factory=DistributedDataParallelConfig)
    """Data parallelism."""

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one replica of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


@dataclass
class DatasetConfig:
    """One folder of shards with its index, made by `anymal prepare`."""

    path: str = ""
    """The folder."""
    weight: float = 1.0
    """Sampling weight relative to the other datasets of the mixture."""


@dataclass
class LimitsConfig:
    """Largest accepted inputs. Anything larger is rejected by name: left out of an index, or skipped in training.

    With the defaults, the worst accepted sample adds at most 512 MiB to a loader process.
    """

    max_load_bytes: int = 512 * 2**20
    """Size of a media file plus an estimate of what decoding it takes, in bytes: pixels x bytes per pixel of a
    picture's format; for a video, the frames that its codec and level let a decoder hold."""
    max_pixels: int = 30_000_000
    """Width x height of a picture."""
    max_frame_pixels: int = 8_900_000
    """Width x height of a video's frames; the default admits 4096 x 2160."""
    max_seconds: float = 14_400.0
    """Length of a video, a recording or an IMU signal: 4 hours. They are read block by block, so this bounds time."""
    max_values: int = 1_500_000_000
    """Numbers in an IMU file (rows x columns), or samples of a recording (frames x channels): 4 hours of 48 kHz
    stereo."""
    max_member_bytes: int = 256 * 2**20
    """Size of one member of a shard, or of one media file of a manifest, in bytes."""
    max_text_bytes: int = 2**20
    """Size of a sample's .txt or .json, or of one line of a manifest, in bytes."""
    max_json_depth: int = 32
    """Nesting depth of a sample's .json."""


DEFAULT_LIMITS = LimitsConfig()


@dataclass
class DataConfig:
    """Datasets, tokenizer, packing and loading."""

    train: dict[str, DatasetConfig] = field(default_factory=dict)
    """Training datasets by name; a weighted mixture."""
    validation: dict[str, DatasetConfig] = field(default_factory=dict)
    """Validation datasets by name."""
    tokenizer: str = ""
    """Local folder of a HuggingFace tokenizer; the one that the indexes were made with."""
    seq_length: int = 4096
    """Longest document and longest pack, in tokens."""
    too_long: str = "refuse"
    """Samples longer than seq_length: `refuse` stops before training; `drop` leaves them out and counts them."""
    max_bad_share: float = 0.01
    """Fraction of a step's samples that may be unreadable (skipped, counted and named) before the run stops."""
    num_workers: int = 2
    """Loader processes per training process. 0 loads in the training process."""
    prefetch_steps: int = 2
    """Steps that the loader may run ahead."""
    worker_memory_limit_gib: float = 0.0
    """GiB by which a loader process may grow. If one grows by more, the loader processes of its rank are restarted
    between two steps, without a change in the data. 0: no limit."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Largest accepted inputs."""


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
    peer_memory: bool = True
    """`anymal launch` on Linux: keep copies of the trainable weights and optimizer state in memory that outlives the
    ranks: twice on the rank's own node and, with several nodes, twice on the next one. A restart continues from the
    newest step of which every rank's part is left, instead of from a checkpoint."""
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
