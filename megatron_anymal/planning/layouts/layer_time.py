"""Forward and backward time of a layer, the head, the embedding and the media modules, on one rank and micro-batch.

Names in formulas: h hidden size, e bytes per element, q this rank's tokens of a micro-batch, own those of them outside
attention and feed-forward (fewer under sequence parallelism).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from megatron_anymal.config import ModalityConfig
from megatron_anymal.model.memory.media import EncoderSizes
from megatron_anymal.model.memory.sizes import LlamaSizes
from megatron_anymal.planning.layouts.collectives import Link, Links
from megatron_anymal.planning.layouts.hardware import Hardware
from megatron_anymal.planning.layouts.operations import media_costs
from megatron_anymal.planning.layouts.rates import attention_seconds, elementwise_seconds, matrix_rate, matrix_seconds
from megatron_anymal.planning.layouts.workload import PackLoad


class PassTime(NamedTuple):
    """Seconds of a forward and of a backward pass; `_wait` is what communication adds to computation."""

    # Computation of the forward pass.
    forward: float = 0.0
    # Computation of the backward pass.
    backward: float = 0.0
    # Communication of the forward pass that nothing hides.
    forward_wait: float = 0.0
    # The same of the backward pass.
    backward_wait: float = 0.0

    def plus(self, other: PassTime) -> PassTime:
        """Return both, one after the other."""
        return PassTime(*(a + b for a, b in zip(self, other)))

    def times(self, number: float) -> PassTime:
        """Return as many, one after the other."""
        return PassTime(*(number * value for value in self))

    @property
    def forward_total(self) -> float:
        """Seconds of the forward pass."""
        return self.forward + self.forward_wait

    @property
    def backward_total(self) -> float:
        """Seconds of the backward pass."""
        return self.backward + self.backward_wait


def total(parts: Sequence[PassTime]) -> PassTime:
    """Return all parts, one after the other."""
    return PassTime(*(sum(values) for values in zip(PassTime(), *parts)))


class LayerTime(NamedTuple):
    """The parts of a layer that recomputation distinguishes."""

    # Core attention.
    attention: PassTime
    # The feed-forward with its norm.
    mlp: PassTime
    # Everything else.
    rest: PassTime

    @property
    def whole(self) -> PassTime:
        """The layer."""
        return total(self)


@cache
def layer_time(
    gpu: Hardware, links: Links, llama: LlamaSizes, load: PackLoad, layer: int, number_format: str
) -> LayerTime:
    """Time of one layer.

    Args:
        layer: its index in the whole Llama.
        number_format: of the linear layers: bf16, fp8 or fp32.
    """
    q, e = load.tokens // llama.context, llama.number
    rope = _memory_bound(gpu, e * q * 2 * (llama.queries + llama.keys))
    projection, mlp = _after_attention(gpu, links.tensor, llama, q, layer, number_format)
    products = _linear(gpu, links.tensor, llama, q, layer, "qkv", number_format)
    return LayerTime(
        attention=_core_attention(gpu, links.context, llama, load, number_format),
        mlp=mlp,
        rest=total([_norm(gpu, llama, q), products, rope, projection]),
    )


@cache
def spared_time(
    gpu: Hardware, links: Links, llama: LlamaSizes, load: PackLoad, layer: int, number_format: str
) -> PassTime:
    """Time that the last layer saves by computing only positions with a label after its attention
    (model/output_positions.py). FP8 layers compute all positions.

    Args:
        layer: its index in the whole Llama.
    """
    q, rows = load.tokens // llama.context, max(1, round(load.labels / llama.context))
    if number_format == "fp8" or rows >= q:
        return PassTime()
    every, some = (
        total(_after_attention(gpu, links.tensor, llama, tokens, layer, number_format)) for tokens in (q, rows)
    )
    # The layer's whole input is gathered, too, to select from it; the head then gathers the positions alone.
    moved = links.tensor.gather(float(llama.number * rows * llama.hidden)) if llama.sequence_parallel else 0.0
    return every.plus(some.times(-1)).plus(PassTime(0.0, 0.0, -moved, -moved))


def _after_attention(
    gpu: Hardware, link: Link, llama: LlamaSizes, q: int, layer: int, number_format: str
) -> tuple[PassTime, PassTime]:
    """The output projection, and the feed-forward with its norm."""
    proj, fc1, fc2 = (_linear(gpu, link, llama, q, layer, name, number_format) for name in ("proj", "fc1", "fc2"))
    swiglu = _memory_bound(gpu, llama.number * q * 3 * llama.ffn // llama.tensor)
    return proj, total([_norm(gpu, llama, q), fc1, swiglu, fc2])


def _norm(gpu: Hardware, llama: LlamaSizes, q: int) -> PassTime:
    """A norm reads and writes its input, a residual connection reads two tensors and writes one."""
    return _memory_bound(gpu, llama.number * llama.own(q) * llama.hidden * 5, kernels=2)


def _memory_bound(gpu: Hardware, moved: float, kernels: int = 1) -> PassTime:
    """An elementwise operation, whose backward pass reads its gradient and its input and writes one more tensor."""
    return PassTime(elementwise_seconds(gpu, moved, kernels), elementwise_seconds(gpu, 1.5 * moved, kernels))


def _core_attention(gpu: Hardware, link: Link, llama: LlamaSizes, load: PackLoad, number_format: str) -> PassTime:
    """Two products of the causal half of each document's square, five in the backward pass (FlashAttention)."""
    pairs = load.squares / 2 / llama.context
    product = 2.0 * pairs * llama.queries
    # All keys and values are gathered; their gradients are reduced.
    exchanged = link.gather(llama.number * load.tokens * 2 * llama.keys)
    return PassTime(
        attention_seconds(gpu, 2 * product, gpu.attention_forward_share, number_format),
        attention_seconds(gpu, 5 * product, gpu.attention_backward_share, number_format),
        exchanged,
        exchanged,
    )


def _linear(
    gpu: Hardware, link: Link, llama: LlamaSizes, q: int, layer: int, name: str, number_format: str
) -> PassTime:
    """A linear layer with its adapter and its tensor-parallel communication."""
    inputs, outputs = llama.inputs(name), sum(llama.outputs(name).values())
    forward = matrix_seconds(gpu, q, outputs, inputs, number_format)
    input_gradient = matrix_seconds(gpu, q, inputs, outputs, number_format)
    weight_gradient = matrix_seconds(gpu, inputs, outputs, q, number_format) if llama.trains else 0.0
    adapter = _adapter(gpu, llama, q, layer, name)
    waits = _tensor_parallel(link, llama, q, name, input_gradient, weight_gradient)
    return PassTime(forward, input_gradient + weight_gradient, *waits).plus(adapter)


def _adapter(gpu: Hardware, llama: LlamaSizes, q: int, layer: int, name: str) -> PassTime:
    """LoRA: a product with A and one with B; two gradients of each."""
    names = dict(llama.adapted[layer]).get(name, ()) if llama.lora_r else ()
    if not names:
        return PassTime()
    width, inputs, outputs = llama.lora_r * len(names), llama.inputs(name), sum(llama.outputs(name).values())
    forward = matrix_seconds(gpu, q, width, inputs) + matrix_seconds(gpu, q, outputs, width)
    # Adding the adapter's output to the layer's, and its share of the input's gradient.
    added = elementwise_seconds(gpu, 3 * llama.number * q * outputs)
    return PassTime(forward + added, 2 * forward + elementwise_seconds(gpu, 3 * llama.number * q * inputs))


def _tensor_parallel(
    link: Link, llama: LlamaSizes, q: int, name: str, input_gradient: float, weight_gradient: float
) -> tuple[float, float]:
    """Seconds of communication that the forward and the backward pass of a linear layer wait for.

    As in megatron-core, the backward pass gathers a column-parallel layer's input again while it computes the input's
    gradient, and reduces that while it computes the weight's; with a frozen weight there is nothing to hide it.
    """
    size = float(llama.number * q * llama.hidden)
    column = name in ("qkv", "fc1")
    if not llama.sequence_parallel:
        reduced = link.reduce(size)
        return (0.0, max(0.0, reduced - weight_gradient)) if column else (reduced, 0.0)
    moved = link.gather(size)
    if not column:
        return moved, moved
    again = max(0.0, moved - input_gradient) if weight_gradient else 0.0
    return moved, again + max(0.0, moved - weight_gradient)


def head_time(gpu: Hardware, links: Links, llama: LlamaSizes, load: PackLoad, number_format: str) -> PassTime:
    """The final norm, the head and the loss. Only positions with a label go through the head; a frozen one computes the
    gradient in its forward pass, and one that trains computes its logits twice, to keep none (model/lm_head.py)."""
    q, rows = load.tokens // llama.context, round(load.labels / llama.context)
    vocabulary = (llama.vocabulary + llama.added) // llama.tensor
    plain = "fp32" if number_format == "fp32" else "bf16"
    sizes = [llama.vocabulary // llama.tensor, *([llama.added // llama.tensor] if llama.added else [])]
    products = [matrix_seconds(gpu, rows, size, llama.hidden, plain) for size in sizes]
    # Logits in fp32: maximum, exponentials and their sum, gradient.
    softmax = elementwise_seconds(gpu, 4.0 * rows * vocabulary * 4, kernels=4)
    moved = links.tensor.gather(float(llama.number * q * llama.hidden))
    norm = _memory_bound(gpu, 2 * llama.number * llama.own(q) * llama.hidden)
    forward = sum((1 if trains else 2) * product for product, trains in zip(products, llama.head_trains))
    backward = sum(3 * product for product, trains in zip(products, llama.head_trains) if trains)
    return norm.plus(PassTime(forward + softmax, backward + softmax if backward else 0.0, moved, moved))


def embedding_time(gpu: Hardware, links: Links, llama: LlamaSizes, load: PackLoad) -> PassTime:
    """The lookup of text tokens and the merge of soft tokens; the ranks' parts of the vocabulary are summed."""
    size = float(llama.number * load.tokens // llama.context * llama.hidden)
    summed = links.tensor.gather(size) if llama.sequence_parallel else links.tensor.reduce(size)
    return _memory_bound(gpu, 4 * size, kernels=2).plus(PassTime(forward_wait=summed))


def media_time(
    gpu: Hardware,
    links: Links,
    llama: LlamaSizes,
    load: PackLoad,
    encoders: Sequence[tuple[str, ModalityConfig, EncoderSizes]],
    number_format: str,
    *,
    encode: bool = True,
) -> PassTime:
    """Encoders and projectors of the first stage: ranks share the encoder inputs of a micro-batch.

    Args:
        encoders: name, section and sizes of each modality.
        encode: count the encoders.
    """
    pieces = dict(load.pieces)
    return total(
        [
            _modality(gpu, links, llama, pieces.get(name, 0.0), section, encoder, number_format, encode=encode)
            for name, section, encoder in encoders
        ]
    )


def _modality(
    gpu: Hardware,
    links: Links,
    llama: LlamaSizes,
    pieces: float,
    section: ModalityConfig,
    encoder: EncoderSizes,
    number_format: str,
    *,
    encode: bool,
) -> PassTime:
    if not pieces:
        return PassTime()
    plain = "fp32" if number_format == "fp32" else "bf16"
    own, projected = pieces / (llama.tensor * llama.context), pieces / llama.context
    call = max(1, round(min(own, section.encoder.max_pieces_per_call)))
    # The shape of a feed-forward's first product, which most of an encoder's operations belong to.
    rate = matrix_rate(gpu, encoder.features * call, 4 * encoder.width, encoder.width, plain)
    encoding = own * encoder.operations / rate * encode
    width = section.projector.hidden_size or encoder.width
    rows = max(1, round(projected * section.projector.num_tokens))
    cost = media_costs(section, encoder, llama.hidden).projector
    projecting = projected * cost.forward / llama.tensor
    projecting /= matrix_rate(gpu, rows, max(1, width * section.projector.ffn_multiplier // llama.tensor), width, plain)
    encoder_trains = not section.encoder.freeze
    backward = 2 * encoding * encoder_trains + projecting * (cost.backward + cost.repeated) / cost.forward
    gathered = links.tensor.gather(projected * encoder.features * encoder.width * llama.number)
    return PassTime(encoding + projecting, backward, gathered, gathered * encoder_trains)
