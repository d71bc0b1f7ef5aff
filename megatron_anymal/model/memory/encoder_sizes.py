"""Measure an encoder's sizes on one that is built without weight data (meta_device.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from megatron_anymal import backend
from megatron_anymal.config import ModalityConfig, ModelConfig
from megatron_anymal.modalities import Modality
from megatron_anymal.model.encoders import seeded_encoder
from megatron_anymal.model.memory.media import EncoderSizes
from megatron_anymal.model.meta_device import on_meta, without_weights


def measured_encoders(
    model: ModelConfig, precision: str, modalities: Mapping[str, Modality], *, operations: bool = False
) -> list[tuple[ModalityConfig, EncoderSizes]]:
    """Build each modality's encoder without weight data and measure its sizes.

    Args:
        precision: `trainer.precision`.
        modalities: by their name in the configuration.
        operations: also count the operations of a forward pass, which runs the encoder.

    Returns:
        The sections, with encoders that load no weights, and the sizes.

    Raises:
        ConfigError: an encoder cannot be built.
    """
    dtype = backend.compute_dtype(precision)
    sections = without_weights(model).modalities
    return [
        (section, encoder_sizes(name, section, modalities[name], dtype, operations=operations))
        for name, section in sections.items()
    ]


def encoder_sizes(
    name: str, section: ModalityConfig, modality: Modality, dtype: torch.dtype, *, operations: bool = False
) -> EncoderSizes:
    """Build an encoder without weight data and measure its sizes.

    Args:
        section: its encoder must not load weights.
        operations: also count the operations of a forward pass, which runs the encoder.

    Raises:
        ConfigError: the encoder cannot be built.
    """
    with on_meta():
        encoder = seeded_encoder(name, section.encoder, modality, 0).to(dtype)
        kept = 0 if section.encoder.freeze else _kept(encoder, modality.piece_shape)
        counted = _operations(encoder, modality.piece_shape, dtype) if operations else 0
    parameters = sum(p.numel() for p in encoder.parameters())
    piece = math.prod(modality.piece_shape)
    return EncoderSizes(parameters, encoder.feature_tokens, encoder.width, piece, kept, counted)


def _kept(encoder: nn.Module, piece_shape: Sequence[int]) -> int:
    """Bytes that autograd saves for one piece, excluding weights."""
    weights = {t.untyped_storage()._cdata for t in [*encoder.parameters(), *encoder.buffers()]}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _FusedAttention():
        encoder(torch.zeros(1, *piece_shape, device="meta"))
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}
    return sum(size for pointer, size in storages.items() if pointer not in weights)


def _operations(encoder: nn.Module, piece_shape: Sequence[int], dtype: torch.dtype) -> int:
    """Floating-point operations of the matrix products, convolutions and attention of one piece's forward pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder(torch.zeros(1, *piece_shape, device="meta", dtype=dtype))
    return counter.get_total_flops()


class _FusedAttention(TorchFunctionMode):
    """Replaces torch's attention, which on the meta device would be decomposed and save its probabilities."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """Saves the same tensors as fused attention: queries, keys, values, output and log-sum-exps."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = query.new_empty(query.shape[:-1] + value.shape[-1:])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out
