"""DPO with the prompt of a pair computed once gives the numbers of two whole documents, under every layout."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from parity.layouts import Layout
from parity.runs import EngineRun, compare
from parity.suite import Suite

# fp32 rounds to 6e-8; sums of a few hundred terms in another order stay within this.
SAME = 1e-6
_DPO = Layout(job="dpo", trains="lora", media="mixed").shallow
QUICK = (
    _DPO,
    replace(_DPO, tensor=2, sequence=True),
    replace(_DPO, pipeline=2, recompute="full"),
    replace(_DPO, context=2, reference="cached"),
)
SLOW = (
    replace(_DPO, tensor=2, packs=2),
    replace(_DPO, pipeline=2, virtual=2, data=2, overlap=True),
    replace(_DPO, context=4, recompute="selective"),
    replace(_DPO, tensor=2, sequence=True, context=2, data=2),
    replace(_DPO, pipeline=2, context=2, recompute="full", reference="cached"),
    replace(_DPO, data=2, recompute="selective", distributed_optimizer=False),
)
STEPS = 3


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return Suite(tmp_path_factory.mktemp("shared"), steps=STEPS)


def differences(one: EngineRun, other: EngineRun) -> dict[str, float]:
    """The largest relative differences of losses and whole gradients, and those of each metric (absolute below 1)."""
    deviations = {"loss": (d := compare(one, other.trace)).loss, "gradient": d.gradient}
    assert len(one.measures) == len(other.measures) == STEPS
    for name in one.measures[0]:
        mine, theirs = (np.array([step[name] for step in run.measures]) for run in (one, other))
        # Rewards are small differences of log-probabilities of many nats, whose rounding they keep.
        deviations[name] = float((np.abs(mine - theirs) / np.abs(theirs).clip(min=1.0)).max())
    return deviations


@pytest.mark.parametrize(
    "layout",
    [*QUICK, *(pytest.param(layout, marks=pytest.mark.slow) for layout in SLOW)],
    ids=lambda layout: layout.name,
)
def test_sharing_changes_rounding_only(layout: Layout, suite: Suite) -> None:
    shared, whole = (suite.run(replace(layout, share=share), STEPS) for share in ("auto", "never"))
    deviations = differences(shared, whole)
    assert all(value <= SAME for value in deviations.values()), deviations
    assert shared.trace.losses != whole.trace.losses, "both runs computed the same, so nothing was shared"


@pytest.mark.parametrize("layout", [replace(_DPO, noise="all", share="always")], ids=lambda layout: layout.name)
@pytest.mark.slow
def test_noise_of_a_shared_prompt_is_no_matter_of_layout(layout: Layout, suite: Suite) -> None:
    one, other = (suite.run(replace(layout, **sizes), STEPS) for sizes in ({}, {"context": 2, "tensor": 2}))
    deviations = differences(other, one)
    assert all(value <= SAME for value in deviations.values()), deviations
