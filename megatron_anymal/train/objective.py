"""Training objectives: the loss over tokens (pre-training, SFT) or over preference pairs (DPO), and its metrics.

Both losses are means over the whole global batch, so packing and layout change them only by rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Optional, Protocol

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_anymal.config import DpoConfig, ModelConfig
from megatron_anymal.data.discrete_vocabulary import DiscreteVocabulary
from megatron_anymal.data.micro_batch import MicroBatch
from megatron_anymal.data.step_plan import StepPlan
from megatron_anymal.train.losses import (
    DPO_METRICS,
    batch_mean,
    dpo_loss,
    dpo_metrics,
    sample_weights,
    sequence_sums,
    sum_of_means,
    sum_over_context,
    sums_by_group,
)


@dataclass(frozen=True)
class GlobalBatch:
    """Facts about a step's samples before it runs, by position in the global batch; on the device."""

    # [n] int64: target tokens; 0 for samples that are left out.
    targets: Tensor
    # The same on the host, to count without waiting for the device.
    counts: tuple[int, ...]
    # [n] int64: index in `names` of the name that the sample's loss is reported under.
    groups: Tensor
    # Names to report losses under.
    names: tuple[str, ...]
    # [n, 2] float64, DPO only: reference log-probability of the chosen and of the rejected answer.
    reference: Optional[Tensor] = None
    # Whether the step computed them, instead of reading them from the run's folder.
    reference_computed: bool = False
    # model.multiplex: the loss is the sum of the means of the groups, not the mean over all samples.
    by_group: bool = False

    @staticmethod
    def of(
        plan: StepPlan,
        bad: Mapping[int, str],
        names: Sequence[str],
        device: torch.device,
        alignments: Sequence[str] = (),
    ) -> GlobalBatch:
        """Build from a plan; a sample is reported under its first media item's modality, or under "text".

        Args:
            alignments: names in `model.multiplex`, under which samples are reported instead.
        """
        counts = [0 if position in bad else count for position, count in enumerate(plan.targets.tolist())]
        # The last entry is for samples without media, whose first modality is -1.
        known = alignments or [*plan.media.names, "text"]
        number = plan.media.first_modality() if plan.alignment is None else plan.alignment
        return GlobalBatch(
            targets=torch.tensor(counts, device=device),
            counts=tuple(counts),
            groups=torch.from_numpy(np.array([names.index(name) for name in known])[number]).to(device),
            names=tuple(names),
            by_group=plan.alignment is not None,
        )


class Objective(Protocol):
    """A loss and its metrics."""

    # Kinds of samples that it can train on (data.records.SAMPLE_KINDS).
    sample_kinds: tuple[str, ...]
    # Names of the values that follow a report's losses and counts.
    extras: tuple[str, ...]
    # With discrete media: "text" and the kinds of media that target tokens belong to. Sums of losses by kind and
    # numbers of targets by kind are then the extras.
    kinds: tuple[str, ...]

    def count(self, batch: GlobalBatch) -> int:
        """Denominator of the mean loss: target tokens, samples or pairs of the global batch."""
        ...

    def measures(self, extras: Sequence[float]) -> dict[str, float]:
        """Compute the metrics to log from the summed extras."""
        ...

    def loss(self, losses: Tensor, mask: Tensor, micro_batch: MicroBatch, batch: GlobalBatch) -> tuple[Tensor, Tensor]:
        """Compute a micro-batch's contribution to the mean loss, and its report.

        Args:
            losses: [1, T] cross-entropy of each label (this rank's tokens).
            mask: [1, T]: 1 where the label counts.

        Returns:
            A scalar, and [2 x names + extras] float64: sums of losses by name, the count behind each sum, the extras.
            Reports of ranks that hold different tokens are added up.
        """
        ...


def build_objective(job: str, model: ModelConfig, vocab_size: int = 0) -> Objective:
    """Build the objective of a job: pretrain, sft or dpo.

    Args:
        vocab_size: of the Llama, without padding; needed for losses by kind of discrete media.
    """
    if job == "dpo":
        return PreferenceObjective(model.dpo)
    return TokenObjective(model.loss_normalization, DiscreteVocabulary(vocab_size, model.discrete))


def _with_targets(batch: GlobalBatch) -> int:
    """Samples that have targets."""
    return sum(count > 0 for count in batch.counts)


class TokenObjective:
    """Likelihood of the target tokens (AnyMAL eq. 1), averaged over tokens or over samples."""

    sample_kinds: tuple[str, ...] = ("parts", "messages")

    def __init__(self, normalization: str, vocabulary: DiscreteVocabulary):
        self._by_sample = normalization == "sample"
        self.kinds = ("text", *vocabulary.names) if vocabulary.added else ()
        self.extras = tuple(f"{sums}/{kind}" for sums in ("loss", "targets") for kind in self.kinds)
        # First id of each kind of media.
        self._bounds = [vocabulary.begin(name) for name in vocabulary.names]

    def count(self, batch: GlobalBatch) -> int:
        """Target tokens, or samples that have any."""
        return _with_targets(batch) if self._by_sample else sum(batch.counts)

    def measures(self, extras: Sequence[float]) -> dict[str, float]:
        """No further metrics."""
        return {}

    def loss(self, losses: Tensor, mask: Tensor, micro_batch: MicroBatch, batch: GlobalBatch) -> tuple[Tensor, Tensor]:
        """Mean over target tokens or samples; otherwise as `Objective.loss`.

        Args:
            losses: [1, T] cross-entropy of each label.
            mask: [1, T]: 1 where the label counts.

        Returns:
            A scalar, and [2 x names + 2 x kinds] float64.
        """
        owners = micro_batch.sample_positions
        weights = sample_weights(mask, owners, batch.targets) if self._by_sample else mask
        groups = torch.where(owners >= 0, batch.groups[owners.clamp(min=0)], -1)
        report = sums_by_group(losses * weights, weights, groups, len(batch.names)).flatten()
        if self.kinds:
            bounds = torch.tensor(self._bounds, device=losses.device)
            kinds = torch.bucketize(micro_batch.labels, bounds, right=True).masked_fill(owners < 0, -1)
            of_kinds = sums_by_group(losses * mask, mask, kinds, len(self.kinds))
            report = torch.cat([report, of_kinds.flatten()])
        if batch.by_group:
            return sum_of_means(losses, weights, groups, self._counts_by_group(batch)), report
        return batch_mean(losses, weights, self.count(batch)), report

    def _counts_by_group(self, batch: GlobalBatch) -> Tensor:
        """`count` of the samples of each group, [names] int64."""
        counted = (batch.targets > 0).long() if self._by_sample else batch.targets
        return torch.zeros(len(batch.names), dtype=torch.int64, device=counted.device).index_add(
            0, batch.groups, counted
        )


class PreferenceObjective:
    """Conservative DPO (AnyMAL eq. 5), averaged over pairs."""

    sample_kinds: tuple[str, ...] = ("preference",)
    extras: tuple[str, ...] = DPO_METRICS
    kinds: tuple[str, ...] = ()

    def __init__(self, dpo: DpoConfig):
        self._dpo = dpo

    def count(self, batch: GlobalBatch) -> int:
        """Pairs that are not left out."""
        return _with_targets(batch)

    def measures(self, extras: Sequence[float]) -> dict[str, float]:
        """Means over pairs; the drift from the reference, log reference - log policy, over answer tokens."""
        sums = dict(zip(DPO_METRICS, extras))
        pairs = max(1.0, sums["pairs"])
        return {
            "rewards/chosen": sums["chosen_reward"] / pairs,
            "rewards/rejected": sums["rejected_reward"] / pairs,
            "rewards/margin": sums["margin"] / pairs,
            "rewards/accuracy": sums["accuracy"] / pairs,
            "answer_tokens/chosen": sums["chosen_tokens"] / pairs,
            "answer_tokens/rejected": sums["rejected_tokens"] / pairs,
            "kl/chosen": sums["chosen_drift"] / max(1.0, sums["chosen_tokens"]),
            "kl/rejected": sums["rejected_drift"] / max(1.0, sums["rejected_tokens"]),
        }

    def loss(self, losses: Tensor, mask: Tensor, micro_batch: MicroBatch, batch: GlobalBatch) -> tuple[Tensor, Tensor]:
        """Mean over pairs; otherwise as `Objective.loss`. Collective over the context-parallel ranks.

        Args:
            losses: [1, T] cross-entropy of each label.
            mask: [1, T]: 1 where the label counts.

        Returns:
            A scalar, and [2 x names + len(DPO_METRICS)] float64.
        """
        assert batch.reference is not None
        pairs, (policy, tokens) = self.answers(losses, mask, micro_batch, batch)
        reference = batch.reference[pairs]
        answers = policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1]
        of_pairs = dpo_loss(*answers, beta=self._dpo.beta, label_smoothing=self._dpo.label_smoothing).unsqueeze(0)
        ones = torch.ones_like(of_pairs)
        report = sums_by_group(of_pairs, ones, batch.groups[pairs].unsqueeze(0), len(batch.names))
        extras = dpo_metrics(*answers, beta=self._dpo.beta, tokens=tokens.T)
        report = torch.cat([report.flatten(), extras])
        if parallel_state.get_context_parallel_rank():
            # Every rank of the group has the same pairs: only the first reports them.
            report = torch.zeros_like(report)
        return batch_mean(of_pairs, ones, self.count(batch)), report

    @staticmethod
    def answers(
        losses: Tensor, mask: Tensor, micro_batch: MicroBatch, batch: GlobalBatch
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Sum the log-probabilities of a micro-batch's answers. Collective over the context-parallel ranks.

        Args:
            losses: [1, T] cross-entropy of each label.
            mask: [1, T]: 1 where the label counts.

        Returns:
            [P] the pairs' positions in the global batch; [P, 2] each, log-probability and number of tokens of the
            chosen and the rejected answer, float64.
        """
        assert micro_batch.branch is not None
        planned = [sample.position for sample in micro_batch.plan.samples if batch.counts[sample.position]]
        positions = torch.tensor(planned, dtype=torch.int64, device=losses.device)
        number = torch.full_like(batch.targets, -1)
        number[positions] = torch.arange(len(positions), device=losses.device)
        owners = micro_batch.sample_positions
        pairs = torch.where(owners >= 0, number[owners.clamp(min=0)], -1)
        documents = torch.where(pairs >= 0, 2 * pairs + micro_batch.branch, -1)
        sums = [
            sequence_sums(values, mask, documents, 2 * len(positions)) for values in (-losses, torch.ones_like(mask))
        ]
        summed = sum_over_context(torch.stack(sums), parallel_state.get_context_parallel_group())
        logs, tokens = summed.view(2, -1, 2)
        return positions, (logs, tokens)
