"""Compute the memory use of encoders and projectors; see activations.py.

Encoders can have any architecture, so theirs is measured (encoder_sizes.py).
Shapes: n pieces, F features of width w per piece, T soft tokens per piece, h the projector's width, H the Llama's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_anymal.config import ModalityConfig, ProjectorConfig
from megatron_anymal.model.memory.sizes import MediaMemory

# Elements per feature and unit of its width that a frozen encoder holds at a time: a layer's input, its feed-forward's
# hidden values before and after the activation, and intermediates.
_ENCODER_WORKING = 12


@dataclass(frozen=True)
class EncoderSizes:
    """Sizes of one encoder.

    Attributes:
        parameters: number of parameters.
        features: F, features per piece.
        width: w, width of a feature.
        piece: elements per piece.
        kept: bytes saved per piece for a backward pass through the encoder.
        operations: floating-point operations of a forward pass per piece; 0 unless they were counted.
    """

    parameters: int
    features: int
    width: int
    piece: int
    kept: int
    operations: int = 0


def media_bytes(
    sections: Sequence[tuple[ModalityConfig, EncoderSizes]],
    hidden: int,
    tokens: int,
    tensor: int,
    context: int,
    number: int,
) -> MediaMemory:
    """Compute the memory that all modalities add to a rank of the first stage.

    Micro-batches differ in their media; the worst case is assumed, in which all tokens are soft tokens of the costliest
    modality.

    Args:
        tokens: of a micro-batch, over all context-parallel ranks.
        number: bytes per element.
    """
    frozen, trainable, kept, working = 0, 0, [0], [0]
    encoding, features = [0], [0]
    for section, encoder in sections:
        projector = section.projector
        of_projector = projector_parameters(projector, encoder.features, encoder.width, hidden, tensor)
        frozen += section.encoder.freeze * encoder.parameters + projector.freeze * of_projector
        trainable += (not section.encoder.freeze) * encoder.parameters + (not projector.freeze) * of_projector
        pieces = -(-tokens // projector.num_tokens)
        own, projected = -(-pieces // (tensor * context)), -(-pieces // context)
        of_pieces = 0 if section.encoder.freeze else own * encoder.kept
        if not (section.encoder.freeze and projector.freeze):
            of_pieces += kept_by_projector(projector, projected, encoder, hidden, tensor, number)
        kept.append(of_pieces)
        call = min(own, section.encoder.max_pieces_per_call)
        in_use = call * _ENCODER_WORKING * number * encoder.features * encoder.width
        # fp32 pieces of two micro-batches, and all features.
        working.append(in_use + 2 * 4 * own * encoder.piece + number * projected * encoder.features * encoder.width)
        features.append(number * own * encoder.features * encoder.width)
        encoding.append(in_use + 4 * own * encoder.piece)
    encoders = sum(encoder.parameters for _, encoder in sections)
    return MediaMemory(frozen, trainable, max(kept), max(working), encoders, max(encoding), max(features))


def projector_parameters(config: ProjectorConfig, features: int, width: int, hidden: int, tensor: int) -> int:
    """Parameters of a projector on one tensor-parallel rank."""
    if config.type == "linear":
        return (
            sum((inputs + 1) * outputs // tensor for inputs, outputs in _linears(config, features, width, hidden)) + 1
        )
    h, up = config.hidden_size or width, config.ffn_multiplier * (config.hidden_size or width)
    layer = 3 * 2 * h + 4 * h * h // tensor + (h + 1) * up // tensor + up * h // tensor + h
    ends = 2 * width + (width + 1) * h // tensor + 2 * h + (h + 1) * hidden // tensor + 1
    return ends + (features + config.num_tokens) * h + config.num_layers * layer


def kept_by_projector(
    config: ProjectorConfig, pieces: int, encoder: EncoderSizes, hidden: int, tensor: int, number: int
) -> int:
    """Bytes that a trainable projector saves for its backward pass over n pieces, including their features."""
    features, width, latents = encoder.features, encoder.width, config.num_tokens
    # Soft tokens before and after the RMS norm, in fp32.
    kept = 4 * latents * (2 * hidden + 1)
    if config.type == "linear":
        first, *later = _linears(config, features, width, hidden)
        groups = min(features, latents)
        # The later layers' inputs before and after the activation.
        return pieces * (kept + number * groups * (first[0] + sum(2 * inputs for inputs, _ in later)))
    h, up = config.hidden_size or width, config.ffn_multiplier * (config.hidden_size or width) // tensor
    both, own = features + latents, h // tensor
    layer = [
        # Inputs of the norms (that of the features is shared) and of the linear layers.
        latents * h + both * h + latents * h + latents * h,
        # Inputs and output of attention.
        (2 * latents + 2 * both) * own,
        # Feed-forward before and after its activation, and its norm's input.
        2 * latents * up + latents * h,
    ]
    # The first layer's latents are a parameter.
    once = 2 * features * width + features * h + latents * h
    sums = 4 * latents * config.num_attention_heads // tensor + 2 * number * (2 * latents + features)
    return pieces * (kept + number * (once + config.num_layers * sum(layer)) + config.num_layers * sums)


def _linears(config: ProjectorConfig, features: int, width: int, hidden: int) -> list[tuple[int, int]]:
    """Input and output sizes of a linear projector's layers (projectors.LinearProjector)."""
    groups = min(features, config.num_tokens)
    sizes = [width * -(-features // groups), *[config.hidden_size or width] * (config.num_layers - 1)]
    return list(zip(sizes, [*sizes[1:], hidden * config.num_tokens // groups]))
