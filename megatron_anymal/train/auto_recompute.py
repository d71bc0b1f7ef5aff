"""Which recompute a run takes where model.recompute_granularity=auto: the cheapest that fits in memory.

One choice holds for the whole job. megatron-core reads it on each rank, so that stages could differ; but a pipeline
goes at the pace of its slowest stage, the one that repeats most, and fewer repetitions on the others would only make
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
from megatron_anymal.config import ConfigError, RunConfig
from megatron_anymal.data.context_parallel import padded
from megatron_anymal.data.planner import BatchLayout
from megatron_anymal.modalities import Modality
from megatron_anymal.model.llama import layers_of_stages, transformer_config
from megatron_anymal.model.lora import adapted_projections
from megatron_anymal.model.memory.language_model import Held, LlamaSizes, Pack, PipelineChunk, Recompute, RunSizes, held
from megatron_anymal.model.memory.media import encoder_sizes, media_bytes
from megatron_anymal.model.meta_device import without_weights
from megatron_anymal.parallel import ParallelLayout

# Share of a card that is not counted on: CUDA's and NCCL's own memory, and gaps between tensors.
MARGIN = 0.1
_GB = 1e9


@dataclass(frozen=True)
class Choice:
    """The recompute of a run and what it leads to.

    Attributes:
        held: by a rank of each pipeline stage.
        memory: bytes to fit in; 0: not asked.
        without: what the worst rank would hold without recompute, in bytes.
    """

    recompute: Recompute
    held: tuple[Held, ...]
    memory: int
    without: int

    @property
    def worst(self) -> int:
        """The stage whose ranks hold most."""
        return max(range(len(self.held)), key=lambda stage: self.held[stage].total)

    def __str__(self) -> str:
        most = self.held[self.worst].total
        why = f"{most / _GB:.1f} GB on a rank of stage {self.worst}, of {self.memory / _GB:.1f} GB"
        if self.recompute.granularity:
            why += f"; {self.without / _GB:.1f} GB without"
        return f"{self.recompute} ({why})"

    def applied(self, config: RunConfig) -> RunConfig:
        """A copy of the configuration with the choice in the place of auto."""
        config = copy.deepcopy(config)
        model, chosen = config.model, self.recompute
        model.recompute_granularity, model.recompute_modules = chosen.granularity, list(chosen.modules)
        model.recompute_method, model.recompute_num_layers = chosen.method, chosen.layers
        return config


def configured(config: RunConfig) -> Recompute:
    """The recompute that a configuration names; auto counts as none."""
    model = config.model
    if model.recompute_granularity == "selective":
        return Recompute("selective", tuple(model.recompute_modules))
    if model.recompute_granularity == "full":
        return Recompute("full", (), model.recompute_method, model.recompute_num_layers)
    return Recompute()


def fit_recompute(
    config: RunConfig, hf: LlamaConfig, modalities: Mapping[str, Modality], layout: ParallelLayout
) -> tuple[RunConfig, str]:
    """Put the choice in the place of auto. Collective where there is one to make: the smallest card of the job decides.

    Returns:
        The configuration to build the model from, and a line for the log ("" without auto).

    Raises:
        ConfigError: nothing fits.
    """
    if config.model.recompute_granularity != "auto":
        return config, ""
    memory = torch.tensor(memory_to_fit(config), dtype=torch.int64, device=layout.device)
    dist.all_reduce(memory, op=dist.ReduceOp.MIN)
    choice = choose(run_sizes(config, hf, modalities), int(memory))
    return choice.applied(config), f"recompute {choice}"


def memory_to_fit(config: RunConfig) -> int:
    """Bytes that one process may hold: model.memory_gb, or what its card has less MARGIN, or its share of what the
    machine has free."""
    if config.model.memory_gb:
        return int(config.model.memory_gb * _GB)
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(backend.device()).total_memory * (1 - MARGIN))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", str(config.trainer.devices)))
    return psutil.virtual_memory().available // processes


def choose(run: RunSizes, memory: int) -> Choice:
    """The recompute that repeats least of those with which every rank fits.

    Raises:
        ConfigError: none does.
    """
    for recompute in candidates(run):
        found = judge(run, recompute, memory)
        if found.held[found.worst].total <= memory:
            return found
    # The last one repeats everything.
    most = found.held[found.worst]
    parts = ("weights", "gradients", "optimizer", "activations", "working")
    listed = ", ".join(f"{name} {getattr(most, name) / _GB:.1f}" for name in parts)
    raise ConfigError(
        f"model.recompute_granularity=auto: nothing fits. A rank of pipeline stage {found.worst} holds "
        f"{most.total / _GB:.1f} GB even with every layer recomputed ({listed}), and {memory / _GB:.1f} GB fit "
        "(model.memory_gb). Lower data.seq_length or model.micro_batch_size, or raise "
        "model.tensor_model_parallel_size or model.pipeline_model_parallel_size."
    )


def judge(run: RunSizes, recompute: Recompute, memory: int) -> Choice:
    """What a given recompute leads to."""
    return Choice(recompute, _held(run, recompute), memory, max(of.total for of in _held(run, Recompute())))


def candidates(run: RunSizes) -> list[Recompute]:
    """What megatron-core can repeat, from the least work to the most (every layer)."""
    longest = max(len(part.layers) for parts in run.stages for part in parts)
    found = [Recompute(), Recompute("selective", ("core_attn",)), Recompute("selective", ("core_attn", "mlp"))]
    found += [Recompute("full", (), "block", layers) for layers in range(1, longest + 1)]
    return sorted(found, key=lambda recompute: repeated_share(run, recompute))


def repeated_share(run: RunSizes, recompute: Recompute) -> float:
    """How much of a forward pass through the layers is done twice, on the stage that does most."""
    llama, tokens = run.llama, run.pack.tokens
    # Multiply-adds of a token in one layer; attention over one document as long as the pack, half of it masked.
    attention = llama.queries * tokens * llama.context
    mlp = 3 * llama.hidden * llama.ffn // llama.tensor
    whole = attention + mlp + llama.hidden * 2 * (llama.queries + llama.keys)
    if recompute.granularity == "selective":
        return sum({"core_attn": attention, "mlp": mlp}.get(name, 0) for name in recompute.modules) / whole
    shares = []
    for parts in run.stages:
        layers = sum(len(part.layers) for part in parts)
        shares.append(sum(recompute.repeated(len(part.layers)) for part in parts) / max(1, layers))
    return max(shares)


def _held(run: RunSizes, recompute: Recompute) -> tuple[Held, ...]:
    return tuple(held(run, stage, recompute) for stage in range(len(run.stages)))


def run_sizes(
    config: RunConfig, hf: LlamaConfig, modalities: Mapping[str, Modality], *, planned: bool = False
) -> RunSizes:
    """What memory.py must know of a run.

    Args:
        planned: count for a card where this machine has none.
    """
    model, layout = config.model, BatchLayout.of(config)
    llama = _llama_sizes(config, hf, planned)
    everywhere = padded(layout.seq_length * layout.micro_batch_size, layout.length_multiple)
    tokens = everywhere // model.context_parallel_size
    # Padding of scaled dot-product attention may double a pack; with context parallelism, chunks need their documents'
    # beginnings.
    keys = everywhere * (2 * model.context_parallel_size + 1) // (2 * model.context_parallel_size)
    doubled = 2 if llama.attention == "sdpa" else 1
    pack = Pack(tokens, tokens, doubled * tokens, doubled * (keys if model.context_parallel_size > 1 else tokens))
    dtype = backend.compute_dtype(config)
    shapes = without_weights(config).model.modalities
    sections = [(section, encoder_sizes(name, section, modalities[name], dtype)) for name, section in shapes.items()]
    packs = -(-model.global_batch_size // (config.data_parallel_size * layout.micro_batch_size))
    return RunSizes(
        llama=llama,
        pack=pack,
        stages=_stages(hf, config),
        micro_batches=padded(packs, layout.micro_batches_multiple),
        optimizer_bytes=optimizer_bytes(config),
        sharers=config.data_parallel_size * model.context_parallel_size if model.ddp.use_distributed_optimizer else 1,
        media=media_bytes(
            sections,
            hf.hidden_size,
            everywhere,
            model.tensor_model_parallel_size,
            model.context_parallel_size,
            llama.number,
        ),
        reference=config.job == "dpo",
    )


def optimizer_bytes(config: RunConfig) -> int:
    """Of each number that trains: two fp32 moments, and where the weights are bf16 their fp32 originals."""
    return 12 if backend.compute_dtype(config) == torch.bfloat16 else 8


def _llama_sizes(config: RunConfig, hf: LlamaConfig, planned: bool) -> LlamaSizes:
    model = config.model
    ranks = model.tensor_model_parallel_size
    on_card = planned or torch.cuda.is_available()
    attention = backend.attention_kernel(config)
    if planned and not torch.cuda.is_available():
        attention = "transformer_engine" if model.transformer_impl != "local" else "flash_attn"
    number = backend.compute_dtype(config).itemsize
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
        on_cpu=not on_card,
        fused_swiglu=transformer_config(hf, without_weights(config)).bias_activation_fusion,
        lora_r=model.lora.r,
        lora_dropout=model.lora.dropout > 0,
        adapted=adapted if model.lora.r else (),
    )


def _stages(hf: LlamaConfig, config: RunConfig) -> tuple[tuple[PipelineChunk, ...], ...]:
    """The model parts of each stage: a virtual pipeline runs through all stages once for each of its parts."""
    parts = config.model.virtual_pipeline_model_parallel_size
    counts = [layers // parts for layers in layers_of_stages(hf, config)]
    stages: list[list[PipelineChunk]] = [[] for _ in counts]
    first = 0
    for part in range(parts):
        for stage, count in enumerate(counts):
            at_end = part == parts - 1 and stage == len(counts) - 1
            stages[stage].append(PipelineChunk(tuple(range(first, first + count)), not part and not stage, at_end))
            first += count
    return tuple(map(tuple, stages))
