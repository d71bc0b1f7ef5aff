"""The section `model:` of a configuration: encoders, projectors, Llama, layout, objective and optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_anymal.config.field_docs import add_field_docs
from megatron_anymal.config.optim_section import AlignmentConfig, OptimConfig

# FP8 and NVFP4 matrix dimensions must be multiples of the first, MXFP8's of the second (Transformer Engine).
FP8_MULTIPLE, MXFP8_MULTIPLE = 16, 32
# Elements that share a scale in NF4: consecutive ones of a matrix's row.
NF4_BLOCK = 64


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
class DiscreteConfig:
    """A kind of media that the Llama reads and writes as codes of its own vocabulary (MIO section 2.1)."""

    codebooks: list[int] = field(default_factory=list)
    """Number of codes in each codebook: [8192] for an image tokenizer, [1024, 1024, 1024, 1024] for four levels of a
    speech tokenizer. Each codebook has vocabulary entries of its own."""
    codes_per_item: int = 0
    """Codes of one item, over all its codebooks, for example 32 for an image. 0: any number."""
    begin: str = ""
    """Token that precedes the codes of an item. Empty: <NAME>."""
    end: str = ""
    """Token that follows them. Empty: </NAME>."""
    tokenizer_hash: str = ""
    """Identity of the tokenizer that the shards' codes must have. Empty: any."""
    prompt_codebooks: int = 1
    """Codebooks whose codes stand for an item in a prompt: 1 is the content codebook alone. In an answer all codebooks
    count. 0: all."""
    interleaving: str = "sequential"
    """Order of the codes of several codebooks: `sequential`, one codebook after the other (a1 a2 b1 b2), or
    `alternating` (a1 b1 a2 b2)."""


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
    share_prompt: str = "auto"
    """Compute the prompt of a pair, media included, once for both answers: `auto` (if results stay the same up to
    rounding), `always` (even with model.neftune or model.lora.dropout; both answers then share the prompt's random
    numbers) or `never`. Needs an attention other than Transformer Engine's."""


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
    discrete: dict[str, DiscreteConfig] = field(default_factory=dict)
    """Media as codes of the Llama's vocabulary, by a name of your choice. Marks and codes follow the Llama's own
    vocabulary in this order, so that new entries belong at the end."""
    discrete_init: str = "statistics"
    """First values of their embedding and head rows: `statistics` (normal, with the mean and standard deviation that
    each column has over the Llama's own rows) or `normal` (normal with mean 0 and the Llama's initializer_range)."""
    discrete_rows: str = "new"
    """Which rows of the embedding and the head train: `new` (those of marks and codes; the Llama's own stay fixed and
    need no gradient or optimizer state), `all`, or `none` (they come from model.restore_from_path)."""
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

    encoder_placement: str = "first_stage"
    """Pipeline stages that encode media: `first_stage`, or `all_stages`, which share the work: while a stage waits in
    the pipeline, it encodes media of the coming step for the first stage. Needs frozen encoders, which every stage then
    holds."""

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
    """FP8 scaling: `tensorwise` (current scaling), `delayed` (from an amax history, which checkpoints then hold), or
    `mxfp8` (a scale for each 32 elements; needs a Blackwell GPU)."""
    fp8_primary_weights: bool = False
    """Store the frozen Llama's matrices in FP8 only, one byte per parameter."""
    fp4: str = ""
    """`""` (off) or `e2m1`: matrix products in NVFP4, a scale for each 16 elements; needs Transformer Engine and a
    Blackwell GPU. Instead of fp8."""
    base_quantization: str = ""
    """`""` (off) or `nf4`: store the frozen Llama's matrices in NF4 (QLoRA), 0.5625 bytes per parameter, and compute in
    trainer.precision. Needs bitsandbytes and local layers."""

    seed: int = 1234
    """Seed of initialization, data order, dropout and noise."""
    restore_from_path: str = ""
    """Checkpoint whose trained weights this run starts from (without its step and optimizer state). DPO: the SFT run.
"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    multiplex: dict[str, AlignmentConfig] = field(default_factory=dict)
    """Alignments of several modalities in one run, each as if it ran alone, by the modality's name in
    model.modalities. They share the passes of the frozen Llama; every step takes a global batch of each. Empty: one
    alignment, with model.global_batch_size, model.optim and trainer.gradient_clip_val."""
    ddp: DistributedDataParallelConfig = field(default_factory=DistributedDataParallelConfig)
    """Data parallelism."""

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one replica of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def product_multiple(self) -> int:
        """What the dimensions of the Llama's matrix products must be multiples of, for their number format."""
        if self.fp8 and self.fp8_recipe == "mxfp8":
            return MXFP8_MULTIPLE
        return FP8_MULTIPLE if self.fp8 or self.fp4 else 1

    @property
    def samples_per_step(self) -> int:
        """Samples of an optimizer step, over all replicas; of `multiplex`, while no alignment has ended."""
        return sum(one.global_batch_size for one in self.multiplex.values()) or self.global_batch_size

    def samples_of(self, steps: int) -> int:
        """Samples of the first `steps` optimizer steps of a run."""
        if not self.multiplex:
            return steps * self.global_batch_size
        return sum(one.global_batch_size * min(steps, one.max_steps or steps) for one in self.multiplex.values())


add_field_docs(__name__)
