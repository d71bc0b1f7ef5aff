"""What a step minimises and reports: the loss of tokens (pre-training, SFT), or of preference pairs (DPO).

Both are means over the whole global batch, so that packing and layout change them by rounding alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Optional, Protocol

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_anymal.config import DpoConfig, RunConfig
from megatron_anymal.data.planner import StepPlan
from megatron_anymal.data.records import MicroBatch
from megatron_anymal.train.losses import (
    DPO_METRICS,
    batch_mean,
    dpo_loss,
    dpo_metrics,
    sample_weights,
    sequence_sums,
    sum_over_context,
    sums_by_group,
)


@dataclass(frozen=True)
class GlobalBatch:
    """What is known of a step's samples before it runs, by the sample's place in the global batch; on the device."""

    # [n] int64: targets; 0 for samples that are left out.
    targets: Tensor
    # [n] int64: the number of the name that its loss is reported under.
    groups: Tensor
    # Those names.
    names: tuple[str, ...]
    # [n, 2] float64, DPO only: the reference's log-probability of the chosen and of the rejected answer.
    reference: Optional[Tensor] = None

    @staticmethod
    def of(
        plan: StepPlan,
        bad: Mapping[int, str],
        names: Sequence[str],
        device: torch.device,
        reference: Optional[Tensor] = None,
    ) -> GlobalBatch:
        """Read a plan; a sample is reported under its first media item's modality, or under "text"."""
        targets = np.where([place in bad for place in range(len(plan.targets))], 0, plan.targets)
        groups = [names.index(media[0].modality) if media else names.index("text") for media in plan.media]
        return GlobalBatch(
            torch.from_numpy(targets).to(device), torch.tensor(groups, device=device), tuple(names), reference
        )


class Objective(Protocol):
    """A loss and what is reported of it."""

    # Kinds of samples that it learns from (data.types.SAMPLE_KINDS).
    sample_kinds: tuple[str, ...]
    # What a report holds behind the losses and counts by name.
    extras: tuple[str, ...]

    def count(self, batch: GlobalBatch) -> int:
        """What the loss is a mean over: target tokens, samples or pairs of the global batch."""
        ...

    def measures(self, extras: Sequence[float]) -> dict[str, float]:
        """What is logged of the summed extras."""
        ...

    def loss(self, losses: Tensor, mask: Tensor, micro_batch: MicroBatch, batch: GlobalBatch) -> tuple[Tensor, Tensor]:
        """A micro-batch's part of the mean, and its report.

        Args:
            losses: [1, T] cross-entropy of each label (this rank's tokens).
            mask: [1, T]: 1 where the label counts.

        Returns:
            A scalar, and [2 x names + extras] float64: sums of losses by name, how much each sums, the extras. Reports
            of ranks that hold different tokens are added up.
        """
        ...


def build_objective(config: RunConfig) -> Objective:
    """The objective of the configuration's job."""
    if config.job == "dpo":
        return PreferenceObjective(config.model.dpo)
    return TokenObjective(config.model.loss_normalization)


class TokenObjective:
    """Likelihood of the target tokens (AnyMAL eq. 1), averaged over tokens or over samples."""

    sample_kinds: tuple[str, ...] = ("parts", "messages")
    extras: tuple[str, ...] = ()

    def __init__(self, normalization: str):
        self._by_sample = normalization == "sample"

    def count(self, batch: GlobalBatch) -> int:
        """Target tokens, or samples that have some."""
        return int((batch.targets > 0).sum() if self._by_sample else batch.targets.sum())

    def measures(self, extras: Sequence[float]) -> dict[str, float]:
        """See Objective."""
        return {}

    def loss(self, losses: Tensor, mask: Tensor, micro_batch: MicroBatch, batch: GlobalBatch) -> tuple[Tensor, Tensor]:
        """See Objective."""
        owners = micro_batch.sample_positions
        weights = sample_weights(mask, owners, batch.targets) if self._by_sample else mask
        groups = torch.where(owners >= 0, batch.groups[owners.clamp(min=0)], -1)
        report = sums_by_group(losses * weights, weights, groups, len(batch.names))
        return batch_mean(losses, weights, self.count(batch)), report.flatten()


class PreferenceObjective:
    """Conservative DPO (AnyMAL eq. 5), averaged over pairs."""

    sample_kinds: tuple[str, ...] = ("preference",)
    extras: tuple[str, ...] = DPO_METRICS

    def __init__(self, dpo: DpoConfig):
        self._dpo = dpo

    def count(self, batch: GlobalBatch) -> int:
        """Pairs that are not left out."""
        return int((batch.targets > 0).sum())

    def measures(self, extras: Sequence[float]) -> dict[str, float]:
        """Means over pairs; the drift from the reference, log reference - log policy, over answer tokens."""
        found = dict(zip(DPO_METRICS, extras))
        pairs = max(1.0, found["pairs"])
        return {
            "rewards/chosen": found["chosen_reward"] / pairs,
            "rewards/rejected": found["rejected_reward"] / pairs,
            "rewards/margin": found["margin"] / pairs,
            "rewards/accuracy": found["accuracy"] / pairs,
            "answer_tokens/chosen": found["chosen_tokens"] / pairs,
            "answer_tokens/rejected": found["rejected_tokens"] / pairs,
            "kl/chosen": found["chosen_drift"] / max(1.0, found["chosen_tokens"]),
            "kl/rejected": found["rejected_drift"] / max(1.0, found["rejected_tokens"]),
        }

    def loss(self, losses: Tensor, mask: Tensor, micro_batch: MicroBatch, batch: GlobalBatch) -> tuple[Tensor, Tensor]:
        """See Objective."""
        assert batch.reference is not None
        places, (policy, tokens) = self.answers(losses, mask, micro_batch, batch)
        reference = batch.reference[places]
        answers = policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1]
        of_pairs = dpo_loss(*answers, beta=self._dpo.beta, label_smoothing=self._dpo.label_smoothing).unsqueeze(0)
        ones = torch.ones_like(of_pairs)
        report = sums_by_group(of_pairs, ones, batch.groups[places].unsqueeze(0), len(batch.names))
        extras = dpo_metrics(*answers, beta=self._dpo.beta, tokens=tokens.T)
        report = torch.cat([report.flatten(), extras])
        if parallel_state.get_context_parallel_rank():
            # Every rank of the group has the same pairs.
            report = torch.zeros_like(report)
        return batch_mean(of_pairs, ones, self.count(batch)), report

    @staticmethod
    def answers(
        losses: Tensor, mask: Tensor, micro_batch: MicroBatch, batch: GlobalBatch
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Log-probabilities of a micro-batch's answers. Collective over the context-parallel ranks.

        Returns:
            [P] the pairs' places in the global batch; [P, 2] log-probability and number of tokens of the chosen and the
            rejected answer, float64.
        """
        assert micro_batch.branch is not None
        planned = [sample.position for sample in micro_batch.plan.samples]
        places = torch.tensor(planned, dtype=torch.int64, device=losses.device)
        places = places[batch.targets[places] > 0]
        number = torch.full_like(batch.targets, -1)
        number[places] = torch.arange(len(places), device=losses.device)
        owners = micro_batch.sample_positions
        pairs = torch.where(owners >= 0, number[owners.clamp(min=0)], -1)
        documents = torch.where(pairs >= 0, 2 * pairs + micro_batch.branch, -1)
        sums = [sequence_sums(values, mask, documents, 2 * len(places)) for values in (-losses, torch.ones_like(mask))]
        group = parallel_state.get_context_parallel_group()
        logs, tokens = (sum_over_context(part, group).view(-1, 2) for part in sums)
        return places, (logs, tokens)
