"""Weights held in NF4 (Dettmers et al. 2023, QLoRA): four bits per element and a scale for each 64 of them.

A block of 64 elements lies within a row, along a linear layer's input, and has its scale in fp32: 0.5625 bytes per
element. Every tensor-parallel size that splits rows between blocks therefore gives the same values, and those of
bitsandbytes' `Linear4bit` without nested quantization. bitsandbytes does the conversion; it is imported when the first
weight is converted.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from megatron_anymal.config import NF4_BLOCK

# Blocks that are quantized at a time: on a CPU, bitsandbytes needs several temporary fp32 tensors of their size.
_BLOCKS_AT_ONCE = 1 << 14


class NF4Weight(Tensor):
    """A matrix [out, in] whose values are held in NF4.

    It has the shape and dtype of the values, and no memory of its own. Copying into it quantizes; every other operation
    is applied to the dequantized values, which are freed afterwards. So a frozen linear layer dequantizes its weight in
    the forward pass and again in the backward pass, and keeps only this.

    Attributes:
        packed: [blocks, 32] uint8, two elements per byte.
        scales: [blocks] fp32, each block's largest magnitude.
    """

    packed: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, packed: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> NF4Weight:
        """Create a weight of these bytes; see the attributes.

        Args:
            shape: [out, in].
            dtype: number format of the dequantized values.
        """
        weight: NF4Weight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=packed.device)
        weight.packed, weight.scales = packed, scales
        return weight

    @classmethod
    def empty(cls, like: Tensor) -> NF4Weight:
        """Create a weight with the shape [out, in], dtype and device of another, and with any values.

        Raises:
            ValueError: a row does not consist of whole blocks.
        """
        if like.size(-1) % NF4_BLOCK:
            raise ValueError(f"NF4 needs rows of a multiple of {NF4_BLOCK} elements, not {like.size(-1)}.")
        blocks = math.prod(like.shape) // NF4_BLOCK
        packed = torch.empty(blocks, NF4_BLOCK // 2, dtype=torch.uint8, device=like.device)
        scales = torch.empty(blocks, dtype=torch.float32, device=like.device)
        return cls(packed, scales, like.shape, like.dtype)

    def dequantize(self) -> Tensor:
        """Return the values, [out, in] in the weight's dtype."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        blocks = torch.Size((len(self.packed), NF4_BLOCK))
        state = QuantState(self.scales, shape=blocks, blocksize=NF4_BLOCK, quant_type="nf4", dtype=self.dtype)
        values: Tensor = dequantize_4bit(self.packed, state)
        return values.reshape(self.shape)

    def _quantize(self, source: Tensor) -> None:
        """Set the values from a tensor of this shape: rounded to the weight's dtype, then to NF4."""
        from bitsandbytes.functional import quantize_4bit

        if source.shape != self.shape:
            raise ValueError(f"A weight of shape {list(self.shape)} cannot be set from {list(source.shape)}.")
        blocks = source.detach().to(self.packed.device, self.dtype).reshape(-1, NF4_BLOCK)
        for first in range(0, len(blocks), _BLOCKS_AT_ONCE):
            some = slice(first, first + _BLOCKS_AT_ONCE)
            packed, state = quantize_4bit(blocks[some], blocksize=NF4_BLOCK, quant_type="nf4")
            self.packed[some] = packed.view(-1, NF4_BLOCK // 2)
            self.scales[some] = state.absmax

    def __repr__(self, **ignored: Any) -> str:  # type: ignore[override]
        """Name the shape and dtype."""
        return f"NF4Weight({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Apply an operation, see above.

        Raises:
            TypeError: it would change the weight, and is not a copy into it.
        """
        if func is torch.ops.aten.detach.default:
            [weight] = args
            return cls(weight.packed, weight.scales, weight.shape, weight.dtype)
        if func is torch.ops.aten.copy_.default and isinstance(args[0], NF4Weight):
            args[0]._quantize(_plain(args[1]))
            return args[0]
        if func._schema.is_mutable and isinstance(args[0], NF4Weight):
            raise TypeError(f"A weight in NF4 cannot be changed by {func}.")
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs or {}))


def _plain(value: Any) -> Any:
    return value.dequantize() if isinstance(value, NF4Weight) else value


class NF4Layer(TransformerLayer):
    """A Transformer layer of megatron-core whose matrices are frozen and in NF4."""

    def __init__(self, *args: Any, **kwargs: Any):
        """Build the layer and replace its matrices, so that a model never has more than one layer's unquantized ones.

        Args:
            args: as of TransformerLayer, like `kwargs`.

        Raises:
            ValueError: a matrix has rows of a length that blocks do not divide.
        """
        super().__init__(*args, **kwargs)
        for module in self.modules():
            weight: Any = module._parameters.get("weight")
            if weight is not None and weight.dim() == 2:
                held = nn.Parameter(NF4Weight.empty(weight), requires_grad=False)
                # How it is split over the tensor-parallel ranks.
                held.__dict__.update(vars(weight))
                module.register_parameter("weight", held)
