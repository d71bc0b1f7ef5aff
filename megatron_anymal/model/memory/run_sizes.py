"""From a configuration to the sizes from which rank_memory.py computes a run's memory use; needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import LlamaConfig

from megatron_anymal.config import NF4_BLOCK, ModalityConfig, ModelConfig
from megatron_anymal.data.context_parallel import padded
from megatron_anymal.data.discrete_vocabulary import DiscreteVocabulary
from megatron_anymal.data.planner import BatchLayout
from megatron_anymal.model.llama_shape import layers_of_stages
from megatron_anymal.model.lora_targets import adapted_projections
from megatron_anymal.model.memory.media import EncoderSizes, media_bytes
from megatron_anymal.model.memory.sizes import LlamaSizes, Pack, PipelineChunk, RunSizes


def run_sizes(
    model: ModelConfig,
    layout: BatchLayout,
    hf: LlamaConfig,
    llama: LlamaSizes,
    encoders: Sequence[tuple[ModalityConfig, EncoderSizes]],
    *,
    reference: bool = False,
) -> RunSizes:
    """Return the sizes from which a run's memory use is computed.

    Args:
        layout: of the run's batches.
        hf: the Llama's HuggingFace configuration.
        llama: its sizes on one rank.
        encoders: section and sizes of each modality's encoder.
        reference: whether a frozen copy of the adapters is held (DPO).

    Raises:
        ConfigError: the layers do not divide.
    """
    everywhere = padded(layout.seq_length * layout.micro_batch_size, layout.length_multiple)
    tokens = everywhere // model.context_parallel_size
    # Padding for scaled dot-product attention may double a pack; under context parallelism, every chunk of a document
    # needs the keys of the document's beginning.
    keys = everywhere * (2 * model.context_parallel_size + 1) // (2 * model.context_parallel_size)
    doubled = 2 if llama.attention == "sdpa" else 1
    keys = keys if model.context_parallel_size > 1 else tokens
    # Each of the two answers needs the keys of the prompt, which may be almost the whole pair.
    keys = keys + 2 * everywhere if layout.shared_prompts else keys
    pack = Pack(tokens, tokens, doubled * tokens, doubled * keys)
    packs = -(-model.samples_per_step // (layout.data_parallel_size * layout.micro_batch_size))
    sizes = (model.tensor_model_parallel_size, model.context_parallel_size, llama.number)
    return RunSizes(
        llama=llama,
        pack=pack,
        stages=chunks_of_stages(model, hf),
        micro_batches=padded(packs, layout.micro_batches_multiple),
        # Two fp32 moments, and the fp32 main weight if the model is bf16.
        optimizer_bytes=optimizer_bytes(llama.number),
        sharers=layout.data_parallel_size * model.context_parallel_size if model.ddp.use_distributed_optimizer else 1,
        media=media_bytes(encoders, hf.hidden_size, everywhere, *sizes),
        reference=reference,
    )


def optimizer_bytes(number: int) -> int:
    """Optimizer bytes per trainable parameter: two fp32 moments, and the fp32 main weight if the model is bf16.

    Args:
        number: bytes per element of the model's weights.
    """
    return 12 if number == 2 else 8


def matrix_bytes(model: ModelConfig, number: int) -> float:
    """Bytes per element in which the matrices of the Llama's layers are stored.

    Args:
        number: bytes per element of the model's other weights.
    """
    if model.base_quantization:
        # Half a byte, and an fp32 scale for each block.
        return 0.5 + 4 / NF4_BLOCK
    return 1 if model.fp8_primary_weights else number


def _copies(model: ModelConfig) -> float:
    """Bytes per element of the copies of the layers' matrices that are made for products in FP8 or NVFP4: one for the
    forward and one for the backward pass, with the scales of blocks of 32 or 16 elements."""
    if model.fp4:
        return 2 * (0.5 + 1 / 16)
    if not model.fp8 or model.fp8_primary_weights:
        return 0
    return 2 * (1 + 1 / 32) if model.fp8_recipe == "mxfp8" else 2


def llama_sizes(model: ModelConfig, precision: str, hf: LlamaConfig, *, attention: str, on_cpu: bool) -> LlamaSizes:
    """Return the Llama's sizes on one rank.

    Args:
        precision: `trainer.precision`.
        hf: the Llama's HuggingFace configuration.
        attention: transformer_engine, flash_attn, flex or sdpa.
        on_cpu: whether the run is on a CPU.
    """
    ranks = model.tensor_model_parallel_size
    number = 2 if precision == "bf16" else 4
    layers = range(hf.num_hidden_layers) if model.lora.r else range(0)
    return LlamaSizes(
        hidden=hf.hidden_size,
        ffn=hf.intermediate_size,
        heads=hf.num_attention_heads,
        groups=hf.num_key_value_heads,
        head_size=hf.head_dim,
        vocabulary=padded(hf.vocab_size, ranks),
        added=padded(DiscreteVocabulary(hf.vocab_size, model.discrete).added, ranks),
        rows=model.discrete_rows if model.discrete else "all",
        tied=hf.tie_word_embeddings,
        tensor=ranks,
        context=model.context_parallel_size,
        sequence_parallel=model.sequence_parallel,
        number=number,
        matrix_number=matrix_bytes(model, number) + _copies(model),
        dequantizes=bool(model.base_quantization),
        trains=not model.language_model.freeze,
        attention=attention,
        on_cpu=on_cpu,
        lora_r=model.lora.r,
        lora_dropout=model.lora.dropout > 0,
        adapted=tuple(tuple(adapted_projections(layer, model.lora).items()) for layer in layers),
    )


def chunks_of_stages(model: ModelConfig, hf: LlamaConfig) -> tuple[tuple[PipelineChunk, ...], ...]:
    """Return the model chunks of each stage: a virtual pipeline passes through all stages once per chunk.

    Raises:
        ConfigError: the layers do not divide.
    """
    chunks = model.virtual_pipeline_model_parallel_size
    counts = [layers // chunks for layers in layers_of_stages(model, hf)]
    stages: list[list[PipelineChunk]] = [[] for _ in counts]
    first = 0
    for chunk in range(chunks):
        for stage, count in enumerate(counts):
            at_end = chunk == chunks - 1 and stage == len(counts) - 1
            # The first chunk of each later stage stands for its rank.
            helps = model.encoder_placement == "all_stages" and not chunk and stage > 0
            at_begin = not chunk and not stage
            stages[stage].append(PipelineChunk(tuple(range(first, first + count)), at_begin, at_end, helps))
            first += count
    return tuple(map(tuple, stages))
