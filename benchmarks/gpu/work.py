"""Analytic operations of the matrix products of a step as each side does it, to compare with torch's counter."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from anymal_side import layer_parameters, output_parameters
from transformers import LlamaConfig

from megatron_anymal.config import ProjectorConfig
from megatron_anymal.model.encoders import Encoder
from megatron_anymal.model.encoders.base import attention_flops


@dataclass(frozen=True)
class Amounts:
    """Amounts of data that a step processes."""

    # Tokens through the Llama's layers, and rows through its output layer.
    tokens: int
    head_rows: int
    # Encoder inputs (tiles) through the encoder and the projector.
    pieces: int


@dataclass(frozen=True)
class Passes:
    """Multiplications of each parameter per token: 1 forward, 1 for the input's gradient, 1 for its own gradient."""

    llama: int
    adapters: int
    projector: int
    # Forward passes of the Llama without training: the DPO reference.
    reference: int = 0
    # Forward passes of the encoder, and of a frozen projector.
    encodings: int = 1


def passes_of(job: str, encodings: int) -> Passes:
    """Passes of a job with a frozen Llama."""
    if job == "dpo":
        return Passes(llama=2, adapters=3, projector=1, reference=1, encodings=encodings)
    return Passes(llama=2, adapters=3, projector=3, encodings=encodings)


@dataclass(frozen=True)
class Work:
    """Floating-point operations, two per multiply-add, without attention, which torch does not count on CPUs."""

    layers: float
    head: float
    adapters: float
    encoder: float
    projector: float

    @property
    def total(self) -> float:
        """Total."""
        return float(sum(asdict(self).values()))

    @property
    def media(self) -> float:
        """Work of the encoder and the projector alone."""
        return self.encoder + self.projector


def adapter_parameters(hf: LlamaConfig, r: int, *, joined: bool = False) -> int:
    """Parameters of low-rank adapters on all linear layers of the Llama.

    Args:
        joined: count as this trainer multiplies: the Bs of fused projections as one block matrix, including zeros.
    """
    return sum(_layer_adapters(hf, r, joined=joined)) * hf.num_hidden_layers


def _layer_adapters(hf: LlamaConfig, r: int, *, joined: bool) -> list[int]:
    """Parameters of a layer's adapters: of query, key and value, output, gate and up, down."""
    hidden, inner = hf.hidden_size, hf.intermediate_size
    heads, groups = hf.num_attention_heads * hf.head_dim, hf.num_key_value_heads * hf.head_dim
    linears: tuple[tuple[int, tuple[int, ...]], ...] = (
        (hidden, (heads, groups, groups)),
        (heads, (hidden,)),
        (hidden, (inner, inner)),
        (inner, (hidden,)),
    )
    return [r * (len(outs) * inputs + (len(outs) if joined else 1) * sum(outs)) for inputs, outs in linears]


def spared(hf: LlamaConfig, r: int, passes: Passes, recompute: str, positions: int) -> float:
    """Work that this trainer spares after the last layer's attention, at positions without a label.

    Args:
        r: rank of the adapters.
        recompute: none, mlp or full.
        positions: their number.
    """
    mlp = 3 * hf.hidden_size * hf.intermediate_size
    last = output_parameters(hf.hidden_size, hf.num_attention_heads, hf.head_dim, hf.intermediate_size)
    adapters = sum(_layer_adapters(hf, r, joined=True)[1:])
    again = {"none": 0, "mlp": mlp, "full": last}[recompute]
    products = (passes.llama + passes.reference) * last + (passes.adapters + passes.reference) * adapters + again
    return 2.0 * products * positions


def projector_parameters(section: ProjectorConfig, features: int, width: int, hidden: int) -> float:
    """Work of a resampler per encoder input: parameter x token pairs."""
    h = section.hidden_size or width
    latents, both = section.num_tokens, section.num_tokens + features
    layer = (2 * latents + 2 * both) * h * h + 2 * section.ffn_multiplier * latents * h * h
    return float(features * width * h + section.num_layers * layer + latents * h * hidden)


def work_by_hand(
    hf: LlamaConfig,
    section: ProjectorConfig,
    encoder: Any,
    amounts: Amounts,
    passes: Passes,
    adapters: float,
) -> Work:
    """Analytic work of a step, without optimizer, norms and activation functions.

    Args:
        encoder: a VisionTransformer encoder.
        adapters: number of parameters of the Llama's adapters.
    """
    layer = layer_parameters(
        hf.hidden_size, hf.num_attention_heads, hf.num_key_value_heads, hf.head_dim, hf.intermediate_size
    )
    pairs = projector_parameters(section, encoder.feature_tokens, encoder.width, hf.hidden_size)
    learns = passes.projector > 1
    projections = 1 if learns else passes.encodings
    looking = encoder_attention(encoder)
    llama = 2.0 * (passes.llama + passes.reference)
    return Work(
        layers=llama * layer * hf.num_hidden_layers * amounts.tokens,
        head=llama * hf.hidden_size * hf.vocab_size * amounts.head_rows,
        adapters=2.0 * (passes.adapters + passes.reference) * adapters * amounts.tokens,
        encoder=passes.encodings * (encoder.flops_per_piece() - looking) * amounts.pieces,
        projector=2.0 * passes.projector * projections * pairs * amounts.pieces,
    )


def encoder_attention(encoder: Encoder) -> float:
    """Forward operations of a vision transformer's attention per encoder input."""
    settings = encoder.model.config
    tokens = encoder.patches + 1
    return encoder.frames * settings.num_hidden_layers * attention_flops(tokens, tokens, encoder.width)
