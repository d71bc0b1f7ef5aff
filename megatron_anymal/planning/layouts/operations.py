"""Floating-point operations that a step needs, whatever its layout: the numerator of the share of the peak (MFU)."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import LlamaConfig

from megatron_anymal.config import ModalityConfig, ModelConfig
from megatron_anymal.model.memory.media import EncoderSizes
from megatron_anymal.model.operations import costs, step
from megatron_anymal.model.operations.costs import MediaCosts, ModelCosts, llama_costs
from megatron_anymal.model.operations.step import Documents, StepAmounts
from megatron_anymal.planning.layouts.workload import Workload


def step_operations(
    model: ModelConfig,
    hf: LlamaConfig,
    work: Workload,
    encoders: Sequence[tuple[ModalityConfig, EncoderSizes]],
) -> float:
    """Operations of the forward and backward passes of a step, without recomputation and padding.

    If a projector or an encoder trains, every document counts as if it had media.

    Args:
        encoders: section and sizes of each modality, in the configuration's order.
    """
    media = {
        name: media_costs(section, encoder, hf.hidden_size)
        for name, (section, encoder) in zip(model.modalities, encoders)
    }
    trains = any(not (section.encoder.freeze and section.projector.freeze) for section, _ in encoders)
    llama = llama_costs(model, hf, reached=trains)
    every = Documents(work.tokens, work.squares, work.labels)
    amounts = StepAmounts(every, Documents(), work.pieces)
    return step.step_operations(ModelCosts(llama, llama, media), amounts).needed


def media_costs(section: ModalityConfig, encoder: EncoderSizes, hidden: int) -> MediaCosts:
    """Operations for one encoder input.

    Args:
        hidden: the Llama's hidden size.
    """
    return costs.media_costs(
        section.projector,
        encoder.features,
        encoder.width,
        encoder.operations,
        hidden,
        encoder_trains=not section.encoder.freeze,
    )
