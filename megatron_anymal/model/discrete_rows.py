"""Rows of the embedding and the head for the marks and codes of discrete media.

They are weights of their own next to the Llama's. The Llama's rows thus keep their tensors, their shards and their
checkpoints, bit for bit, and take neither gradients nor optimizer state while only the new rows train. Each of the two
is split over the tensor-parallel ranks on its own, padded to a multiple of their number like the Llama's vocabulary.

Shapes: T tokens of a micro-batch on this rank, H hidden size, A marks and codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_anymal.model.unsharded_weights import Weight, initial_value, list_weights

EMBEDDING, HEAD = "discrete.embedding.weight", "discrete.head.weight"
# Columns of the Llama's rows that are gathered at a time for their statistics; the same under every layout, so that
# sums have the same order.
_COLUMNS = 256


class VocabularyRows(nn.Module):
    """This rank's rows [A / tensor-parallel size, H] of the embedding or the head.

    They are used through a call, which waits for their values if megatron-core gathers them during the forward pass.
    """

    def __init__(self, config: TransformerConfig, added: int):
        """Create the weight, with its values not yet set.

        Args:
            added: A.
        """
        super().__init__()
        rows = -(-added // config.tensor_model_parallel_size)
        device = torch.device("cuda")
        self.weight = nn.Parameter(torch.empty(rows, config.hidden_size, dtype=config.params_dtype, device=device))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self) -> Tensor:
        """Return the weight, [A / tensor-parallel size, H]."""
        return self.weight

    def lookup(self, index: Tensor) -> Tensor:
        """Return the rows of [T] indices, [T, H] on every rank; zeros for negative indices. Collective over the
        tensor-parallel ranks."""
        weight = self()
        local = index - parallel_state.get_tensor_model_parallel_rank() * len(weight)
        mine = (local >= 0) & (local < len(weight))
        return reduce_from_tensor_model_parallel_region(F.embedding(local.where(mine, 0), weight) * mine[:, None])


class DiscreteRows(nn.Module):
    """This pipeline chunk's rows of the embedding, of the head, or both.

    Attributes:
        added: A, without padding.
        embedding: None except on the chunk that holds the embedding.
        head: None except on the chunk that holds the head. A tied head on the chunk of the embedding has no weight of
            its own; on another chunk it has a copy.
        tied: whether the head shares the embedding's rows.
    """

    def __init__(self, config: TransformerConfig, added: int, *, first: bool, last: bool, tied: bool):
        """Create the weights, with their values not yet set.

        Args:
            added: A.
            first: whether the chunk holds the embedding.
            last: whether the chunk holds the head.
        """
        super().__init__()
        self.added, self.tied = added, tied
        self.embedding = VocabularyRows(config, added) if first else None
        self.head = VocabularyRows(config, added) if last and not (tied and first) else None
        for weight in self.parameters() if tied and first != last else ():
            copy: Any = weight
            # Gets a gradient bucket of its own, cut alike on both stages, and counts once in the gradient's norm.
            copy.shared_embedding, copy.shared = True, last

    def head_weight(self) -> Tensor:
        """Return the head's rows, [A / tensor-parallel size, H], on the chunk that holds the head."""
        rows = self.embedding if self.head is None else self.head
        assert rows is not None
        return rows()


def embed_tokens(gpt: GPTModel, discrete: DiscreteRows, tokens: Tensor, vocab_size: int) -> Tensor:
    """Embed text, marks and codes. Collective over the tensor-parallel ranks.

    Args:
        tokens: [1, T] int64; marks and codes are `vocab_size` and above.
        vocab_size: of the Llama, without padding.

    Returns:
        [T, 1, H], whole on every tensor-parallel rank.
    """
    assert discrete.embedding is not None
    codes = tokens >= vocab_size
    text = gpt.embedding(input_ids=tokens.masked_fill(codes, 0), position_ids=None)
    return torch.where(codes[0, :, None, None], discrete.embedding.lookup(tokens[0] - vocab_size)[:, None], text)


def add_tied_gradients(models: Sequence[Any]) -> None:
    """Add up the gradients of tied rows that the first and the last pipeline stage both hold.

    Collective over these two stages, after their gradients were reduced over the replicas.

    Args:
        models: this rank's chunks, unwrapped.
    """
    group: Any = parallel_state.get_embedding_group(check_initialized=False)
    if parallel_state.get_pipeline_model_parallel_world_size() == 1 or group is None:
        return
    for model in models:
        for weight in model.discrete.parameters() if model.discrete is not None and model.discrete.tied else ():
            if weight.requires_grad:
                dist.all_reduce(weight.main_grad, group=group)


def initialise_rows(models: Sequence[Any], seed: int, how: str, std: float) -> None:
    """Draw the rows of marks and codes; the same values under every layout. Collective over the tensor-parallel ranks.

    Args:
        models: this rank's chunks, with the Llama's weights set.
        seed: together with a weight's name decides its values.
        how: `statistics` (normal, with each column's mean and standard deviation over the Llama's rows) or `normal`.
        std: standard deviation for `normal`, whose mean is 0.
    """
    for model in models:
        weights = {weight.name: weight for weight in list_weights(model)}
        pairs = (
            (EMBEDDING, "language_model.embedding.word_embeddings.weight"),
            (HEAD, "language_model.output_layer.weight"),
        )
        for name, llama in pairs:
            if name in weights:
                weight = weights[name]
                noise = initial_value(name, weight.shape, seed, 1.0, weight.parameter.device)
                weight.set(noise * std if how == "normal" else _like_rows(weights[llama], noise))


def _like_rows(llama: Weight, noise: Tensor) -> Tensor:
    """Scale standard normal noise [A, H] to each column's mean and standard deviation over the Llama's rows."""
    parameter = llama.parameter.detach()
    means, deviations = [], []
    for columns in parameter.split(_COLUMNS, dim=1):
        shards = [torch.empty_like(columns, memory_format=torch.contiguous_format) for _ in range(_tensor_ranks())]
        dist.all_gather(shards, columns.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
        rows = torch.cat(shards)[: llama.rows].double()
        means.append(rows.mean(0))
        deviations.append(rows.std(0))
    return noise * torch.cat(deviations).to(noise) + torch.cat(means).to(noise)


def _tensor_ranks() -> int:
    return int(parallel_state.get_tensor_model_parallel_world_size())
