"""Losses and their sums and means.

Conservative DPO, step by step: a micro-batch's log-probabilities of the next token [1, T], under the policy and under
the reference -> `sequence_sums`, one value per answer -> `sum_over_context` -> `dpo_loss`, one value per pair ->
`batch_mean` over the pairs of the global batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor

# Names of the values of `dpo_metrics`, in order.
DPO_METRICS = (
    "pairs",
    "chosen_reward",
    "rejected_reward",
    "margin",
    "accuracy",
    "chosen_tokens",
    "rejected_tokens",
    "chosen_drift",
    "rejected_drift",
)


def batch_mean(losses: Tensor, loss_mask: Tensor, batch_targets: int) -> Tensor:
    """A micro-batch's contribution to the batch's mean loss (AnyMAL eq. 1: likelihood of the text given the media).

    Dividing by the target tokens of the whole global batch makes the sum over micro-batches and replicas the mean over
    target tokens, however the samples were packed.

    Other means use another mask and count: over samples, `sample_weights` and the number of samples; over preference
    pairs, one loss and a mask of 1 per pair and the number of pairs.

    Args:
        losses: [1, T].
        loss_mask: [1, T].
        batch_targets: target tokens of the global batch, counted over all processes.

    Returns:
        A scalar, fp32.
    """
    return (losses.float() * loss_mask).sum() / max(1, batch_targets)


def sum_of_means(losses: Tensor, loss_mask: Tensor, groups: Tensor, counts: Tensor) -> Tensor:
    """A micro-batch's contribution to the sum of the means of several groups of samples (`model.multiplex`).

    The gradient of each token's loss has the bits that `batch_mean` over its group alone would give it.

    Args:
        losses: [1, T].
        loss_mask: [1, T], as for `batch_mean`.
        groups: [1, T] int64 in [0, number of groups), or -1 for padding.
        counts: [number of groups] target tokens or samples of each group in the global batch.

    Returns:
        A scalar, fp32.
    """
    denominators = counts.clamp(min=1)[groups.clamp(min=0)]
    return (losses.float() * loss_mask / denominators).sum()


def sample_weights(loss_mask: Tensor, samples: Tensor, targets: Tensor) -> Tensor:
    """Mask for `batch_mean` that weights every sample equally, however long its answer.

    The loss is then the mean over samples of each sample's mean over its target tokens: divide by the number of samples
    that have targets instead of the number of targets.

    Args:
        loss_mask: [1, T].
        samples: [1, T] int64, each token's sample; -1 for padding.
        targets: [N] int64, target tokens of each sample, on whichever ranks they are.

    Returns:
        [1, T] fp32.
    """
    return loss_mask / targets.clamp(min=1)[samples.clamp(min=0)]


def sums_by_group(losses: Tensor, loss_mask: Tensor, groups: Tensor, count: int) -> Tensor:
    """Loss and target tokens per group of tokens.

    Args:
        losses: [1, T].
        loss_mask: [1, T].
        groups: [1, T] int64 in [0, count), or -1 for tokens without a group.

    Returns:
        [2, count] float64: sums of losses, numbers of targets.
    """
    return torch.stack([sequence_sums(values.detach(), loss_mask, groups, count) for values in (losses, loss_mask)])


def sequence_sums(values: Tensor, mask: Tensor, documents: Tensor, count: int) -> Tensor:
    """Sum values per document over this rank's tokens; log-probabilities become those of the answers.

    Args:
        values: [1, T].
        mask: [1, T]: 1 where the value counts. Other values may be anything, including NaN.
        documents: [1, T] int64 in [0, count), or -1 for tokens without one: padding, pairs that are left out.
        count: number of documents; may be 0, and the (empty) sums still take part in the backward pass.

    Returns:
        [count] float64, so that rounding hides the order of summation; differentiable.
    """
    # The first sum collects tokens without a document.
    index = torch.where(mask > 0, documents, -1) + 1
    sums = torch.zeros(count + 1, dtype=torch.float64, device=values.device)
    return sums.index_add(0, index.flatten(), values.flatten().double())[1:]


def sum_over_context(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-reduce each rank's sums over a context-parallel group.

    Every rank of the group then computes the same loss L(s) from s = s_1 + ... + s_n and back-propagates it. The
    backward pass is the identity: rank r gets dL/ds for s_r and contributes dL/ds ds_r/dw to a weight, and
    megatron-core's sum over the data x context group is dL/dw, with each pair counted once. (The adjoint of the sum,
    another all-reduce, would be right if the n losses were added up: n dL/dw.)

    Metrics of such a loss must likewise be reported on only one rank of the group.

    Args:
        parts: any shape, the same on all ranks.
        group: this rank's context-parallel group.

    Returns:
        The sums, the shape of `parts`.
    """
    # megatron-core reduces in place and needs a contiguous tensor.
    return reduce_from_tensor_model_parallel_region(parts.clone(memory_format=torch.contiguous_format), group)


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    """Conservative DPO (Mitchell 2023); with label_smoothing = 0, DPO (Rafailov et al. 2023; AnyMAL eq. 5):

        -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h),  h = (pi_c - ref_c) - (pi_r - ref_r)

    It assumes that a preference label is flipped with probability eps, and has its minimum at
    beta h = log((1 - eps) / eps).

    Args:
        policy_chosen: [P] log-probabilities (nats) of the pairs' chosen answers, summed over their tokens.
        policy_rejected: [P], those of the rejected answers.
        reference_chosen: [P], those of the chosen answers under the reference.
        reference_rejected: [P], those of the rejected answers under the reference.
        beta: strength of the pull towards the reference.
        label_smoothing: eps, in [0, 0.5) (AnyMAL: 0.05).

    Returns:
        [P].
    """
    scaled = beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected))
    return -(1 - label_smoothing) * F.logsigmoid(scaled) - label_smoothing * F.logsigmoid(-scaled)


def dpo_metrics(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    tokens: Tensor,
) -> Tensor:
    """Metrics of preference pairs, as sums: add them up over micro-batches and replicas, then divide rewards, margin
    and accuracy by `pairs`, drifts by tokens.

    Args:
        policy_chosen: [P], see `dpo_loss`.
        policy_rejected: [P].
        reference_chosen: [P].
        reference_rejected: [P].
        beta: strength of the pull towards the reference.
        tokens: [2, P] answer tokens, chosen and rejected.

    Returns:
        [len(DPO_METRICS)] float64. The reward of an answer is beta (log pi - log ref); margin is chosen less rejected;
        accuracy counts the pairs whose chosen answer has the higher reward. A drift is log ref - log pi summed over an
        answer's tokens: for answers sampled from the reference, drift over tokens estimates KL(reference || policy) in
        nats per token (k1 of Schulman 2020, "Approximating KL Divergence"). Preference data usually come from other
        models, so read it as a measure of how far the policy has moved.
    """
    chosen = beta * (policy_chosen - reference_chosen).detach().double()
    rejected = beta * (policy_rejected - reference_rejected).detach().double()
    return torch.stack(
        [
            torch.ones_like(chosen).sum(),
            chosen.sum(),
            rejected.sum(),
            (chosen - rejected).sum(),
            (chosen > rejected).double().sum(),
            *tokens.double().sum(1),
            (reference_chosen - policy_chosen).detach().double().sum(),
            (reference_rejected - policy_rejected).detach().double().sum(),
        ]
    )
