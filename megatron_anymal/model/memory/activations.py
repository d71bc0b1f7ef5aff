"""Bytes that the Llama saves for its backward pass, tensor by tensor, and its temporary tensors.

Tests compare the result with what autograd saves. media.py does the same for encoders and projectors. A pack is assumed
to be full: seq_length tokens, each with a label.

Names in formulas: h hidden size, e bytes per element, q this rank's tokens of a pack (all of them without context
parallelism), own those tokens outside attention and feed-forward (fewer under sequence parallelism).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from megatron_anymal.model.memory.sizes import LINEARS, LlamaSizes, Pack, Recompute

# Logits that the head holds at a time, and bytes of each: matrix product, fp32 copy, gradient.
HEAD_CHUNK, HEAD_BYTES = 1 << 26, 10


def kept_by_layer(llama: LlamaSizes, pack: Pack, layer: int, repeated: Sequence[str] = ()) -> dict[str, int]:
    """Bytes that one layer saves for its backward pass, by category.

    Args:
        layer: its index in the whole Llama.
        repeated: modules that selective recomputation recomputes.
    """
    e, h, q, own = llama.number, llama.hidden, pack.tokens, llama.own(pack.tokens)
    adapters = _adapters(llama, q, layer)
    kept = {"norms": 2 * _norm(llama, own)}
    # The weight gradient of a linear layer, or of its adapter, needs the layer's input.
    kept["input of qkv"] = e * own * h if llama.trains else 0
    kept |= {"attention": _attention(llama, pack, "core_attn" in repeated)}
    # Attention on GPUs saves its output anyway; otherwise the output is saved separately, in pack order.
    copied = llama.attention == "sdpa" or "core_attn" in repeated
    kept["input of proj"] = e * q * llama.queries if llama.trains and copied else 0
    if adapters["proj"] and not copied and not llama.lora_dropout:
        adapters["proj"] -= e * q * llama.queries
    if "mlp" in repeated:
        kept["input of the feed-forward"] = e * own * h
        if llama.attention == "transformer_engine":
            # The norm is fused into the feed-forward's first linear layer.
            kept["norms"] //= 2
        adapters["fc1"] = adapters["fc2"] = 0
    else:
        ffn = llama.ffn // llama.tensor
        kept["input of fc1"] = e * own * h if llama.trains else 0
        kept["gate and up"] = e * q * ffn * 2
        kept["input of fc2"] = e * q * ffn if llama.trains else 0
    kept["adapters"] = sum(adapters.values())
    return kept


def _norm(llama: LlamaSizes, own: int) -> int:
    """The input, and in fp32 its scale."""
    return own * (llama.number * llama.hidden + 4)


def _attention(llama: LlamaSizes, pack: Pack, repeated: bool) -> int:
    e, q, k, heads = llama.number, llama.queries, llama.keys, llama.heads // llama.tensor
    if repeated:
        # Keys and values are views that hold the linear layer's whole output; queries are a view too, or a reordered
        # copy.
        copied = llama.heads > llama.groups > llama.tensor
        return e * pack.tokens * ((q if copied else 0) + q + 2 * k)
    if llama.attention == "sdpa":
        return e * (2 * pack.queries * q + 2 * pack.keys * k) + 4 * pack.queries * heads
    kept = e * pack.tokens * 2 * q + 4 * pack.tokens * heads
    if llama.attention == "transformer_engine":
        return kept + e * pack.tokens * 2 * k
    if llama.context > 1:
        return kept + e * pack.keys * 2 * k
    # Rotated keys; the values are views of the linear layer's output, which is held as a whole.
    return kept + e * pack.tokens * (k + q + 2 * k)


def _adapters(llama: LlamaSizes, tokens: int, layer: int) -> dict[str, int]:
    """Bytes that the adapters of each linear layer save: their inputs, the output of A, and A and B fused."""
    kept = dict.fromkeys(LINEARS, 0)
    if not llama.lora_r:
        return kept
    e, own = llama.number, llama.own(tokens)
    for linear, names in llama.adapted[layer]:
        column = linear in ("qkv", "fc1")
        tokens_in, tokens_out = (own, tokens) if column else (tokens, own)
        inputs, width = llama.inputs(linear), llama.lora_r * len(names)
        if llama.lora_dropout:
            # Per projection the input after dropout, and a mask of one byte per element.
            kept[linear] = len(names) * tokens_in * inputs * (e + 1)
        else:
            kept[linear] = e * (tokens_in * inputs + inputs * width)
        kept[linear] += e * width * (tokens_out + sum(llama.outputs(linear).values()))
    return kept


def kept_by_layers(llama: LlamaSizes, pack: Pack, layers: Sequence[int], recompute: Recompute) -> int:
    """Bytes that the layers of one model chunk save per micro-batch."""
    modules = recompute.modules if recompute.granularity == "selective" else ()
    whole = recompute.repeated(len(layers))
    chunks = -(-whole // recompute.layers) if recompute.method == "uniform" else whole
    inputs = chunks * llama.number * llama.own(pack.tokens) * llama.hidden
    kinds = llama.alike(layers[whole:]).items()
    return inputs + sum(number * _kept_in_total(llama, pack, layer, modules) for layer, number in kinds)


@cache
def _kept_in_total(llama: LlamaSizes, pack: Pack, layer: int, modules: tuple[str, ...] = ()) -> int:
    return sum(kept_by_layer(llama, pack, layer, modules).values())


def kept_by_head(llama: LlamaSizes, pack: Pack) -> int:
    """Bytes that the last norm and the loss save: of labeled positions the hidden states (if a weight of the head
    trains) and their gradients (if one is frozen), indices and log-sum-exps."""
    trains = llama.head_trains
    rows = pack.labels * (llama.number * llama.hidden * len(set(trains)) + 8)
    return _norm(llama, llama.own(pack.tokens)) + rows + (pack.labels * 12 if any(trains) else 0)


def working(llama: LlamaSizes, pack: Pack, layers: Sequence[int], recompute: Recompute, last: bool) -> int:
    """Temporary bytes of the backward pass: one unit's recomputed activations and gradients, or those of the head."""
    e, ffn = llama.number, llama.ffn // llama.tensor
    recomputed = 0
    if layers and recompute.granularity == "full":
        number = recompute.layers if recompute.method == "uniform" else 1
        recomputed = number * _kept_in_total(llama, pack, layers[0])
    elif layers and recompute.modules:
        kept = _kept_in_total(llama, pack, layers[0]), _kept_in_total(llama, pack, layers[0], recompute.modules)
        recomputed = max(0, kept[0] - kept[1])
    gradients = e * pack.tokens * (3 * ffn + 2 * llama.hidden)
    if llama.dequantizes:
        gradients += e * max(llama.inputs(linear) * sum(llama.outputs(linear).values()) for linear in LINEARS)
    vocabulary = (llama.vocabulary + llama.added) // llama.tensor
    head = HEAD_BYTES * min(HEAD_CHUNK, pack.labels * vocabulary) if last else 0
    trained = max(llama.vocabulary_trains * llama.vocabulary, llama.added_trains * llama.added) // llama.tensor
    head += 4 * trained * llama.hidden if last else 0
    return max(recomputed + gradients, head)
