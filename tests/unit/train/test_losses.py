"""Losses by hand, and conservative DPO against trl's."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from ranks import run_ranks
from torch import Tensor
from trl import DPOTrainer

from megatron_anymal import cpu_shim
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

LOSSES = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]])
MASK = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0]])


def test_batch_mean_divides_by_the_targets_of_the_whole_batch() -> None:
    assert batch_mean(LOSSES, MASK, 10).item() == pytest.approx(1.3)
    assert batch_mean(LOSSES, torch.zeros(1, 5), 0).item() == 0.0


def test_parts_of_a_batch_add_up_to_its_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    losses, mask = torch.rand(1, 60, generator=generator), torch.rand(1, 60, generator=generator).round()
    parts = [batch_mean(x, m, int(mask.sum())) for x, m in zip(losses.split([7, 1, 52], 1), mask.split([7, 1, 52], 1))]
    torch.testing.assert_close(sum(parts), losses[mask > 0].mean())


def test_batch_mean_is_fp32_and_its_gradient_is_the_mask_over_the_targets() -> None:
    losses = LOSSES.bfloat16().requires_grad_()
    loss = batch_mean(losses, MASK, 4)
    assert loss.dtype == torch.float32
    loss.backward()
    assert losses.grad is not None and losses.grad.tolist() == [[0.25, 0.0, 0.25, 0.25, 0.0]]


def test_a_sum_of_means_gives_each_group_the_gradient_of_its_own_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(-1, 3, (1, 60), generator=generator)
    # Also weights of samples, which are no powers of two. The rest of the batch is in other micro-batches.
    mask = torch.rand(1, 60, generator=generator) * (groups >= 0)
    counts = torch.tensor([37, 0, 143])
    losses = torch.rand(1, 60, generator=generator).requires_grad_()
    loss = sum_of_means(losses, mask, groups, counts)
    loss.backward()
    total, gradient = 0.0, torch.zeros(1, 60)
    for group, count in enumerate(counts.tolist()):
        own = losses.detach().clone().requires_grad_()
        mean = batch_mean(own, mask * (groups == group), count)
        mean.backward()
        assert own.grad is not None
        total, gradient = total + mean.item(), gradient + own.grad
    assert losses.grad is not None and torch.equal(losses.grad, gradient)
    assert loss.item() == pytest.approx(total)


def test_sums_by_group() -> None:
    # Group 2 has only a masked token; -1 belongs to no group.
    sums = sums_by_group(LOSSES, MASK, torch.tensor([[0, 0, 1, -1, 2]]), 4)
    assert sums.dtype == torch.float64
    assert sums.tolist() == [[1.0, 4.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]
    assert sums_by_group(LOSSES, MASK, torch.tensor([[3, 3, 3, 3, 3]]), 4)[:, 3].tolist() == [13.0, 3.0]


def test_sums_by_group_add_up_beyond_fp32() -> None:
    losses = torch.full((1, 1000), 16777216.0)
    losses[0, 1:] = 1.0
    sums = sums_by_group(losses, torch.ones(1, 1000), torch.zeros(1, 1000, dtype=torch.int64), 1)
    assert sums[0, 0].item() == 16777216 + 999


def test_sample_weights_make_the_mean_over_samples_of_their_means() -> None:
    # The fourth token's sample has two more targets on another rank; sample 2 has none.
    samples, targets = torch.tensor([[0, 2, 0, 1, -1]]), torch.tensor([2, 3, 0])
    weights = sample_weights(MASK, samples, targets)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.0, 0.5, 1 / 3, 0.0]]))
    assert batch_mean(LOSSES, weights, 2).item() == pytest.approx(((1 + 4) / 2 + 8 / 3) / 2)


# ---------------------------------------------------------------------------------------- sums of documents


def test_sequence_sums() -> None:
    values = torch.tensor([[-1.0, float("nan"), -4.0, -8.0, -16.0, float("-inf")]], requires_grad=True)
    mask, documents = torch.tensor([[1.0, 0, 1, 1, 1, 1]]), torch.tensor([[2, 2, 2, 0, 0, -1]])
    sums = sequence_sums(values, mask, documents, 4)
    assert sums.dtype == torch.float64 and sums.tolist() == [-24.0, 0.0, -5.0, 0.0]
    (sums * torch.tensor([1.0, 10, 100, 1000])).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [[100.0, 0.0, 100.0, 1.0, 1.0, 0.0]]


def test_sequence_sums_refuses_a_document_beyond_the_count() -> None:
    with pytest.raises((IndexError, RuntimeError)):
        sequence_sums(LOSSES, torch.ones(1, 5), torch.tensor([[0, 0, 0, 2, 1]]), 2)


def test_no_pairs_give_a_loss_of_zero_that_still_goes_backwards() -> None:
    values = torch.randn(1, 5, requires_grad=True)
    sums = sequence_sums(values, MASK, torch.full((1, 5), -1), 0)
    losses = dpo_loss(sums, sums, sums.detach(), sums.detach(), 0.1, 0.05)
    assert losses.shape == (0,)
    loss = batch_mean(losses, torch.ones_like(losses), 32)
    loss.backward()
    assert loss.item() == 0 and values.grad is not None and not values.grad.any()


def test_sequence_sums_in_any_order() -> None:
    values = torch.full((1, 1000), -1.0)
    values[0, 0] = -16777216.0
    sums = sequence_sums(values, torch.ones(1, 1000), torch.zeros(1, 1000, dtype=torch.int64), 1)
    assert sums.item() == -16777216 - 999


# ----------------------------------------------------------------------------------------- context parallel

# Two pairs of answers, in documents of five tokens, the last four of which count.
DOCUMENTS = torch.arange(4).repeat_interleave(5)
ANSWERS = (torch.arange(20) % 5 > 0).float()
# Tokens held by each rank: rank 0 has none of the last document.
HELD = [torch.tensor([0, 1, 6, 7, 9, 10, 13]), torch.tensor([2, 3, 4, 5, 8, 11, 12, 14, 15, 16, 17, 18, 19])]


def context_model(held: Tensor, gather: Any) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A model in which every token sees all others, as with attention over a context-parallel group.

    Args:
        gather: tokens of a rank -> tokens of all ranks.

    Returns:
        Its weights; log-probabilities of the held tokens under policy and reference [1, T].
    """
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    inputs, labels = draw(20, 6), torch.randint(0, 9, (20,), generator=generator)
    weights = {"below": draw(6, 8), "above": draw(8, 9)}
    reference = draw(20) * 0.1
    for weight in weights.values():
        weight.requires_grad_()
    hidden = (inputs[held] @ weights["below"]).tanh()
    mixed = hidden + gather(hidden).square().sum(0)
    logits = (mixed @ weights["above"]).log_softmax(-1)
    policy = logits.gather(1, labels[held, None]).T
    return weights, policy, policy.detach() + reference[held]


def step_over_context(held: Tensor, gather: Any, reduce: Any) -> tuple[float, dict[str, Any]]:
    """Loss of the batch and gradients of this rank."""
    weights, policy, reference = context_model(held, gather)
    sums = [sequence_sums(x, ANSWERS[None, held], DOCUMENTS[None, held], 4) for x in (policy, reference)]
    summed = reduce(torch.stack(sums))
    chosen, rejected = summed[:, :2], summed[:, 2:]
    losses = dpo_loss(chosen[0], rejected[0], chosen[1], rejected[1], 0.7, 0.05)
    loss = losses.sum() / 2
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in weights.items()}


def rank_over_context() -> tuple[float, dict[str, list[list[float]]]]:
    cpu_shim.install()
    dist.init_process_group("gloo")
    group: Any = dist.group.WORLD
    held = HELD[dist.get_rank()]

    def gather(hidden: Tensor) -> Tensor:
        # Ranks hold different numbers of tokens here: zero padding does not change a sum of squares.
        padded = torch.cat([hidden, hidden.new_zeros(13 - len(hidden), 8)])
        return gather_from_sequence_parallel_region(padded, group=group)

    empty = sum_over_context(torch.zeros(2, 0), group)
    assert empty.shape == (2, 0)
    part = torch.full((3,), 1.0 + dist.get_rank())
    # The transposed tensor is not contiguous.
    spread = torch.arange(6.0).view(2, 3).T
    assert sum_over_context(part, group).tolist() == [3.0] * 3 and part.tolist() == [1.0 + dist.get_rank()] * 3
    assert torch.equal(sum_over_context(spread, group), 2 * spread)
    loss, gradients = step_over_context(held, gather, lambda x: sum_over_context(x, group))
    for gradient in gradients.values():
        # As the engine does.
        dist.all_reduce(gradient)
    return loss, {name: gradient.tolist() for name, gradient in gradients.items()}


def test_context_parallel_ranks_give_the_loss_and_gradient_of_one_process() -> None:
    assert torch.equal(torch.cat(HELD).sort().values, torch.arange(20))
    loss, expected = step_over_context(torch.arange(20), lambda hidden: hidden, lambda x: x)
    for found_loss, gradients in run_ranks(2, rank_over_context):
        assert found_loss == pytest.approx(loss, rel=1e-12)
        for name, gradient in expected.items():
            assert gradient.abs().max() > 1e-3
            torch.testing.assert_close(
                torch.tensor(gradients[name], dtype=torch.float64), gradient, rtol=1e-10, atol=1e-13
            )


# ----------------------------------------------------------------------------------------------------- DPO

LENGTHS = [(3, 5), (1, 2), (7, 4), (2, 2), (6, 1)]


def pairs(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Token log-probabilities of the chosen and rejected answers under policy and reference."""
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> Tensor:
        return -3 * torch.rand(n, dtype=torch.float64, generator=generator)

    policy = [draw(n).to(dtype).requires_grad_() for pair in LENGTHS for n in pair]
    return policy, [draw(n).to(dtype) for pair in LENGTHS for n in pair]


def trl_pair(policy: list[Tensor], reference: list[Tensor], beta: float, smoothing: float) -> tuple[Tensor, Any]:
    """trl's loss of one pair and its logged metrics.

    Its "sigmoid" loss has no label smoothing; its "aot" loss is conservative DPO of sorted margins, and a single
    margin is always sorted.
    """
    longest = max(len(answer) for answer in policy)
    pad = lambda answers: torch.stack([torch.cat([x, x.new_zeros(longest - len(x))]) for x in answers])  # noqa: E731
    nothing = torch.zeros(2, longest)
    outputs = SimpleNamespace(
        log_probs=pad(policy), entropy=nothing, mean_logits=nothing, is_top1=torch.zeros(2, longest, dtype=torch.bool)
    )
    sums = [answer.sum()[None] for answer in reference]
    # A one-token prompt, then the answer.
    mask = torch.cat([torch.zeros(2, 1), pad([torch.ones(len(answer)) for answer in policy])], dim=1).long()
    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["aot" if smoothing else "sigmoid"],
        loss_weights=[1.0],
        use_weighting=False,
        beta=beta,
        label_smoothing=smoothing,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": sums[0],
        "ref_rejected_logps": sums[1],
    }
    loss: Any = DPOTrainer._compute_loss(trainer, lambda **arguments: outputs, inputs, return_outputs=False)
    return loss, trainer._metrics["train"]


def packed(answers: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Values of the answers, each after a prompt token, as one pack: values, mask, documents [1, T]."""
    values = torch.cat([torch.cat([x.new_full((1,), 9.0), x]) for x in answers])
    mask = torch.cat([torch.cat([torch.zeros(1), torch.ones(len(x))]) for x in answers])
    documents = torch.cat([torch.full((len(x) + 1,), k) for k, x in enumerate(answers)])
    return values[None], mask[None], documents[None]


@pytest.mark.parametrize("smoothing", [0.0, 0.05])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_dpo_is_trl_s(smoothing: float, dtype: torch.dtype, tolerance: float) -> None:
    policy, reference = pairs(dtype)
    values, mask, documents = packed(policy)
    sums = sequence_sums(values, mask, documents, 10).view(-1, 2)
    fixed = sequence_sums(packed(reference)[0], mask, documents, 10).view(-1, 2)
    losses = dpo_loss(sums[:, 0], sums[:, 1], fixed[:, 0], fixed[:, 1], 0.3, smoothing)
    gradients = torch.autograd.grad(losses.sum(), policy)
    tokens = sequence_sums(mask, mask, documents, 10).view(-1, 2).T
    metrics = dpo_metrics(sums[:, 0], sums[:, 1], fixed[:, 0], fixed[:, 1], 0.3, tokens)
    assert metrics.dtype == torch.float64 and not metrics.requires_grad
    named = dict(zip(DPO_METRICS, metrics.tolist(), strict=True))

    logged: dict[str, float] = defaultdict(float)
    for k in range(len(LENGTHS)):
        span = slice(2 * k, 2 * k + 2)
        loss, metrics_of_pair = trl_pair(policy[span], reference[span], 0.3, smoothing)
        assert losses[k].item() == pytest.approx(loss.item(), rel=tolerance)
        for gradient, expected in zip(gradients[span], torch.autograd.grad(loss, policy[span])):
            assert expected.abs().min() > 1e-3
            torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=0)
        for name, value in metrics_of_pair.items():
            logged[name] += value[0]
    assert named["pairs"] == 5
    assert named["chosen_reward"] == pytest.approx(logged["rewards/chosen"], rel=tolerance)
    assert named["rejected_reward"] == pytest.approx(logged["rewards/rejected"], rel=tolerance)
    assert named["margin"] == pytest.approx(logged["rewards/margins"], rel=tolerance)
    assert 0 < named["accuracy"] == logged["rewards/accuracies"] < 5
    assert (named["chosen_tokens"], named["rejected_tokens"]) == (19, 14)


def test_dpo_by_hand() -> None:
    # h = (-5 - -7) - (-4 - -3) = 3; beta h = 0.6
    a, b, c, d = (torch.tensor([x], dtype=torch.float64) for x in (-5.0, -4.0, -7.0, -3.0))
    sigmoid = 1 / (1 + math.exp(-0.6))
    expected = -0.95 * math.log(sigmoid) - 0.05 * math.log(1 - sigmoid)
    assert dpo_loss(a, b, c, d, 0.2, 0.05).item() == pytest.approx(expected, rel=1e-12)
    assert dpo_loss(a, b, c, d, 0.2, 0.0).item() == pytest.approx(-math.log(sigmoid), rel=1e-12)


def test_conservative_dpo_is_least_where_the_preference_is_as_sure_as_its_labels() -> None:
    margin = torch.tensor([math.log(0.95 / 0.05) / 0.1], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(dpo_loss(margin, zero, zero, zero, 0.1, 0.05).sum(), margin)
    assert abs(gradient.item()) < 1e-12


def test_dpo_of_far_apart_answers_stays_finite() -> None:
    far, near = torch.tensor([-3000.0, 0.0]), torch.tensor([0.0, -3000.0])
    zero = torch.zeros(2)
    assert dpo_loss(far, near, zero, zero, 1.0, 0.05).tolist() == pytest.approx([0.95 * 3000, 0.05 * 3000])


def test_dpo_metrics_add_up_over_micro_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(4, 7, generator=generator)
    tokens = torch.randint(1, 9, (2, 7), generator=generator)

    def metrics(span: slice) -> Tensor:
        a, b, c, d = numbers[:, span]
        return dpo_metrics(a, b, c, d, 0.1, tokens[:, span])

    whole = metrics(slice(0, 7))
    torch.testing.assert_close(metrics(slice(0, 3)) + metrics(slice(3, 3)) + metrics(slice(3, 7)), whole)
    named = dict(zip(DPO_METRICS, whole.tolist()))
    assert named["pairs"] == 7 and named["chosen_drift"] == pytest.approx((numbers[2] - numbers[0]).sum().item())


def test_equal_rewards_are_not_accurate() -> None:
    zero = torch.zeros(3)
    metrics = dpo_metrics(zero, zero, zero, zero, 0.1, torch.ones(2, 3))
    named = dict(zip(DPO_METRICS, metrics.tolist()))
    assert named["accuracy"] == 0 and named["pairs"] == 3


def test_drift_estimates_the_divergence_of_the_policy_from_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 50, dtype=torch.float64, generator=generator).log_softmax(-1)
    expected = torch.nn.functional.kl_div(policy, reference, log_target=True, reduction="sum")
    # Every token once, weighted by its probability under the reference.
    drift = sum(
        weight * dpo_metrics(p[None], p[None], r[None], r[None], 0.1, torch.ones(2, 1))[-1]
        for weight, p, r in zip(reference.exp(), policy, reference)
    )
    assert float(drift) == pytest.approx(expected.item(), rel=1e-12)
