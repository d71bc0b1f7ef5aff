"""The configuration of a run: every option, its default, and the checks that need several options at once.

Plain dataclasses, so that the engine, the tests and the benchmarks need no configuration library. `config_io`
composes YAML files and overrides into this schema.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional


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
    # Newest checkpoints kept; older ones go after a newer one is committed. 0 keeps all.
    keep_last: int = 3


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

    # "", full or selective.
    recompute_granularity: str = ""
    # uniform or block; with full only.
    recompute_method: str = "uniform"
    recompute_num_layers: int = 1
    # Parts that selective recompute repeats.
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])

    # auto (Transformer Engine where it can run), local or transformer_engine.
    transformer_impl: str = "auto"
    # Where Transformer Engine's attention is not used: auto (the fastest that can run), flash_attn, flex or sdpa.
    attention: str = "auto"
    # "", hybrid or e4m3; needs Transformer Engine and a card with FP8.
    fp8: str = ""

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


@dataclass
class AnyMALConfig:
    """A whole run."""

    # pretrain, sft or dpo: what the run learns from, and the verb that starts it.
    job: str = "pretrain"
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)

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


# The order is laid out in blocks with two places for the rarest data set: smaller shares would make them huge.
SMALLEST_SHARE = 1e-5

CHOICES = {
    "job": ("pretrain", "sft", "dpo"),
    "trainer.precision": ("32", "bf16"),
    "model.recompute_granularity": ("", "full", "selective"),
    "model.recompute_method": ("uniform", "block"),
    "model.transformer_impl": ("auto", "local", "transformer_engine"),
    "model.attention": ("auto", "flash_attn", "flex", "sdpa"),
    "model.fp8": ("", "hybrid", "e4m3"),
    "model.neftune.embeddings": ("all", "text"),
    "model.dpo.reference": ("cached", "recomputed"),
    "model.loss_normalization": ("token", "sample"),
    "model.optim.sched.name": ("cosine", "linear", "constant"),
    "data.too_long": ("refuse", "drop"),
}

AT_LEAST = {
    "trainer.num_nodes": 1,
    "trainer.devices": 1,
    "trainer.max_steps": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.val_check_interval": 0,
    "trainer.limit_val_batches": 0,
    "trainer.sampled_answers": 0,
    "trainer.gradient_clip_val": 0,
    "exp_manager.checkpoint.every_n_train_steps": 0,
    "exp_manager.checkpoint.keep_last": 0,
    "model.tensor_model_parallel_size": 1,
    "model.pipeline_model_parallel_size": 1,
    "model.virtual_pipeline_model_parallel_size": 1,
    "model.context_parallel_size": 1,
    "model.num_layers_in_first_pipeline_stage": 0,
    "model.num_layers_in_last_pipeline_stage": 0,
    "model.lora.r": 0,
    "model.lora.dropout": 0,
    "model.neftune.alpha": 0,
    "model.dpo.label_smoothing": 0,
    "model.micro_batch_size": 1,
    "model.global_batch_size": 1,
    "model.recompute_num_layers": 1,
    "model.optim.lr": 0,
    "model.optim.weight_decay": 0,
    "model.optim.sched.warmup_steps": 0,
    "model.optim.sched.decay_steps": 0,
    "model.optim.sched.min_lr_ratio": 0,
    "data.seq_length": 1,
    "data.max_bad_share": 0,
    "data.num_workers": 0,
    "data.prefetch_steps": 1,
}


def value_at(config: AnyMALConfig, key: str) -> Any:
    """The value behind a dotted key."""
    node: Any = config
    for part in key.split("."):
        node = node[part] if isinstance(node, dict) else getattr(node, part)
    return node


def check(config: AnyMALConfig) -> None:
    """Refuse what cannot work, before any process group or file is touched.

    Raises:
        ConfigError: naming the key and the mend.
    """
    _check_values(config)
    _check_layout(config)
    _check_model(config)
    _check_data(config)


def _check_values(config: AnyMALConfig) -> None:
    for key, choices in CHOICES.items():
        if value_at(config, key) not in choices:
            shown = ", ".join(repr(c) for c in choices)
            raise ConfigError(f"{key}={value_at(config, key)!r} is not one of {shown}.")
    for key, least in AT_LEAST.items():
        if value_at(config, key) < least:
            raise ConfigError(f"{key}={value_at(config, key)} must be at least {least}.")
    if len(config.model.optim.betas) != 2:
        raise ConfigError(f"model.optim.betas={config.model.optim.betas} must hold two numbers.")
    max_time_seconds(config)


def _check_layout(config: AnyMALConfig) -> None:
    m = config.model
    if config.world_size % config.model_parallel_size:
        raise ConfigError(
            f"trainer.num_nodes x trainer.devices = {config.world_size} processes do not divide into replicas of "
            f"model.tensor_model_parallel_size x pipeline_model_parallel_size x context_parallel_size = "
            f"{config.model_parallel_size}. Change trainer.devices, trainer.num_nodes or the parallel sizes."
        )
    if m.sequence_parallel and m.tensor_model_parallel_size == 1:
        raise ConfigError(
            "model.sequence_parallel=true needs model.tensor_model_parallel_size > 1: it splits the sequence over "
            "the tensor-parallel ranks. Set it to false."
        )
    # Documents are padded so that the context-parallel ranks can share them, the longest one too.
    if m.context_parallel_size > 1 and config.data.seq_length % (2 * m.context_parallel_size):
        raise ConfigError(
            f"data.seq_length={config.data.seq_length} must be a multiple of {2 * m.context_parallel_size}: each "
            f"document is cut into 2 x model.context_parallel_size={m.context_parallel_size} equal chunks."
        )
    if m.virtual_pipeline_model_parallel_size > 1 and m.pipeline_model_parallel_size == 1:
        raise ConfigError(
            "model.virtual_pipeline_model_parallel_size > 1 needs model.pipeline_model_parallel_size > 1: it cuts the "
            "stages of a pipeline into parts. Set it to 1."
        )
    for name, modality in m.modalities.items():
        heads = modality.projector.num_attention_heads
        if modality.projector.type == "resampler" and heads % m.tensor_model_parallel_size:
            raise ConfigError(
                f"model.tensor_model_parallel_size={m.tensor_model_parallel_size} does not divide "
                f"model.modalities.{name}.projector.num_attention_heads={heads}."
            )
    edges = m.num_layers_in_first_pipeline_stage or m.num_layers_in_last_pipeline_stage
    if edges and m.pipeline_model_parallel_size == 1:
        raise ConfigError(
            "model.num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage need "
            "model.pipeline_model_parallel_size > 1. Set them to 0."
        )
    if config.trainer.sampled_answers and (m.context_parallel_size > 1 or m.virtual_pipeline_model_parallel_size > 1):
        raise ConfigError(
            "trainer.sampled_answers needs model.context_parallel_size=1 and "
            "model.virtual_pipeline_model_parallel_size=1: a model in training answers in one part only. Set it to 0."
        )
    if m.ddp.overlap_param_gather and not (m.ddp.use_distributed_optimizer and m.ddp.overlap_grad_reduce):
        raise ConfigError(
            "model.ddp.overlap_param_gather=true needs model.ddp.use_distributed_optimizer=true and "
            "model.ddp.overlap_grad_reduce=true."
        )


def _check_model(config: AnyMALConfig) -> None:
    lm = config.model.language_model
    given = [name for name in ("path", "config", "checkpoint") if getattr(lm, name)]
    if len(given) != 1:
        raise ConfigError(
            "model.language_model needs exactly one of path (a HuggingFace folder), config (a shape with random "
            f"weights) and checkpoint (one of this trainer's); given: {', '.join(given) or 'none'}."
        )
    _check_lora(config)
    if config.job == "dpo":
        _check_dpo(config)
    placeholders: dict[str, str] = {}
    kinds: dict[str, str] = {}
    for name, modality in config.model.modalities.items():
        where = f"model.modalities.{name}"
        if not modality.encoder.type:
            raise ConfigError(f"{where}.encoder.type is empty. Name the architecture, for example clip.")
        if modality.encoder.path and modality.encoder.config:
            raise ConfigError(f"{where}.encoder has both path and config. The folder holds its own; empty config.")
        if modality.projector.type not in ("resampler", "linear"):
            raise ConfigError(f"{where}.projector.type={modality.projector.type!r} is not resampler or linear.")
        if modality.projector.num_tokens < 1 or modality.projector.num_layers < 1:
            raise ConfigError(f"{where}.projector needs num_tokens and num_layers of at least 1.")
        if not modality.placeholder:
            raise ConfigError(f"{where}.placeholder is empty. Name a reserved token of the vocabulary.")
        if modality.placeholder in placeholders:
            raise ConfigError(
                f"{where}.placeholder={modality.placeholder!r} is also that of "
                f"{placeholders[modality.placeholder]!r}. Each modality needs its own."
            )
        placeholders[modality.placeholder] = name
        kind = modality.kind or name
        if kind in kinds:
            raise ConfigError(
                f"{where} and model.modalities.{kinds[kind]} are both of the kind {kind!r}: which of them would read a "
                "sample's media? Remove one."
            )
        kinds[kind] = name


def _check_lora(config: AnyMALConfig) -> None:
    lora = config.model.lora
    if not lora.r:
        return
    if not config.model.language_model.freeze:
        raise ConfigError(
            f"model.lora.r={lora.r} puts adapters beside a frozen Llama, but "
            "model.language_model.freeze=false. Set that to true, or model.lora.r to 0."
        )
    if not (lora.alpha > 0 and math.isfinite(lora.alpha)):
        raise ConfigError(f"model.lora.alpha={lora.alpha} must be above 0.")
    if lora.dropout >= 1:
        raise ConfigError(f"model.lora.dropout={lora.dropout} must be less than 1.")
    if not lora.targets:
        raise ConfigError(
            'model.lora.targets is empty: nothing would be adapted. Set it to ["*"], or model.lora.r to 0.'
        )


def _check_dpo(config: AnyMALConfig) -> None:
    model, dpo = config.model, config.model.dpo
    if not dpo.beta > 0:
        raise ConfigError(f"model.dpo.beta={dpo.beta} must be above 0.")
    if dpo.label_smoothing >= 0.5:
        raise ConfigError(f"model.dpo.label_smoothing={dpo.label_smoothing} must be less than 0.5.")
    if model.loss_normalization != "token":
        raise ConfigError("model.loss_normalization has no effect on the job dpo, which counts pairs. Set it to token.")
    if not (model.lora.r and model.restore_from_path):
        raise ConfigError(
            "The job dpo continues the adapters of an SFT run, which are its reference too: it needs model.lora as "
            "that run had it, and model.restore_from_path with that run's folder or checkpoint."
        )
    for name, modality in model.modalities.items():
        if not (modality.encoder.freeze and modality.projector.freeze):
            raise ConfigError(
                f"The job dpo trains the adapters only: set model.modalities.{name}.projector.freeze and "
                f"model.modalities.{name}.encoder.freeze to true."
            )


def _check_data(config: AnyMALConfig) -> None:
    for split in ("train", "validation"):
        total = sum(dataset.weight for dataset in getattr(config.data, split).values())
        for name, dataset in getattr(config.data, split).items():
            if not dataset.path:
                raise ConfigError(f"data.{split}.{name}.path is empty. Name a folder made by `anymal prepare`.")
            if not (dataset.weight > 0 and math.isfinite(dataset.weight)):
                raise ConfigError(f"data.{split}.{name}.weight={dataset.weight} must be above 0.")
            if dataset.weight < SMALLEST_SHARE * total:
                raise ConfigError(
                    f"data.{split}.{name}.weight={dataset.weight} is less than {SMALLEST_SHARE} of the mix. Raise it, "
                    "or remove the data set."
                )
    if not config.data.tokenizer:
        raise ConfigError("data.tokenizer is empty. Name a local folder with a HuggingFace tokenizer.")


def max_time_seconds(config: AnyMALConfig) -> Optional[float]:
    """exp_manager.max_time_per_run in seconds; None where there is no limit.

    Raises:
        ConfigError: not of the form DD:HH:MM:SS.
    """
    text = config.exp_manager.max_time_per_run
    if not text:
        return None
    parts = text.split(":")
    if len(parts) != 4 or not all(part.isdigit() for part in parts):
        raise ConfigError(f"exp_manager.max_time_per_run={text!r} is not of the form DD:HH:MM:SS (in quotes).")
    days, hours, minutes, seconds = (int(part) for part in parts)
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds
