"""The last layer's output at some positions only.

After the attention of the last layer no position reads another one any more, and only some go through the head: those
with a label, or in generation the last one of each document. So the last layer computes queries, keys, values and
attention for all of a pack's tokens, but its output projection, residual connections and feed-forward, and the final
norm, only at those positions. Nothing else depends on the positions left out, so losses, gradients and answers are the
same. The saving is largest on the last stage of a pipeline, which has the head besides its layers.

FP8 layers compute all positions: their products need multiples of 16 rows, and the scaling follows all values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Optional

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn


def output_positions(gpt: GPTModel, wanted: Optional[Tensor], tokens: int) -> Optional[Tensor]:
    """Choose the positions at which the last layer computes its output.

    Args:
        gpt: this rank's part of the Llama.
        wanted: [L] int64: the positions that go through the head; None: all.
        tokens: number of tokens of the micro-batch on this rank, before they are split for sequence parallelism.

    Returns:
        [R] int64: `wanted`, its last position repeated until the tensor-parallel ranks that share a sequence can
        divide it; None if the layer computes all positions, or is on another rank.
    """
    if wanted is None or not gpt.selects_output:
        return None
    ranks = parallel_state.get_tensor_model_parallel_world_size() if gpt.config.sequence_parallel else 1
    filling = -len(wanted) % ranks
    if len(wanted) + filling >= tokens:
        return None
    return torch.cat([wanted, wanted[-1:].expand(filling)]) if filling else wanted


def select_output(gpt: GPTModel) -> None:
    """Let the last layer of the Llama follow `DocumentPack.output_positions`; sets `gpt.selects_output`."""
    gpt.selects_output = bool(gpt.post_process and gpt.decoder.layers and not gpt.config.fp8)
    if gpt.selects_output:
        _Selection(gpt.decoder.layers[-1])


class _Selection:
    """What selects a layer's positions in a pass, around megatron-core's own forward functions."""

    def __init__(self, layer: Any) -> None:
        self._positions: Optional[Tensor] = None
        self._sequence_parallel = layer.config.sequence_parallel
        self._add_residual = layer.self_attn_bda
        layer.self_attn_bda = self._added
        layer.register_forward_pre_hook(self._begin, with_kwargs=True)
        layer.self_attention.linear_proj.register_forward_pre_hook(self._attended)

    def _begin(self, layer: nn.Module, inputs: Any, settings: Mapping[str, Any]) -> None:
        # Also called when the layer is computed again in the backward pass.
        self._positions = settings["packed_seq_params"].output_positions

    def _attended(self, linear: nn.Module, inputs: tuple[Tensor, ...]) -> Optional[tuple[Tensor, ...]]:
        """Select from the attention's output, [T, 1, n * d], of which every tensor-parallel rank has all tokens."""
        if self._positions is None:
            return None
        return inputs[0].index_select(0, self._positions), *inputs[1:]

    def _added(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Take the place of the function that adds the layer's input to the projected attention."""
        add = self._add_residual(training, fused)

        def add_selected(projected: Any, residual: Tensor, dropout: float) -> Tensor:
            added: Tensor = add(projected, residual if self._positions is None else self._own(residual), dropout)
            return added

        return add_selected

    def _own(self, residual: Tensor) -> Tensor:
        """Select from the layer's input, [T or T / tensor-parallel size, 1, H], this rank's share of the positions."""
        assert self._positions is not None
        if not self._sequence_parallel:
            return residual.index_select(0, self._positions)
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        own = self._positions.chunk(ranks)[parallel_state.get_tensor_model_parallel_rank()]
        return gather_from_sequence_parallel_region(residual).index_select(0, own)
