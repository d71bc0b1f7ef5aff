"""Training objectives, written from their definitions: one sample (or document of a preference pair) at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from megatron_anymal.config import DpoConfig, RunConfig
from parity.samples import Sample


def backward(model: nn.Module, config: RunConfig, batch: Sequence[Sample], reference: nn.Module | None) -> float:
    """Compute the gradients of a batch's loss, and return the loss.

    Args:
        reference: DPO only: the policy before the first step.
    """
    model.zero_grad(set_to_none=True)
    if config.job == "dpo":
        assert reference is not None
        terms = preferences(model, reference, batch, config.model.dpo)
    else:
        terms = likelihood(model, batch, config.model.loss_normalization)
    total = 0.0
    for term in terms:
        if term.requires_grad:
            term.backward()
        total += term.item()
    return total


def likelihood(model: nn.Module, batch: Sequence[Sample], mean: str) -> Iterator[Tensor]:
    """Yield each sample's term of the negative log-likelihood of the target tokens (AnyMAL eq. 1).

    Args:
        mean: "token": average over the batch's target tokens. "sample": average over the sample's own target tokens,
            then over the samples that have any.
    """
    targets = [float(sample.loss_mask.sum()) for sample in batch]
    for sample, own in zip(batch, targets):
        if mean == "token":
            yield -log_probability(model, sample) / sum(targets)
        elif own:
            yield -log_probability(model, sample) / own / sum(count > 0 for count in targets)


def preferences(policy: nn.Module, reference: nn.Module, batch: Sequence[Sample], dpo: DpoConfig) -> Iterator[Tensor]:
    """Yield each pair's term of conservative DPO (AnyMAL eq. 5; Mitchell 2023), averaged over pairs.

    It is the cross-entropy between "the chosen answer is better", true with probability 1 - label_smoothing, and the
    Bradley-Terry model with rewards beta log(policy / reference).
    """
    for chosen, rejected in zip(batch[::2], batch[1::2]):
        assert rejected.document == chosen.document + 1
        rewards = []
        for answer in (chosen, rejected):
            with torch.no_grad():
                baseline = log_probability(reference, answer)
            rewards.append(dpo.beta * (log_probability(policy, answer) - baseline))
        better = torch.sigmoid(rewards[0] - rewards[1])
        doubt = dpo.label_smoothing
        yield -((1 - doubt) * better.log() + doubt * (1 - better).log()) / (len(batch) / 2)


def log_probability(model: nn.Module, sample: Sample) -> Tensor:
    """Log-probability (nats) of a document's target tokens."""
    log_probabilities = torch.log_softmax(model(sample), dim=-1)
    of_labels = log_probabilities[torch.arange(len(sample.labels)), sample.labels]
    return (of_labels * sample.loss_mask.to(of_labels.dtype)).sum()
