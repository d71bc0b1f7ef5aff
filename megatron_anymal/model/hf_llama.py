"""Map Llama weights between HuggingFace, our model and our checkpoints: other names, and fused attention and MLP.

Our model fuses q, k and v by key/value group (the group's query heads, its key head, its value head), and concatenates
the gate and up projections. A checkpoint stacks the layers and names the norms as Transformer Engine does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
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
        ConfigError: the folder lacks weights or a tensor, a file is damaged, or a tensor does not belong to the Llama
            or has another shape than its config.json implies.
    """
    try:
        files = HFWeights(folder)
        account(hf, files)
        for weight in weights:
            if weight.name.startswith("language_model."):
                weight.set_from(partial(from_hf, weight.name, hf, files.__getitem__))
    except TensorFileError as error:
        raise ConfigError(
            f"model.language_model.path: {error} (To use random weights, set model.language_model.load_weights=false.)"
        ) from None
    except ConfigError as error:
        raise ConfigError(f"model.language_model.path={folder!r} does not match its config.json: {error}") from None


def whole_names(hf: LlamaConfig, layers: Optional[Iterable[int]] = None) -> list[str]:
    """Return our names of the Llama's whole weights, in the model's order.

    Args:
        layers: return only the weights of these layers; None for the whole model.
    """
    names = [
        f"{_LAYER}{number}.{rest}"
        for number in (range(hf.num_hidden_layers) if layers is None else layers)
        for rest in _IN_LAYER
    ]
    if layers is not None:
        return names
    return [EMBEDDING, *names, _FINAL_NORM, *([] if hf.tie_word_embeddings else [HEAD])]


def whole_shape(name: str, hf: LlamaConfig) -> tuple[int, ...]:
    """Return the shape of one of our whole weights of the Llama."""
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


def checkpoint_position(name: str) -> tuple[str, Optional[int]]:
    """Return where a checkpoint keeps one of our whole weights: its key and, if the layers are stacked, the layer.

    Weights outside the plain Llama (adapters, projectors, encoders) are stored under their own name.
    """
    number, rest = _in_layer(name)
    if number is None or ".lora." in name:
        return name, None
    return _LAYER + _STACKED.get(rest, rest), number


def chunks_from_hf(name: str, hf: LlamaConfig, read: Callable[[str], Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield one of our whole weights from HuggingFace's, in chunks of rows, without copies if possible.

    Args:
        read: reads a HuggingFace tensor by name.

    Returns:
        (first row, rows [k, ...]), in order.
    """
    names = hf_names(name, hf)
    if name.endswith(_QKV):
        yield 0, _join_heads(names, hf, read)
        return
    row = 0
    for hf_name in names:
        rows = read(hf_name)
        yield row, rows
        row += len(rows)


def _join_heads(names: list[str], hf: LlamaConfig, read: Callable[[str], Tensor]) -> Tensor:
    """Concatenate q, k and v of each group; holds the result and one of the three in memory."""
    groups = hf.num_key_value_heads
    queries = hf.num_attention_heads // groups
    heads, first = None, 0
    for name, count in zip(names, (queries, 1, 1)):
        projection = read(name).unflatten(0, (groups, count, -1))
        if heads is None:
            heads = projection.new_empty(groups, queries + 2, *projection.shape[2:])
        heads[:, first : first + count] = projection
        first += count
        del projection
    assert heads is not None
    return heads.flatten(0, 2)


def from_hf(name: str, hf: LlamaConfig, read: Callable[[str], Tensor]) -> Tensor:
    """Build one of our whole weights from HuggingFace's.

    Args:
        read: reads a HuggingFace tensor by name.

    Returns:
        [rows, ...] without vocabulary padding.
    """
    chunks = [chunk for _, chunk in chunks_from_hf(name, hf, read)]
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


def to_hf(name: str, hf: LlamaConfig, whole: Tensor) -> dict[str, Tensor]:
    """Split one of our whole weights into HuggingFace's tensors; the exact inverse of `from_hf`.

    Args:
        whole: [rows, ...], the result of `from_hf`, possibly followed by rows that pad the vocabulary.
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
    """Return the names of the HuggingFace tensors that one of our whole weights consists of."""
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
    """Return name and shape of every tensor of a HuggingFace Llama of this configuration."""
    heads, groups = hf.num_attention_heads * hf.head_dim, hf.num_key_value_heads * hf.head_dim
    shapes = {}
    for name in whole_names(hf):
        rows, *rest = whole_shape(name, hf)
        parts = {_QKV: (heads, groups, groups), _FC1: (rows // 2, rows // 2)}.get(_in_layer(name)[1], (rows,))
        shapes.update({n: (part, *rest) for n, part in zip(hf_names(name, hf), parts)})
    return shapes


def account(hf: LlamaConfig, weights: HFWeights) -> list[str]:
    """Check that the tensors are exactly the Llama's. Reads the headers, and the data of unused tensors.

    Returns:
        A line per unused tensor, with the reason why it may be left out.

    Raises:
        ConfigError: a tensor is missing, does not belong to the Llama, or has another shape; names tensor and file.
    """
    expected = expected_tensors(hf)
    notes = [f"left out: {name}, a variant of the weights in another type." for name in weights.variants]
    for name in weights:
        if name not in expected:
            notes.append(_check_unused(name, hf, weights))
    for name, shape in expected.items():
        if name not in weights:
            raise ConfigError(f"{str(weights.folder)!r} lacks the tensor {name!r}, which config.json requires.")
        entry = weights.entry(name)
        if entry.shape != shape:
            raise ConfigError(
                f"The tensor {name!r} in {_file(name, weights)} has shape {list(entry.shape)}, but config.json implies "
                f"{list(shape)}."
            )
        if not entry.dtype.is_floating_point or entry.dtype.itemsize < 2:
            raise ConfigError(
                f"The tensor {name!r} in {_file(name, weights)} is of type {entry.dtype}: quantized weights cannot be "
                "used. Use the folder of the unquantized model."
            )
    _check_types(hf, weights)
    return notes


def _check_types(hf: LlamaConfig, weights: HFWeights) -> None:
    """Check that all tensors that are fused or stacked together have the same dtype."""
    first: dict[str, str] = {}
    for name in whole_names(hf):
        key = checkpoint_position(name)[0]
        for hf_name in hf_names(name, hf):
            other = first.setdefault(key, hf_name)
            if weights.entry(hf_name).dtype != weights.entry(other).dtype:
                raise ConfigError(
                    f"The tensor {hf_name!r} in {_file(hf_name, weights)} is of type {weights.entry(hf_name).dtype}, "
                    f"but {other!r} is of type {weights.entry(other).dtype}: all weights of one kind must have the "
                    "same type. Save the model in one type."
                )


def _check_unused(name: str, hf: LlamaConfig, weights: HFWeights) -> str:
    """Return why a tensor that is not a weight may be left out."""
    if name == _PLAIN[HEAD] and hf.tie_word_embeddings:
        embedding = _PLAIN[EMBEDDING]
        if embedding in weights and not _same_bits(name, embedding, weights):
            raise ConfigError(
                f"The tensor {name!r} in {_file(name, weights)} differs from {embedding!r}, but config.json has "
                "tie_word_embeddings=true. Correct config.json, or download the weights again."
            )
        return f"{name} is the tied embedding: stored only once."
    if name.endswith("rotary_emb.inv_freq"):
        expected = LlamaRotaryEmbedding(config=hf).inv_freq.double()
        stored = weights[name]
        tolerance = 1e-6 if stored.dtype.itemsize >= 4 else 2.0**-7
        if stored.shape != expected.shape or not torch.allclose(stored.double(), expected, rtol=tolerance, atol=0):
            raise ConfigError(
                f"The buffer {name!r} in {_file(name, weights)} has RoPE frequencies that differ from config.json. "
                "Correct rope_theta or rope_scaling in config.json."
            )
        return f"{name} agrees with config.json: computed, not stored."
    raise ConfigError(
        f"The tensor {name!r} in {_file(name, weights)} does not belong to a Llama with this config.json and would be "
        "lost. Name the folder of a plain Llama, or correct its config.json."
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
    """Return a weight's decoder layer and its name within the layer; (None, name) outside the layers."""
    number, _, rest = name.removeprefix(_LAYER).partition(".")
    return (int(number), rest) if name.startswith(_LAYER) and number.isdigit() else (None, name)
