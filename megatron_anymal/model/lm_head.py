"""The language model head: logits, and the loss at the positions that have a label.

A frozen Llama's head is the widest matrix product of the model, and most positions of a multimodal pack (soft tokens,
prompts, padding) have no label, so only the others go through it. Their logits exist one chunk of rows at a time. If
the head is frozen, the gradient of its input is computed together with the loss, so that a chunk takes two products (4N
operations per row for N parameters, as in any frozen layer); if it trains, the backward pass recomputes the logits.

Shapes: T tokens of a micro-batch on this rank, L of them with a label, H hidden size, V this rank's rows of the
(padded) vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Optional

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

# Logits in memory at a time: 256 MiB in fp32.
CHUNK_ELEMENTS = 1 << 26


def all_logits(gpt: GPTModel, hidden: Tensor, vocab_size: int) -> Tensor:
    """Compute the logits of every position.

    Args:
        hidden: [T, 1, H], or [T / tensor-parallel size, 1, H] under sequence parallelism.
        vocab_size: without padding.

    Returns:
        [1, T, V]; minus infinity in the rows that pad the vocabulary.
    """
    logits, _ = gpt.output_layer(hidden, weight=_tied_weight(gpt))
    return _hide_padding(logits, vocab_size).transpose(0, 1).contiguous()


def logits_of(gpt: GPTModel, hidden: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Compute the logits of some positions. Collective over the tensor-parallel ranks under sequence parallelism.

    Args:
        hidden: [T, 1, H], or [T / tensor-parallel size, 1, H] under sequence parallelism.
        positions: [r] int64.
        vocab_size: without padding.

    Returns:
        [r, V], at least fp32; minus infinity in the rows that pad the vocabulary.
    """
    return _logits(_rows(gpt, hidden, positions), _head_weight(gpt), vocab_size)


def label_losses(gpt: GPTModel, hidden: Tensor, labels: Tensor, label_index: Tensor, vocab_size: int) -> Tensor:
    """Compute the cross-entropy at the positions that have a label; 0 elsewhere. Collective over the tensor-parallel
    ranks.

    Args:
        hidden: [T, 1, H], or [T / tensor-parallel size, 1, H] under sequence parallelism.
        labels: [1, T] int64.
        label_index: [L] int64, at least one: the positions with a label, each once.
        vocab_size: without padding.

    Returns:
        [1, T] fp32 (fp64 if the model is).
    """
    rows = _rows(gpt, hidden, label_index)
    losses = _HeadLoss.apply(rows, _head_weight(gpt), labels[0].index_select(0, label_index), vocab_size)
    return losses.new_zeros(labels.size(1)).index_copy(0, label_index, losses)[None]


def _tied_weight(gpt: GPTModel) -> Optional[Tensor]:
    return gpt.shared_embedding_or_output_weight() if gpt.share_embeddings_and_output_weights else None


def _head_weight(gpt: GPTModel) -> Tensor:
    tied = _tied_weight(gpt)
    return gpt.output_layer.weight if tied is None else tied


def _rows(gpt: GPTModel, hidden: Tensor, positions: Tensor) -> Tensor:
    """Select hidden states [r, H], whole on every tensor-parallel rank, from [T or T / tensor-parallel size, 1, H]."""
    if gpt.config.sequence_parallel:
        return gather_from_sequence_parallel_region(hidden)[:, 0].index_select(0, positions)
    return copy_to_tensor_model_parallel_region(hidden[:, 0].index_select(0, positions))


def _hide_padding(logits: Tensor, vocab_size: int) -> Tensor:
    """Exclude the rows that pad the vocabulary from the softmax of logits [..., V]."""
    real = vocab_size - parallel_state.get_tensor_model_parallel_rank() * logits.size(-1)
    if real >= logits.size(-1):
        return logits
    return logits.masked_fill(torch.arange(logits.size(-1), device=logits.device) >= real, float("-inf"))


class _HeadLoss(torch.autograd.Function):
    """rows [L, H], weight [V, H], labels [L] -> losses [L]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
        of_rows, of_weight = ctx.needs_input_grad[:2]
        ctx.of_weight, ctx.vocab_size = of_weight, vocab_size
        losses, sums, gradients = [], [], []
        for part in _chunks(len(rows), len(weight)):
            logits = _logits(rows[part], weight, vocab_size)
            loss, log_sum, softmax = _cross_entropy(logits, labels[part])
            losses.append(loss)
            if of_weight:
                sums.append(log_sum)
            elif of_rows:
                gradients.append(_less_label(softmax, labels[part]).to(weight.dtype) @ weight)
        if of_weight:
            ctx.save_for_backward(rows, weight, labels, torch.cat(sums))
        elif of_rows:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Optional[Tensor], ...]:
        (scale,) = upstream
        if not ctx.of_weight:
            (gradients,) = ctx.saved_tensors
            return (gradients * scale[:, None]).to(gradients.dtype), None, None, None
        rows, weight, labels, sums = ctx.saved_tensors
        of_rows = torch.empty_like(rows)
        # Chunks are accumulated in fp32: in bf16 every addition would be rounded.
        of_weight = torch.zeros_like(weight, dtype=sums.dtype)
        for part in _chunks(len(rows), len(weight)):
            logits = _logits(rows[part], weight, ctx.vocab_size)
            softmax = logits.sub_(sums[part, None]).exp_()
            of_logits = _less_label(softmax, labels[part]).mul_(scale[part, None]).to(weight.dtype)
            of_rows[part] = of_logits @ weight
            of_weight += of_logits.T @ rows[part]
        return of_rows, of_weight.to(weight.dtype), None, None


def _chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))


def _logits(rows: Tensor, weight: Tensor, vocab_size: int) -> Tensor:
    """Compute logits [l, V], at least in fp32."""
    logits = rows @ weight.T
    return _hide_padding(logits if logits.dtype == torch.float64 else logits.float(), vocab_size)


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses [l] and log-sum-exps [l] over the whole vocabulary, and the softmax [l, V], which reuses the
    logits' memory. Collective."""
    top = logits.amax(-1)
    _all_reduce(top, dist.ReduceOp.MAX)
    mine, index = _own_labels(logits, labels)
    target = logits.gather(1, index[:, None])[:, 0].masked_fill(~mine, 0.0)
    exponentials = logits.sub_(top[:, None]).exp_()
    both = torch.stack([target, exponentials.sum(-1)])
    _all_reduce(both, dist.ReduceOp.SUM)
    log_sum = both[1].log() + top
    return log_sum - both[0], log_sum, exponentials.div_(both[1, :, None])


def _less_label(softmax: Tensor, labels: Tensor) -> Tensor:
    """Turn the softmax into the losses' gradient [l, V], in place."""
    mine, index = _own_labels(softmax, labels)
    return softmax.scatter_add_(1, index[:, None], -mine[:, None].to(softmax.dtype))


def _own_labels(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return [l] whether each label is in this rank's shard of the vocabulary, and [l] its column there (else 0)."""
    index = labels - parallel_state.get_tensor_model_parallel_rank() * logits.size(-1)
    mine = (index >= 0) & (index < logits.size(-1))
    return mine, index.where(mine, 0)


def _all_reduce(tensor: Tensor, operation: Any) -> None:
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        dist.all_reduce(tensor, op=operation, group=parallel_state.get_tensor_model_parallel_group())
