"""Floating-point operations of a training step: what it computes on, times the costs of the model's parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass

from megatron_anymal.model.operations.costs import Cost, LlamaCosts, MediaCosts, ModelCosts


@dataclass(frozen=True)
class Documents:
    """Sums over documents.

    Attributes:
        tokens: LLM tokens.
        squares: squared lengths.
        labels: tokens with a label.
    """

    tokens: float = 0.0
    squares: float = 0.0
    labels: float = 0.0


@dataclass(frozen=True)
class StepAmounts:
    """What a step computes on, over all replicas.

    Attributes:
        reached: the documents whose gradient goes on to something trainable before the Llama's layers.
        other: all other documents.
        pieces: encoder inputs of each modality, by its name.
        reference: whether the documents also go through the reference (DPO).
    """

    reached: Documents
    other: Documents
    pieces: Mapping[str, float]
    reference: bool = False


@dataclass(frozen=True)
class Operations:
    """Operations of one or several steps.

    Attributes:
        encoding: forward passes of the encoders.
        encoder_gradients: backward passes of encoders that train.
        projectors: projectors.
        linears: matrices of the Llama's layers.
        adapters: LoRA adapters.
        attention: the Llama's attention.
        head: the Llama's output layer.
        encoding_again: what the reference of a DPO run encodes once more.
        repeated: what else is computed again although its result was known: recomputed activations, the scores of fused
            attention, the logits of a head that trains, and media that the reference projects once more.
    """

    encoding: float = 0.0
    encoder_gradients: float = 0.0
    projectors: float = 0.0
    linears: float = 0.0
    adapters: float = 0.0
    attention: float = 0.0
    head: float = 0.0
    encoding_again: float = 0.0
    repeated: float = 0.0

    @property
    def needed(self) -> float:
        """Operations that the step needs: the numerator of MFU."""
        return float(sum(astuple(self)[:-2]))

    @property
    def computed(self) -> float:
        """Operations with those that are computed again: the numerator of HFU."""
        return float(sum(astuple(self)))

    def plus(self, other: Operations, times: float = 1.0) -> Operations:
        """Return the sum with `times` another."""
        return Operations(*(a + times * b for a, b in zip(astuple(self), astuple(other))))


def step_operations(costs: ModelCosts, amounts: StepAmounts) -> Operations:
    """Return the operations of a step."""
    total = Operations()
    for llama, documents in ((costs.reached, amounts.reached), (costs.other, amounts.other)):
        total = total.plus(_of_documents(llama, documents, reference=amounts.reference))
    for name, media in costs.media.items():
        total = total.plus(of_piece(media, reference=amounts.reference), amounts.pieces.get(name, 0.0))
    return total


def of_piece(media: MediaCosts, *, reference: bool) -> Operations:
    """Return the operations of one encoder input.

    Args:
        reference: whether the reference encodes and projects it once more (DPO).
    """
    encoder, projector = media.encoder, media.projector
    return Operations(
        encoding=encoder.forward,
        encoder_gradients=encoder.backward,
        projectors=projector.forward + projector.backward,
        encoding_again=encoder.forward if reference else 0.0,
        repeated=projector.repeated + (projector.forward if reference else 0.0),
    )


def _of_documents(llama: LlamaCosts, documents: Documents, *, reference: bool) -> Operations:
    def needed(cost: Cost, units: float) -> float:
        return units * (cost.forward * (2 if reference else 1) + cost.backward)

    tokens, squares, labels = documents.tokens, documents.squares, documents.labels
    return Operations(
        linears=needed(llama.linears, tokens) + needed(llama.last_linears, labels),
        adapters=needed(llama.adapters, tokens) + needed(llama.last_adapters, labels),
        attention=needed(llama.attention, squares),
        head=needed(llama.head, labels),
        repeated=tokens * (llama.linears.repeated + llama.adapters.repeated)
        + squares * llama.attention.repeated
        + labels * (llama.head.repeated + llama.last_linears.repeated + llama.last_adapters.repeated),
    )
