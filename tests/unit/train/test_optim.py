"""The learning rate by hand, and AdamW against torch's."""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core.utils import local_multi_tensor_scale

from megatron_anymal.config import RunConfig
from megatron_anymal.train.optim import AdamW, _norm, _scale, learning_rate


def config_of(name: str, warmup: int = 0, decay: int = 0, ratio: float = 0.1, steps: int = 100) -> RunConfig:
    config = RunConfig()
    config.trainer.max_steps, config.model.optim.lr = steps, 2.0
    sched = config.model.optim.sched
    sched.name, sched.warmup_steps, sched.decay_steps, sched.min_lr_ratio = name, warmup, decay, ratio
    return config


def rate_of(config: RunConfig, step: int) -> float:
    return learning_rate(config.model.optim, config.trainer.max_steps, step)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_warm_up_reaches_the_full_rate_with_its_last_step(name: str) -> None:
    config = config_of(name, warmup=4)
    assert [rate_of(config, step) for step in range(5)] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


@pytest.mark.parametrize(
    ("name", "points"),
    [
        # From step 10, over 80 steps to a tenth: a quarter, half and all of the way, and beyond.
        ("linear", {10: 2.0, 30: 1.55, 50: 1.1, 90: 0.2, 99: 0.2}),
        ("cosine", {10: 2.0, 30: 0.2 + 0.9 * (1 + math.sqrt(0.5)), 50: 1.1, 90: 0.2, 99: 0.2}),
        ("constant", {10: 2.0, 50: 2.0, 99: 2.0}),
    ],
)
def test_points_of_the_schedules(name: str, points: dict[int, float]) -> None:
    config = config_of(name, warmup=10, decay=90)
    for step, rate in points.items():
        assert rate_of(config, step) == pytest.approx(rate)


def test_decay_ends_with_the_run_unless_told() -> None:
    config = config_of("linear", ratio=0.0)
    assert rate_of(config, 50) == pytest.approx(1.0)
    assert rate_of(config, 100) == 0.0
    assert rate_of(config_of("linear", decay=200, ratio=0.0), 100) == pytest.approx(1.0)


def test_a_run_of_nothing_but_warm_up() -> None:
    config = config_of("cosine", warmup=100)
    assert rate_of(config, 99) == pytest.approx(2.0)
    assert rate_of(config, 100) == pytest.approx(2.0)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_equals_torchs(decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (4,), (0,), (2, 2, 2)]
    ours = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    settings = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": decay}
    mine, reference = AdamW(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for step in range(8):
        for optimizer in (mine, reference):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (step + 1)
        for number, (one, other) in enumerate(zip(ours, theirs)):
            gradient = torch.randn(one.shape, generator=generator) * 10 ** (step - 4)
            # Megatron-core has gradients for all parameters of a group; a parameter without one is left unchanged.
            one.grad, other.grad = (None, None) if number == 3 else (gradient, gradient.clone())
        mine.step()
        reference.step()
        for one, other in zip(ours, theirs):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert mine.param_groups[0]["step"] == 8
    assert all(not mine.state[p] for p in (ours[2], ours[3]))


def test_the_norm_and_the_clipping_are_megatrons() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator) for shape in ((5, 3), (4,), (2, 2, 2))]
    expected = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    norm, nothing = _norm(0, torch.zeros(1), [gradients], False)
    assert norm.shape == (1,) and nothing is None and float(norm) == pytest.approx(expected, rel=1e-6)
    ours, theirs = ([g.clone() for g in gradients] for _ in range(2))
    _scale(0, torch.zeros(1), [ours, ours], 0.3)
    local_multi_tensor_scale(0, torch.zeros(1), [theirs, theirs], 0.3)
    assert all(map(torch.equal, ours, theirs)) and not torch.equal(ours[0], gradients[0])


def test_adamw_continues_from_saved_state() -> None:
    def stepped(optimizer: AdamW, parameter: torch.Tensor, first: int, last: int) -> None:
        for step in range(first, last):
            parameter.grad = torch.full_like(parameter, math.sin(step))
            optimizer.step()

    whole, part, rest = (torch.ones(3, requires_grad=True) for _ in range(3))
    stepped(AdamW([whole], lr=0.1), whole, 0, 6)
    first = AdamW([part], lr=0.1)
    stepped(first, part, 0, 3)
    with torch.no_grad():
        rest.copy_(part)
    second = AdamW([rest], lr=0.1)
    second.load_state_dict(first.state_dict())
    stepped(second, rest, 3, 6)
    assert torch.equal(rest, whole)
