"""Floating-point operations of a model's parts per token, squared document length, label and encoder input.

The only place that counts them, for a run's log and for the plan. Counted are matrix products, convolutions and
attention, two operations per multiply-add. The backward pass of a product has two of the same size: the gradient of its
weight, if that trains, and the gradient of its input, if anything before it trains. So a weight takes 6 operations per
token if it trains, 4 if it is frozen and a gradient passes it, and 2 if none does. Attention takes 2 products forward
and 4 backward, over the unmasked half of each document's square. The head, and the last layer after its attention,
compute positions with a label only.

All numbers are of the whole model, whatever the layout, and without padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import pairwise

from transformers import LlamaConfig

from megatron_anymal.config import ModelConfig, ProjectorConfig
from megatron_anymal.data.discrete_vocabulary import DiscreteVocabulary
from megatron_anymal.model.memory.run_sizes import llama_sizes
from megatron_anymal.model.memory.sizes import LINEARS, LlamaSizes, Recompute

_NO_RECOMPUTE = Recompute()


@dataclass(frozen=True)
class Cost:
    """Operations per unit of work: a token, a squared document length, a label or an encoder input.

    Attributes:
        forward: of the forward pass.
        backward: of the gradients that training needs.
        repeated: of what the backward pass computes once more instead of keeping it.
    """

    forward: float = 0.0
    backward: float = 0.0
    repeated: float = 0.0

    def plus(self, other: Cost) -> Cost:
        """Return the cost of both."""
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other))))


@dataclass(frozen=True)
class LlamaCosts:
    """Costs of the Llama.

    Attributes:
        linears: of the layers' matrices, per token.
        adapters: of LoRA adapters, per token.
        attention: per squared document length.
        head: per label: only positions with a label go through the head.
        last_linears: of the last layer's matrices after its attention, per label (model/output_positions.py).
        last_adapters: of their adapters, per label.
    """

    linears: Cost
    adapters: Cost
    attention: Cost
    head: Cost
    last_linears: Cost = Cost()
    last_adapters: Cost = Cost()


@dataclass(frozen=True)
class MediaCosts:
    """Costs of one encoder input.

    Attributes:
        encoder: of the encoder.
        projector: of the projector.
    """

    encoder: Cost
    projector: Cost


@dataclass(frozen=True)
class ModelCosts:
    """All costs of a model.

    Attributes:
        reached: of the Llama for documents whose gradient goes on to something trainable before its layers: a
            projector, an encoder or a row of the embedding.
        other: of the Llama for all other documents.
        media: of each modality, by its name.
    """

    reached: LlamaCosts
    other: LlamaCosts
    media: Mapping[str, MediaCosts]


def llama_costs(
    model: ModelConfig,
    hf: LlamaConfig,
    *,
    reached: bool,
    recompute: Recompute = _NO_RECOMPUTE,
    chunks: Sequence[Sequence[int]] = (),
) -> LlamaCosts:
    """Return the costs of a Llama.

    Args:
        model: with the Llama's freezing, adapters and discrete media.
        hf: the Llama's HuggingFace configuration.
        reached: whether anything before the Llama's layers trains.
        recompute: activation recomputation of the run.
        chunks: indices of the layers of each pipeline chunk, for the recomputation of whole layers.
    """
    llama = _whole_llama(model, hf)
    again = {layer for chunk in chunks for layer in chunk[: recompute.repeated(len(chunk))]}
    attention = Cost()
    # Of all positions and of those with a label.
    linears, adapters = [Cost(), Cost()], [Cost(), Cost()]
    # A norm whose gain trains precedes every matrix.
    reached = reached or llama.trains
    for layer in range(hf.num_hidden_layers):
        adapted = dict(llama.adapted[layer]) if llama.lora_r else {}
        for linear in LINEARS:
            if linear == "proj":
                repeats = layer in again or "core_attn" in recompute.modules
                attention = attention.plus(_attention(2.0 * llama.queries, reached=reached, repeats=repeats))
            repeats = layer in again or ("mlp" in recompute.modules and linear in ("fc1", "fc2"))
            labels = layer == hf.num_hidden_layers - 1 and linear != "qkv" and not model.fp8
            linears[labels] = linears[labels].plus(_linear(llama, linear, reached=reached, repeats=repeats))
            names = adapted.get(linear, ())
            adapter = _adapter(llama, linear, names, reached=reached, repeats=repeats)
            adapters[labels] = adapters[labels].plus(adapter)
            reached = reached or bool(names)
    return LlamaCosts(
        linears[0],
        adapters[0],
        attention,
        _head(llama, reached=reached),
        last_linears=linears[1],
        last_adapters=adapters[1],
    )


def media_costs(
    projector: ProjectorConfig,
    features: int,
    width: int,
    operations: float,
    hidden: int,
    *,
    encoder_trains: bool,
) -> MediaCosts:
    """Return the costs of one encoder input.

    Args:
        projector: the projector's section.
        features: features per encoder input.
        width: their width.
        operations: of the encoder's forward pass, per encoder input.
        hidden: the Llama's hidden size.
        encoder_trains: whether the encoder trains; its layers then count as if each passed a gradient on.
    """
    costs = _linear_projector if projector.type == "linear" else _resampler
    return MediaCosts(
        encoder=Cost(operations, 2.0 * operations if encoder_trains else 0.0),
        projector=costs(projector, features, width, hidden, not projector.freeze, encoder_trains),
    )


def _whole_llama(model: ModelConfig, hf: LlamaConfig) -> LlamaSizes:
    """Return the sizes of the Llama without a layout and without padding of its vocabulary."""
    sizes = llama_sizes(model, "bf16", hf, attention="", on_cpu=False)
    added = DiscreteVocabulary(hf.vocab_size, model.discrete).added
    return replace(sizes, tensor=1, vocabulary=hf.vocab_size, added=added)


def _product(size: float, *, trains: bool, reached: bool, repeats: bool = False) -> Cost:
    """Cost of a matrix product with a weight of `size` parameters."""
    backward = 2.0 * size * (trains + reached)
    return Cost(2.0 * size, backward, 2.0 * size if repeats and backward else 0.0)


def _linear(llama: LlamaSizes, linear: str, *, reached: bool, repeats: bool) -> Cost:
    size = llama.inputs(linear) * sum(llama.outputs(linear).values())
    return _product(size, trains=llama.trains, reached=reached, repeats=repeats)


def _adapter(llama: LlamaSizes, linear: str, names: tuple[str, ...], *, reached: bool, repeats: bool) -> Cost:
    """LoRA: a product with A [r, in] and one with B [out, r], whose input A has computed."""
    cost, outputs = Cost(), llama.outputs(linear)
    for name in names:
        down, up = llama.lora_r * llama.inputs(linear), llama.lora_r * outputs[name]
        cost = cost.plus(_product(down, trains=True, reached=reached, repeats=repeats))
        cost = cost.plus(_product(up, trains=True, reached=True, repeats=repeats))
    return cost


def _attention(forward: float, *, reached: bool, repeats: bool = False) -> Cost:
    """Cost of attention with these operations forward. Fused kernels compute the scores, half of them, once more in the
    backward pass."""
    if not reached:
        return Cost(forward)
    return Cost(forward, 2.0 * forward, forward / 2 + (forward if repeats else 0.0))


def _head(llama: LlamaSizes, *, reached: bool) -> Cost:
    """Cost of the head's weights. Those that train recompute their logits (model/lm_head.py)."""
    cost = Cost()
    for rows, trains in zip((llama.vocabulary, llama.added), llama.head_trains):
        cost = cost.plus(_product(rows * llama.hidden, trains=trains, reached=reached, repeats=trains))
    return cost


def _linear_projector(
    config: ProjectorConfig, features: int, width: int, hidden: int, trains: bool, encoder_trains: bool
) -> Cost:
    """Cost of `projectors.LinearProjector`, whose first layer takes the features as they are."""
    groups = min(features, config.num_tokens)
    sizes = [width * -(-features // groups), *[config.hidden_size or width] * (config.num_layers - 1)]
    cost, reached = Cost(), encoder_trains
    for inputs, outputs in pairwise([*sizes, hidden * config.num_tokens // groups]):
        cost = cost.plus(_product(groups * inputs * outputs, trains=trains, reached=reached))
        reached = reached or trains
    return cost


def _resampler(
    config: ProjectorConfig, features: int, width: int, hidden: int, trains: bool, encoder_trains: bool
) -> Cost:
    """Cost of `projectors.PerceiverResampler`, which begins with a norm whose gain trains with it."""
    latents, h = config.num_tokens, config.hidden_size or width
    reached, both = trains or encoder_trains, features + latents
    # Query and output for the latents, key and value for features and latents, and the feed-forward.
    layer = (2 * latents + 2 * both + 2 * config.ffn_multiplier * latents) * h * h
    size = features * width * h + config.num_layers * layer + latents * h * hidden
    reads = _attention(config.num_layers * 4.0 * latents * both * h, reached=reached)
    return _product(size, trains=trains, reached=reached).plus(reads)
