"""A subset of the layouts of `make parity`, on at most four processes, and every planted bug."""

from __future__ import annotations

import pytest

from parity.layouts import CHOICES, DPO, SFT, STARTS, Layout, cover, pairs_of, possible_layouts
from parity.planted import BUGS, Bug
from parity.suite import Suite

SMALL = (
    Layout(),
    Layout(tensor=2, media="image"),
    Layout(tensor=2, sequence=True, trains="full", recompute="selective"),
    Layout(pipeline=2, uneven=True, trains="partial", tied_head=True),
    Layout(pipeline=2, virtual=2, overlap=True, trains="full", media="few media"),
    Layout(context=2, recompute="full"),
    Layout(context=4, trains="full", media="video"),
    Layout(data=2, overlap=True, media="few media"),
    Layout(data=2, distributed_optimizer=False, packs=2, media="imu"),
    Layout(tensor=2, sequence=True, context=2, media="audio", trains="partial"),
    Layout(pipeline=2, virtual=2, context=2, uneven=True, tied_head=True, trains="full"),
    Layout(tensor=2, sequence=True, pipeline=2, recompute="full", media="text", trains="full"),
    Layout(context=2, data=2, overlap=True, media="imu"),
    Layout(tensor=2, sequence=True, pipeline=2, virtual=2, trains="lora", recompute="full"),
    Layout(tensor=2, context=2, trains="lora", media="image"),
    Layout(data=2, overlap=True, trains="lora"),
    Layout(tensor=4, media="mixed"),
    Layout(pipeline=4, virtual=2, trains="partial", media="few media"),
    Layout(pipeline=4, virtual=2, trains="full", media="image", batched_messages=True),
    Layout(job="sft", tensor=2, sequence=True, trains="lora", noise="all"),
    Layout(job="sft", pipeline=2, virtual=2, overlap=True, trains="full", noise="text", mean="sample", media="image"),
    Layout(job="sft", context=2, data=2, noise="text", mean="sample", media="few media", recompute="full"),
    Layout(job="dpo", context=2, trains="lora", noise="all", reference="cached"),
    Layout(job="dpo", pipeline=2, trains="lora", noise="text", start="tp2-sp", media="image", recompute="full"),
    Layout(job="dpo", tensor=2, sequence=True, data=2, overlap=True, trains="lora", smoothing=0.0, media="few media"),
)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """Suite with runs of three steps; a planted bug must show within two."""
    return Suite(tmp_path_factory.mktemp("parity"), steps=3, bug_steps=2)


@pytest.mark.parametrize("layout", SMALL, ids=lambda layout: layout.name)
def test_a_layout_gives_the_same_numbers(layout: Layout, suite: Suite) -> None:
    difference = suite.difference(layout.shallow)
    assert difference.allowed, difference


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what.replace(" ", "-"))
def test_a_planted_bug_is_caught(bug: Bug, suite: Suite) -> None:
    layout = bug.layout.shallow
    assert suite.difference(layout).allowed
    assert not suite.difference(layout, bug).allowed


def test_the_selection_covers_every_possible_pair() -> None:
    chosen = cover(64)
    assert len(chosen) == len(set(chosen)) >= 60 and all(layout.possible for layout in chosen)
    wanted = frozenset().union(*(pairs_of(layout) for layout in possible_layouts()))
    plain = [Layout(**{name: getattr(layout, name) for name in CHOICES}) for layout in chosen]
    assert wanted == frozenset().union(*(pairs_of(layout) for layout in plain))
    for name, values in CHOICES.items():
        assert {getattr(layout, name) for layout in chosen} == set(values)
    for extra in ("uneven", "overlap", "tied_head"):
        assert any(getattr(layout, extra) for layout in chosen)


@pytest.mark.parametrize("layouts", [SFT, DPO], ids=["sft", "dpo"])
def test_sft_and_dpo_cover_every_setting(layouts: tuple[Layout, ...]) -> None:
    [job] = {layout.job for layout in layouts}
    assert len({layout.name for layout in layouts}) == len(layouts) >= 12
    assert all(layout.possible for layout in layouts)
    for name, values in CHOICES.items():
        if name not in ("media", "trains"):
            for value in values:
                assert sum(getattr(layout, name) == value for layout in layouts) >= 2, (name, value)
    wanted = {
        "media": CHOICES["media"],
        "noise": ("", "all", "text"),
        "uneven": (True,),
        "overlap": (True,),
        "tied_head": (True,),
        **({"trains": ("frozen", "lora", "full"), "mean": ("token", "sample")} if job == "sft" else {}),
        **({"smoothing": (0.05, 0.0), "reference": ("cached", "recomputed"), "start": STARTS} if job == "dpo" else {}),
    }
    for name, values in wanted.items():
        assert set(values) <= {getattr(layout, name) for layout in layouts}, name
