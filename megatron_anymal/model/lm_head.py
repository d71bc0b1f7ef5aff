"""The language model head: logits, and the loss at the positions that have a label.

A frozen Llama's head is the widest matrix product of the model, and most positions of a multimodal pack (soft tokens,
prompts, padding) have no label, so only the others go through it. Their logits exist one chunk of rows at a time. If
the head is frozen, the gradient of its input is computed together with the loss, so that a chunk takes two products (4N
operations per row for N parameters, as in any frozen layer); if it trains, the backward pass recomputes the logits.
With discrete media the head consists of two weights, the Llama's and that of marks and codes, and each of them is
treated according to whether it trains.

Shapes: T tokens of a micro-batch on this rank, L of them with a label, H hidden size, V this rank's rows of the
(padded) vocabulary, those of marks and codes last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor

from megatron_anymal.model.discrete_rows import DiscreteRows

# Logits in memory at a time: 256 MiB in fp32.
CHUNK_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Extent:
    """Which part of the vocabulary a weight of the head covers.

    Attributes:
        first: its first id.
        size: number of ids, without padding.
        rows: rows of the weight on this rank.
    """

    first: int
    size: int
    rows: int


def all_logits(gpt: GPTModel, hidden: Tensor, vocab_size: int, discrete: Optional[DiscreteRows] = None) -> Tensor:
    """Compute the logits of every position.

    Args:
        hidden: [T, 1, H], or [T / tensor-parallel size, 1, H] under sequence parallelism.
        vocab_size: of the Llama, without padding.
        discrete: rows of marks and codes, if there are any.

    Returns:
        [1, T, V]; minus infinity in the rows that pad the vocabulary.
    """
    if discrete is not None:
        weights, extents = _head(gpt, vocab_size, discrete)
        every = torch.arange(len(hidden) * _sequence_ranks(gpt), device=hidden.device)
        rows = _rows(gpt, hidden, every)
        parts = [_hide_padding(rows @ weight.T, extent) for weight, extent in zip(weights, extents)]
        return torch.cat(parts, -1)[None]
    logits, _ = gpt.output_layer(hidden, weight=_tied_weight(gpt))
    extent = Extent(0, vocab_size, logits.size(-1))
    return _hide_padding(logits, extent).transpose(0, 1).contiguous()


def logits_of(
    gpt: GPTModel, hidden: Tensor, positions: Tensor | slice, vocab_size: int, discrete: Optional[DiscreteRows] = None
) -> Tensor:
    """Compute the logits of some positions. Collective over the tensor-parallel ranks under sequence parallelism.

    Args:
        hidden: [T, 1, H], or [T / tensor-parallel size, 1, H] under sequence parallelism.
        positions: [r] int64; or a slice of the rows of `hidden` that `output_positions.output_positions` has selected.
        vocab_size: of the Llama, without padding.
        discrete: rows of marks and codes, if there are any.

    Returns:
        [r, V], at least fp32; minus infinity in the rows that pad the vocabulary.
    """
    return _logits(_rows(gpt, hidden, positions), *_head(gpt, vocab_size, discrete))


def whole_logits(local: Tensor, vocab_size: int, discrete: Optional[DiscreteRows] = None) -> Tensor:
    """Gather logits over the tensor-parallel ranks, in the order of the ids. Collective over these ranks.

    Args:
        local: [..., V].
        vocab_size: of the Llama, without padding.
        discrete: rows of marks and codes, if there are any.

    Returns:
        [..., vocab_size + marks and codes].
    """
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    gathered = gather_from_tensor_model_parallel_region(local).unflatten(-1, (ranks, local.size(-1)))
    added = [] if discrete is None else [(discrete.added, len(discrete.head_weight()))]
    sizes = [(vocab_size, local.size(-1) - sum(rows for _, rows in added)), *added]
    parts = gathered.split([rows for _, rows in sizes], dim=-1)
    return torch.cat([part.flatten(-2)[..., :size] for part, (size, _) in zip(parts, sizes)], -1)


def label_losses(
    gpt: GPTModel,
    hidden: Tensor,
    labels: Tensor,
    label_index: Tensor,
    vocab_size: int,
    discrete: Optional[DiscreteRows] = None,
    *,
    selected: bool = False,
) -> Tensor:
    """Compute the cross-entropy at the positions that have a label; 0 elsewhere. Collective over the tensor-parallel
    ranks.

    Args:
        hidden: [T, 1, H], or [T / tensor-parallel size, 1, H] under sequence parallelism.
        labels: [1, T] int64.
        label_index: [L] int64, at least one: the positions with a label, each once.
        vocab_size: of the Llama, without padding.
        discrete: rows of marks and codes, if there are any.
        selected: `hidden` holds the positions of `output_positions.output_positions` only, R instead of T.

    Returns:
        [1, T] fp32 (fp64 if the model is).
    """
    rows = _rows(gpt, hidden, slice(len(label_index)) if selected else label_index)
    weights, extents = _head(gpt, vocab_size, discrete)
    losses = _HeadLoss.apply(rows, labels[0].index_select(0, label_index), extents, *weights)
    return losses.new_zeros(labels.size(1)).index_copy(0, label_index, losses)[None]


def _tied_weight(gpt: GPTModel) -> Optional[Tensor]:
    return gpt.shared_embedding_or_output_weight() if gpt.share_embeddings_and_output_weights else None


def _head(
    gpt: GPTModel, vocab_size: int, discrete: Optional[DiscreteRows]
) -> tuple[tuple[Tensor, ...], tuple[Extent, ...]]:
    """Return the head's weights, [rows, H] each, and which ids they cover."""
    for wait in gpt.output_layer._forward_pre_hooks.values():
        # With overlapped gathering of weights, megatron-core waits for a module's weights when the module is called.
        wait(gpt.output_layer, ())
    tied = _tied_weight(gpt)
    llama = gpt.output_layer.weight if tied is None else tied
    extent = Extent(0, vocab_size, len(llama))
    if discrete is None:
        return (llama,), (extent,)
    codes = discrete.head_weight()
    return (llama, codes), (extent, Extent(vocab_size, discrete.added, len(codes)))


def _sequence_ranks(gpt: GPTModel) -> int:
    return parallel_state.get_tensor_model_parallel_world_size() if gpt.config.sequence_parallel else 1


def _rows(gpt: GPTModel, hidden: Tensor, positions: Tensor | slice) -> Tensor:
    """Select hidden states [r, H], whole on every tensor-parallel rank, from [T or T / tensor-parallel size, 1, H]."""
    if gpt.config.sequence_parallel:
        return _pick(gather_from_sequence_parallel_region(hidden)[:, 0], positions)
    return copy_to_tensor_model_parallel_region(_pick(hidden[:, 0], positions))


def _pick(states: Tensor, positions: Tensor | slice) -> Tensor:
    return states[positions] if isinstance(positions, slice) else states.index_select(0, positions)


def _hide_padding(logits: Tensor, extent: Extent) -> Tensor:
    """Exclude the rows that pad the vocabulary from the softmax of logits [..., rows]."""
    real = extent.size - parallel_state.get_tensor_model_parallel_rank() * extent.rows
    if real >= extent.rows:
        return logits
    return logits.masked_fill(torch.arange(extent.rows, device=logits.device) >= real, float("-inf"))


class _HeadLoss(torch.autograd.Function):
    """rows [L, H], labels [L], extents, weights [rows, H] each -> losses [L]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, labels: Tensor, extents: tuple[Extent, ...], *weights: Tensor) -> Tensor:
        of_rows, trains = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        ctx.extents, ctx.trains = extents, trains
        frozen = [number for number, trained in enumerate(trains) if not trained] if of_rows else []
        losses, sums, gradients = [], [], []
        for part in _chunks(len(rows), sum(map(len, weights))):
            loss, log_sum, softmax = _cross_entropy(_logits(rows[part], weights, extents), labels[part], extents)
            losses.append(loss)
            if any(trains):
                sums.append(log_sum)
            if frozen:
                of_logits = _less_label(softmax, labels[part], extents).split([extent.rows for extent in extents], -1)
                gradients.append(_sum([of_logits[n].to(weights[n].dtype) @ weights[n] for n in frozen]))
        saved = [rows, labels, torch.cat(sums), *weights] if any(trains) else []
        ctx.save_for_backward(torch.cat(gradients) if frozen else None, *saved)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Optional[Tensor], ...]:
        (scale,) = upstream
        gradients, *saved = ctx.saved_tensors
        of_rows = None if gradients is None else (gradients * scale[:, None]).to(gradients.dtype)
        if not saved:
            return of_rows, None, None, *[None] * len(ctx.trains)
        rows, labels, sums, *weights = saved
        of_rows = torch.zeros_like(rows) if of_rows is None else of_rows
        of_weights = [
            _trained_part(rows, weight, labels, extent, sums, scale, of_rows) if trained else None
            for weight, extent, trained in zip(weights, ctx.extents, ctx.trains)
        ]
        return of_rows, None, None, *of_weights


def _trained_part(
    rows: Tensor, weight: Tensor, labels: Tensor, extent: Extent, sums: Tensor, scale: Tensor, of_rows: Tensor
) -> Tensor:
    """Recompute the logits of one weight [rows, H]; add its part to the gradient of the hidden states [L, H] in place,
    and return the weight's own gradient."""
    # Chunks are accumulated in fp32: in bf16 every addition would be rounded.
    of_weight = torch.zeros_like(weight, dtype=sums.dtype)
    for part in _chunks(len(rows), len(weight)):
        softmax = _logits(rows[part], (weight,), (extent,)).sub_(sums[part, None]).exp_()
        of_logits = _less_label(softmax, labels[part], (extent,)).mul_(scale[part, None]).to(weight.dtype)
        of_rows[part] += of_logits @ weight
        of_weight += of_logits.T @ rows[part]
    return of_weight.to(weight.dtype)


def _chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    total, *others = tensors
    for tensor in others:
        total += tensor
    return total


def _logits(rows: Tensor, weights: Sequence[Tensor], extents: Sequence[Extent]) -> Tensor:
    """Compute logits [l, V], at least in fp32."""
    parts = []
    for weight, extent in zip(weights, extents):
        logits = rows @ weight.T
        parts.append(_hide_padding(logits if logits.dtype == torch.float64 else logits.float(), extent))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _cross_entropy(logits: Tensor, labels: Tensor, extents: Sequence[Extent]) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses [l] and log-sum-exps [l] over the whole vocabulary, and the softmax [l, V], which reuses the
    logits' memory. Collective."""
    top = logits.amax(-1)
    _all_reduce(top, dist.ReduceOp.MAX)
    mine, index = _own_labels(labels, extents)
    target = logits.gather(1, index[:, None])[:, 0].masked_fill(~mine, 0.0)
    exponentials = logits.sub_(top[:, None]).exp_()
    both = torch.stack([target, exponentials.sum(-1)])
    _all_reduce(both, dist.ReduceOp.SUM)
    log_sum = both[1].log() + top
    return log_sum - both[0], log_sum, exponentials.div_(both[1, :, None])


def _less_label(softmax: Tensor, labels: Tensor, extents: Sequence[Extent]) -> Tensor:
    """Turn the softmax into the losses' gradient [l, V], in place."""
    mine, index = _own_labels(labels, extents)
    return softmax.scatter_add_(1, index[:, None], -mine[:, None].to(softmax.dtype))


def _own_labels(labels: Tensor, extents: Sequence[Extent]) -> tuple[Tensor, Tensor]:
    """Return [l] whether each label is in this rank's shards of the vocabulary, and [l] its column there (else 0)."""
    rank, column = parallel_state.get_tensor_model_parallel_rank(), 0
    mine, index = torch.zeros_like(labels, dtype=torch.bool), torch.zeros_like(labels)
    for extent in extents:
        local = labels - extent.first - rank * extent.rows
        # The ids after an extent could otherwise fall into the rows that pad it.
        within = (labels >= extent.first) & (labels < extent.first + extent.size)
        inside = within & (local >= 0) & (local < extent.rows)
        mine, index = mine | inside, torch.where(inside, local + column, index)
        column += extent.rows
    return mine, index


def _all_reduce(tensor: Tensor, operation: Any) -> None:
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        dist.all_reduce(tensor, op=operation, group=parallel_state.get_tensor_model_parallel_group())
