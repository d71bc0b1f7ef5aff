"""HuggingFace Llama weights, ours, and a checkpoint's: the same tensors under other names and, for attention and MLP,
joined.

Ours joins q, k and v by key/value group (the group's query heads, its key head, its value head) and gate and up
projection one after the other. A checkpoint stacks the layers, and keeps the norms where Transformer Engine does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Optional

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_anymal.config import ConfigError
from megatron_anymal.hf_weights import HFWeights
from megatron_anymal.model.unsharded_weights import FUSED_NORMS, Weight
from megatron_anymal.safetensors_io import TensorFileError

EMBEDDING = "language_model.embedding.word_embeddings.weight"
HEAD = "language_model.output_layer.weight"
_FINAL_NORM = "language_model.decoder.final_layernorm.weight"
_PLAIN = {
    EMBEDDING: "model.embed_tokens.weight",
    _FINAL_NORM: "model.norm.weight",
    HEAD: "lm_head.weight",
}
_LAYER = "language_model.decoder.layers."
_PLAIN_IN_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
_QKV, _FC1 = "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"
_IN_LAYER = (
    "input_layernorm.weight",
    "self_attention.linear_proj.weight",
    _QKV,
    "pre_mlp_layernorm.weight",
    _FC1,
    "mlp.linear_fc2.weight",
)
_STACKED = {plain: fused for fused, plain in FUSED_NORMS.items()}


def load_hf_llama(folder: str, hf: LlamaConfig, weights: Iterable[Weight]) -> None:
    """Set this rank's Llama weights from a HuggingFace folder, one tensor at a time.

    Raises:
        ConfigError: the folder lacks weights or a tensor, a file is damaged, or a tensor is not the Llama's or has
            another shape than its config.json says.
    """
    try:
        files = HFWeights(folder)
        account(hf, files)
        for weight in weights:
            if weight.name.startswith("language_model."):
                weight.set(from_hf(weight.name, hf, files.__getitem__))
    except TensorFileError as error:
        raise ConfigError(
            f"model.language_model.path: {error} (model.language_model.load_weights=false takes random ones.)"
        ) from None
    except ConfigError as error:
        raise ConfigError(f"model.language_model.path={folder!r} does not fit its config.json: {error}") from None


def whole_names(hf: LlamaConfig, layers: Optional[Iterable[int]] = None) -> list[str]:
    """Our names of the Llama's whole weights, in the model's order.

    Args:
        layers: numbers of the layers wanted, and nothing but those; None for the whole model.
    """
    found = [
        f"{_LAYER}{number}.{rest}"
        for number in (range(hf.num_hidden_layers) if layers is None else layers)
        for rest in _IN_LAYER
    ]
    if layers is not None:
        return found
    return [EMBEDDING, *found, _FINAL_NORM, *([] if hf.tie_word_embeddings else [HEAD])]


def whole_shape(name: str, hf: LlamaConfig) -> tuple[int, ...]:
    """The shape of one of our whole weights of the Llama."""
    if name in (EMBEDDING, HEAD):
        return (hf.vocab_size, hf.hidden_size)
    rest = _in_layer(name)[1]
    heads, inner = hf.num_attention_heads * hf.head_dim, hf.intermediate_size
    return {
        _QKV: (heads + 2 * hf.num_key_value_heads * hf.head_dim, hf.hidden_size),
        "self_attention.linear_proj.weight": (hf.hidden_size, heads),
        _FC1: (2 * inner, hf.hidden_size),
        "mlp.linear_fc2.weight": (hf.hidden_size, inner),
    }.get(rest, (hf.hidden_size,))


def checkpoint_place(name: str) -> tuple[str, Optional[int]]:
    """Where a checkpoint keeps one of our whole weights: its key and, where the layers are stacked, the layer.

    Weights that are no plain part of the Llama (adapters, projectors, encoders) stand under their own name.
    """
    number, rest = _in_layer(name)
    if number is None or ".lora." in name:
        return name, None
    return _LAYER + _STACKED.get(rest, rest), number


def chunks_from_hf(name: str, hf: LlamaConfig, read: Callable[[str], Tensor]) -> Iterator[tuple[int, Tensor]]:
    """One of our whole weights out of HuggingFace's, in pieces that need no copy where there is none to be made.

    Args:
        read: gives a HuggingFace tensor by its name.

    Returns:
        (first row, rows), in order.
    """
    names = hf_names(name, hf)
    if name.endswith(_QKV):
        yield 0, _join_heads(names, hf, read)
        return
    row = 0
    for hf_name in names:
        piece = read(hf_name)
        yield row, piece
        row += len(piece)


def _join_heads(names: list[str], hf: LlamaConfig, read: Callable[[str], Tensor]) -> Tensor:
    """q, k and v of each group behind each other; in memory are the result and one of the three."""
    groups = hf.num_key_value_heads
    queries = hf.num_attention_heads // groups
    heads, first = None, 0
    for name, count in zip(names, (queries, 1, 1)):
        part = read(name).unflatten(0, (groups, count, -1))
        if heads is None:
            heads = part.new_empty(groups, queries + 2, *part.shape[2:])
        heads[:, first : first + count] = part
        first += count
        del part
    assert heads is not None
    return heads.flatten(0, 2)


def from_hf(name: str, hf: LlamaConfig, read: Callable[[str], Tensor]) -> Tensor:
    """One of our whole weights out of HuggingFace's.

    Args:
        read: gives a HuggingFace tensor by its name.
    """
    pieces = [piece for _, piece in chunks_from_hf(name, hf, read)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def to_hf(name: str, hf: LlamaConfig, whole: Tensor) -> dict[str, Tensor]:
    """HuggingFace's tensors out of one of our whole weights: what `from_hf` was made of, bit for bit.

    Args:
        whole: as `from_hf` returns it; rows that pad the vocabulary may follow.
    """
    names = hf_names(name, hf)
    if name in (EMBEDDING, HEAD):
        return {names[0]: whole[: hf.vocab_size]}
    if name.endswith(_FC1):
        return dict(zip(names, whole.chunk(2)))
    if name.endswith(_QKV):
        queries = hf.num_attention_heads // hf.num_key_value_heads
        heads = whole.unflatten(0, (hf.num_key_value_heads, queries + 2, hf.head_dim))
        parts = heads.split([queries, 1, 1], dim=1)
        return {n: part.reshape(-1, whole.size(-1)) for n, part in zip(names, parts)}
    return {names[0]: whole}


def hf_names(name: str, hf: LlamaConfig) -> list[str]:
    """The HuggingFace tensors that one of our whole weights is made of."""
    if name in _PLAIN:
        return [_PLAIN[name]]
    number, rest = _in_layer(name)
    prefix = f"model.layers.{number}."
    if rest in _PLAIN_IN_LAYER:
        return [prefix + _PLAIN_IN_LAYER[rest]]
    if rest == _FC1:
        return [f"{prefix}mlp.{part}_proj.weight" for part in ("gate", "up")]
    assert rest == _QKV, name
    return [f"{prefix}self_attn.{part}_proj.weight" for part in "qkv"]


def expected_tensors(hf: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a HuggingFace Llama of this configuration has."""
    heads, groups = hf.num_attention_heads * hf.head_dim, hf.num_key_value_heads * hf.head_dim
    found = {}
    for name in whole_names(hf):
        rows, *rest = whole_shape(name, hf)
        parts = {_QKV: (heads, groups, groups), _FC1: (rows // 2, rows // 2)}.get(_in_layer(name)[1], (rows,))
        found.update({n: (part, *rest) for n, part in zip(hf_names(name, hf), parts)})
    return found


def account(hf: LlamaConfig, weights: HFWeights) -> list[str]:
    """Check that the tensors are the Llama's, each used exactly once. Reads headers, and data of what is left unused.

    Returns:
        What is there and not used, and why that is right: a line each.

    Raises:
        ConfigError: a tensor is missing, is not the Llama's, or has another shape; it names the tensor and its file.
    """
    expected = expected_tensors(hf)
    notes = [f"left out: {name}, a variant of the weights in another type." for name in weights.variants]
    for name in weights:
        if name not in expected:
            notes.append(_check_unused(name, hf, weights))
    for name, shape in expected.items():
        if name not in weights:
            raise ConfigError(f"{str(weights.folder)!r} lacks the tensor {name!r}, which config.json calls for.")
        entry = weights.entry(name)
        if entry.shape != shape:
            raise ConfigError(
                f"The tensor {name!r} in {_file(name, weights)} has shape {list(entry.shape)}; config.json makes it "
                f"{list(shape)}."
            )
        if not entry.dtype.is_floating_point or entry.dtype.itemsize < 2:
            raise ConfigError(
                f"The tensor {name!r} in {_file(name, weights)} is of type {entry.dtype}: quantized weights cannot be "
                "used. Take the model's unquantized folder."
            )
    _check_types(hf, weights)
    return notes


def _check_types(hf: LlamaConfig, weights: HFWeights) -> None:
    """What is joined or stacked must be of one type."""
    first: dict[str, str] = {}
    for name in whole_names(hf):
        key = checkpoint_place(name)[0]
        for hf_name in hf_names(name, hf):
            other = first.setdefault(key, hf_name)
            if weights.entry(hf_name).dtype != weights.entry(other).dtype:
                raise ConfigError(
                    f"The tensor {hf_name!r} in {_file(hf_name, weights)} is of type {weights.entry(hf_name).dtype}, "
                    f"{other!r} of {weights.entry(other).dtype}: of one kind of weight all must be alike. Save the "
                    "model in one type."
                )


def _check_unused(name: str, hf: LlamaConfig, weights: HFWeights) -> str:
    """Why a tensor that is not a weight may be left out."""
    if name == _PLAIN[HEAD] and hf.tie_word_embeddings:
        embedding = _PLAIN[EMBEDDING]
        if embedding in weights and not _same_bits(name, embedding, weights):
            raise ConfigError(
                f"The tensor {name!r} in {_file(name, weights)} differs from {embedding!r}, and config.json says "
                "tie_word_embeddings=true. Correct config.json, or download the weights again."
            )
        return f"{name} is the embedding once more (tied): kept once."
    if name.endswith("rotary_emb.inv_freq"):
        expected = LlamaRotaryEmbedding(config=hf).inv_freq.double()
        found = weights[name]
        tolerance = 1e-6 if found.dtype.itemsize >= 4 else 2.0**-7
        if found.shape != expected.shape or not torch.allclose(found.double(), expected, rtol=tolerance, atol=0):
            raise ConfigError(
                f"The buffer {name!r} in {_file(name, weights)} holds other RoPE frequencies than config.json says. "
                "Correct rope_theta or rope_scaling in config.json."
            )
        return f"{name} is what config.json says: computed, not stored."
    raise ConfigError(
        f"The tensor {name!r} in {_file(name, weights)} belongs to no Llama of this config.json: it would be lost. "
        "Name the folder of a plain Llama, or correct its config.json."
    )


def _same_bits(one: str, other: str, weights: HFWeights) -> bool:
    a, b = weights.entry(one), weights.entry(other)
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return all(
        torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
        for mine, theirs in zip(weights.pieces(one), weights.pieces(other))
    )


def _file(name: str, weights: HFWeights) -> str:
    return repr(str(weights.folder / weights.file_of(name)))


def _in_layer(name: str) -> tuple[Optional[int], str]:
    """Number of the decoder layer that a weight lies in, and its name there; (None, name) outside of them."""
    number, _, rest = name.removeprefix(_LAYER).partition(".")
    return (int(number), rest) if name.startswith(_LAYER) and number.isdigit() else (None, name)
