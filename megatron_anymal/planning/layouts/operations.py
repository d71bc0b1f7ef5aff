"""Floating-point operations that a step needs, whatever its layout: the numerator of the share of the peak (MFU)."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import LlamaConfig

from megatron_anymal.config import ModalityConfig, ModelConfig
from megatron_anymal.discrete_vocabulary import DiscreteVocabulary
from megatron_anymal.model.memory.media import EncoderSizes
from megatron_anymal.planning.layouts.layer_time import projector_operations
from megatron_anymal.planning.layouts.workload import Workload


def step_operations(
    model: ModelConfig,
    hf: LlamaConfig,
    work: Workload,
    encoders: Sequence[tuple[ModalityConfig, EncoderSizes]],
) -> float:
    """Operations of the forward and backward passes of a step, without recomputation and padding.

    A product's backward pass computes the gradient of its input, and that of its weight if it trains. Causal attention
    computes half of each document's square. Only positions with a label go through the head.

    Args:
        encoders: section and sizes of each modality, in the configuration's order.
    """
    trains = not model.language_model.freeze
    heads, hidden = hf.num_attention_heads * hf.head_dim, hf.hidden_size
    keys = hf.num_key_value_heads * hf.head_dim
    matrices = hidden * (2 * heads + 2 * keys) + 3 * hidden * hf.intermediate_size
    layers = 2.0 * matrices * work.tokens * (3 if trains else 2) + 2.0 * heads * work.squares * 3
    added = DiscreteVocabulary(hf.vocab_size, model.discrete).added
    text_trains = trains and (not added or model.discrete_rows == "all")
    products = hf.vocab_size * (3 if text_trains else 2) + added * (2 if model.discrete_rows == "none" else 3)
    head = 2.0 * hidden * products * work.labels
    media = sum(
        work.pieces.get(name, 0.0) * _per_piece(section, encoder, hidden)
        for name, (section, encoder) in zip(model.modalities, encoders)
    )
    return hf.num_hidden_layers * layers + head + media


def _per_piece(section: ModalityConfig, encoder: EncoderSizes, hidden: int) -> float:
    """Operations for one encoder input."""
    encoder_trains, projector_trains = not section.encoder.freeze, not section.projector.freeze
    projecting = projector_operations(section, encoder, hidden) * (1 + projector_trains + encoder_trains)
    return encoder.operations * (1 + 2 * encoder_trains) + projecting
