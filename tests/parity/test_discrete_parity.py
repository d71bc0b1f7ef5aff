"""Discrete media: some of their layouts against plain torch, and their planted bugs. `make parity` runs all layouts."""

from __future__ import annotations

import pytest

from parity.discrete import DISCRETE
from parity.discrete_bugs import DISCRETE_BUGS
from parity.layouts import Layout
from parity.planted import Bug
from parity.suite import Suite

QUICK = (3, 6, 13)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return Suite(tmp_path_factory.mktemp("discrete"), steps=2)


@pytest.mark.parametrize(
    "layout",
    [pytest.param(each, marks=[] if n in QUICK else pytest.mark.slow) for n, each in enumerate(DISCRETE)],
    ids=lambda layout: layout.name,
)
def test_a_layout_gives_the_same_numbers(layout: Layout, suite: Suite) -> None:
    difference = suite.difference(layout)
    assert difference.allowed, difference


@pytest.mark.parametrize("bug", DISCRETE_BUGS, ids=lambda bug: bug.what.replace(" ", "-"))
def test_a_planted_bug_is_caught(bug: Bug, suite: Suite) -> None:
    assert suite.difference(bug.layout).allowed
    assert not suite.difference(bug.layout, bug).allowed


def test_the_layouts_cover_what_differs() -> None:
    assert len(set(DISCRETE)) == len(DISCRETE) >= 12 and all(layout.possible for layout in DISCRETE)
    for name, values in {
        "tensor": (1, 2, 4),
        "pipeline": (1, 2, 4),
        "virtual": (1, 2),
        "context": (1, 2),
        "data": (1, 2),
        "sequence": (False, True),
        "tied_head": (False, True),
        "overlap": (False, True),
        "distributed_optimizer": (False, True),
        "rows": ("new", "all"),
        "trains": ("frozen", "lora", "full"),
        "job": ("pretrain", "sft"),
    }.items():
        assert {getattr(layout, name) for layout in DISCRETE} >= set(values), name
