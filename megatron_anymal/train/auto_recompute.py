"""Choose the activation recomputation for model.recompute_granularity=auto: the cheapest that fits in memory.

One choice holds for the whole job. megatron-core reads the setting on each rank, so stages could differ; but a pipeline
runs at the pace of its slowest stage, the one that recomputes most, and recomputing less on the others would only make
them wait longer.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist
from transformers import LlamaConfig

from megatron_anymal import backend
from megatron_anymal.config import ConfigError, ModelConfig
from megatron_anymal.data.context_parallel import padded
from megatron_anymal.data.planner import BatchLayout
from megatron_anymal.modalities import Modality
from megatron_anymal.model.llama import layers_of_stages, transformer_config
from megatron_anymal.model.lora import adapted_projections
from megatron_anymal.model.memory.language_model import Held, LlamaSizes, Pack, PipelineChunk, Recompute, RunSizes, held
from megatron_anymal.model.memory.media import encoder_sizes, media_bytes
from megatron_anymal.model.meta_device import without_weights

# Share of GPU memory that is reserved for CUDA, NCCL and fragmentation.
MARGIN = 0.1
_GB = 1e9


@dataclass(frozen=True)
class Choice:
    """The activation recomputation of a run and the resulting memory use.

    Attributes:
        recompute: the settings.
        held: memory use of a rank, per pipeline stage.
        memory: available bytes; 0 if unknown.
        without: bytes that the worst rank would hold without recomputation.
    """

    recompute: Recompute
    held: tuple[Held, ...]
    memory: int
    without: int

    @property
    def worst(self) -> int:
        """The stage whose ranks need the most memory."""
        return max(range(len(self.held)), key=lambda stage: self.held[stage].total)

    def __str__(self) -> str:
        most = self.held[self.worst].total
        why = f"{most / _GB:.1f} GB on a rank of stage {self.worst}, of {self.memory / _GB:.1f} GB"
        if self.recompute.granularity:
            why += f"; {self.without / _GB:.1f} GB without"
        return f"{self.recompute} ({why})"

    def applied(self, model: ModelConfig) -> ModelConfig:
        """Return a copy of the section with `auto` replaced by the choice."""
        model, chosen = copy.deepcopy(model), self.recompute
        model.recompute_granularity, model.recompute_modules = chosen.granularity, list(chosen.modules)
        model.recompute_method, model.recompute_num_layers = chosen.method, chosen.layers
        return model


def configured(model: ModelConfig) -> Recompute:
    """Return the recomputation that a configuration sets; auto counts as none."""
    if model.recompute_granularity == "selective":
        return Recompute("selective", tuple(model.recompute_modules))
    if model.recompute_granularity == "full":
        return Recompute("full", (), model.recompute_method, model.recompute_num_layers)
    return Recompute()


def fit_recompute(model: ModelConfig, devices: int, run: RunSizes, device: torch.device) -> tuple[ModelConfig, str]:
    """Replace `auto` by a choice that fits the job's smallest GPU. Collective.

    Args:
        devices: `trainer.devices`, the processes of a node.
        run: see `run_sizes`.
        device: this process's device.

    Returns:
        The section to build the model from, and a log line.

    Raises:
        ConfigError: nothing fits.
    """
    memory = torch.tensor(memory_to_fit(model.memory_gb, devices), dtype=torch.int64, device=device)
    dist.all_reduce(memory, op=dist.ReduceOp.MIN)
    choice = choose(run, int(memory))
    return choice.applied(model), f"recompute {choice}"


def memory_to_fit(memory_gb: float, devices: int) -> int:
    """Bytes available to one process: `memory_gb`, or if that is 0 its GPU's memory less MARGIN, or without a GPU its
    share of the machine's free memory.

    Args:
        memory_gb: `model.memory_gb`, in units of 1e9 bytes.
        devices: `trainer.devices`, the processes of a node if the launcher does not tell.

    Raises:
        ConfigError: this node has more processes than CUDA devices.
    """
    if memory_gb:
        return int(memory_gb * _GB)
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(backend.device()).total_memory * (1 - MARGIN))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", str(devices)))
    return psutil.virtual_memory().available // processes


def choose(run: RunSizes, memory: int) -> Choice:
    """Return the recomputation with the least extra work with which every rank fits.

    Args:
        memory: bytes available to a rank.

    Raises:
        ConfigError: nothing fits.
    """
    for recompute in candidates(run):
        choice = judge(run, recompute, memory)
        if choice.held[choice.worst].total <= memory:
            return choice
    # The last candidate recomputes everything.
    most = choice.held[choice.worst]
    kinds = ("weights", "gradients", "optimizer", "activations", "working")
    listed = ", ".join(f"{name} {getattr(most, name) / _GB:.1f}" for name in kinds)
    raise ConfigError(
        f"model.recompute_granularity=auto: nothing fits. A rank of pipeline stage {choice.worst} holds "
        f"{most.total / _GB:.1f} GB even with every layer recomputed ({listed}), but only {memory / _GB:.1f} GB are "
        "available (model.memory_gb). Lower data.seq_length or model.micro_batch_size, or raise "
        "model.tensor_model_parallel_size or model.pipeline_model_parallel_size."
    )


def judge(run: RunSizes, recompute: Recompute, memory: int) -> Choice:
    """Return the memory use of a given recomputation; `memory` is the available bytes, 0 if unknown."""
    return Choice(recompute, _held(run, recompute), memory, max(of.total for of in _held(run, Recompute())))


def candidates(run: RunSizes) -> list[Recompute]:
    """Return the recomputations that megatron-core supports, from the least extra work to the most (every layer)."""
    longest = max(len(chunk.layers) for chunks in run.stages for chunk in chunks)
    options = [Recompute(), Recompute("selective", ("core_attn",)), Recompute("selective", ("core_attn", "mlp"))]
    options += [Recompute("full", (), "block", layers) for layers in range(1, longest + 1)]
    return sorted(options, key=lambda recompute: repeated_share(run, recompute))


def repeated_share(run: RunSizes, recompute: Recompute) -> float:
    """Return the share of the layers' forward pass that is computed twice, on the stage with the largest share."""
    llama, tokens = run.llama, run.pack.tokens
    # Multiply-adds per token and layer; attention over one document as long as the pack, half of it masked.
    attention = llama.queries * tokens * llama.context
    mlp = 3 * llama.hidden * llama.ffn // llama.tensor
    whole = attention + mlp + llama.hidden * 2 * (llama.queries + llama.keys)
    if recompute.granularity == "selective":
        return sum({"core_attn": attention, "mlp": mlp}.get(name, 0) for name in recompute.modules) / whole
    shares = []
    for chunks in run.stages:
        layers = sum(len(chunk.layers) for chunk in chunks)
        shares.append(sum(recompute.repeated(len(chunk.layers)) for chunk in chunks) / max(1, layers))
    return max(shares)


def _held(run: RunSizes, recompute: Recompute) -> tuple[Held, ...]:
    return tuple(held(run, stage, recompute) for stage in range(len(run.stages)))


def run_sizes(
    model: ModelConfig,
    precision: str,
    layout: BatchLayout,
    hf: LlamaConfig,
    modalities: Mapping[str, Modality],
    *,
    reference: bool = False,
    planned: bool = False,
) -> RunSizes:
    """Return the sizes from which model/memory computes a run's memory use.

    Args:
        precision: `trainer.precision`.
        layout: of the run's batches.
        hf: the Llama's HuggingFace configuration.
        modalities: by their name in the configuration.
        reference: whether a frozen copy of the adapters is held (DPO).
        planned: assume a GPU even if this machine has none.

    Raises:
        ConfigError: sizes do not divide, or an encoder cannot be built.
    """
    llama = _llama_sizes(model, precision, hf, planned)
    everywhere = padded(layout.seq_length * layout.micro_batch_size, layout.length_multiple)
    tokens = everywhere // model.context_parallel_size
    # Padding for scaled dot-product attention may double a pack; under context parallelism, every chunk of a document
    # needs the keys of the document's beginning.
    keys = everywhere * (2 * model.context_parallel_size + 1) // (2 * model.context_parallel_size)
    doubled = 2 if llama.attention == "sdpa" else 1
    pack = Pack(tokens, tokens, doubled * tokens, doubled * (keys if model.context_parallel_size > 1 else tokens))
    dtype = backend.compute_dtype(precision)
    shapes = without_weights(model).modalities
    sections = [(section, encoder_sizes(name, section, modalities[name], dtype)) for name, section in shapes.items()]
    packs = -(-model.global_batch_size // (layout.data_parallel_size * layout.micro_batch_size))
    return RunSizes(
        llama=llama,
        pack=pack,
        stages=_stages(model, hf),
        micro_batches=padded(packs, layout.micro_batches_multiple),
        optimizer_bytes=optimizer_bytes(precision),
        sharers=layout.data_parallel_size * model.context_parallel_size if model.ddp.use_distributed_optimizer else 1,
        media=media_bytes(
            sections,
            hf.hidden_size,
            everywhere,
            model.tensor_model_parallel_size,
            model.context_parallel_size,
            llama.number,
        ),
        reference=reference,
    )


def optimizer_bytes(precision: str) -> int:
    """Optimizer bytes per trainable parameter: two fp32 moments, and the fp32 main weight if the model is bf16."""
    return 12 if backend.compute_dtype(precision) == torch.bfloat16 else 8


def _llama_sizes(model: ModelConfig, precision: str, hf: LlamaConfig, planned: bool) -> LlamaSizes:
    ranks = model.tensor_model_parallel_size
    on_gpu = planned or torch.cuda.is_available()
    attention = backend.attention_kernel(model, precision)
    if planned and not torch.cuda.is_available():
        attention = "transformer_engine" if model.transformer_impl != "local" else "flash_attn"
    number = backend.compute_dtype(precision).itemsize
    adapted = tuple(adapted_projections(layer, model.lora) for layer in range(hf.num_hidden_layers))
    return LlamaSizes(
        hidden=hf.hidden_size,
        ffn=hf.intermediate_size,
        heads=hf.num_attention_heads,
        groups=hf.num_key_value_heads,
        head_size=hf.head_dim,
        vocabulary=-(-hf.vocab_size // ranks) * ranks,
        tied=hf.tie_word_embeddings,
        tensor=ranks,
        context=model.context_parallel_size,
        sequence_parallel=model.sequence_parallel,
        number=number,
        matrix_number=1 if model.fp8_primary_weights else number + (2 if model.fp8 else 0),
        trains=not model.language_model.freeze,
        attention=attention,
        on_cpu=not on_gpu,
        fused_swiglu=transformer_config(without_weights(model), precision, hf).bias_activation_fusion,
        lora_r=model.lora.r,
        lora_dropout=model.lora.dropout > 0,
        adapted=adapted if model.lora.r else (),
    )


def _stages(model: ModelConfig, hf: LlamaConfig) -> tuple[tuple[PipelineChunk, ...], ...]:
    """Return the model chunks of each stage: a virtual pipeline passes through all stages once per chunk."""
    chunks = model.virtual_pipeline_model_parallel_size
    counts = [layers // chunks for layers in layers_of_stages(model, hf)]
    stages: list[list[PipelineChunk]] = [[] for _ in counts]
    first = 0
    for chunk in range(chunks):
        for stage, count in enumerate(counts):
            at_end = chunk == chunks - 1 and stage == len(counts) - 1
            stages[stage].append(PipelineChunk(tuple(range(first, first + count)), not chunk and not stage, at_end))
            first += count
    return tuple(map(tuple, stages))
