"""The simulated pipeline against the closed forms of ideal pipelines, and against itself in full length."""

from __future__ import annotations

import random

import pytest

from megatron_anymal.planning.layouts.schedule import events_of_stage
from megatron_anymal.planning.layouts.simulation import simulate


def even(stages: int, chunks: int) -> list[list[tuple[float, float]]]:
    """Stages whose whole forward pass takes a second, their backward pass two."""
    return [[(1 / chunks, 2 / chunks)] * chunks for _ in range(stages)]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    ("stages", "chunks", "micro_batches"),
    [(1, 1, 5), (2, 1, 5), (4, 1, 3), (4, 1, 9), (4, 2, 8), (4, 4, 40), (8, 5, 80)],
)
def test_even_stages_wait_as_the_closed_form_says(stages: int, chunks: int, micro_batches: int, overlap: bool) -> None:
    """Bubble time (p - 1)(t_f + t_b) / v: Narayanan et al. 2021, section 2.2, if no message takes time."""
    pipeline = simulate(even(stages, chunks), micro_batches, 0.0, overlap=overlap)
    waiting = 3.0 * (stages - 1) / chunks
    assert pipeline.seconds == pytest.approx(3.0 * micro_batches + waiting)
    assert pipeline.busy == pytest.approx([3.0 * micro_batches] * stages)
    assert pipeline.bubble == pytest.approx(waiting / pipeline.seconds)


def test_the_slowest_stage_sets_the_pace() -> None:
    passes = [[(1.0, 2.0)], [(1.5, 3.0)], [(1.0, 2.0)]]
    pipeline = simulate(passes, 6, 0.0)
    # Its own passes, after the first stage's forward pass and before its last backward pass. It waits once: its two
    # forward passes end at 4.0, and the last stage's first gradient comes at 2.5 + 1.0 + 2.0.
    assert pipeline.seconds == pytest.approx(1.0 + 6 * 4.5 + 1.5 + 2.0)


def test_two_stages_by_hand() -> None:
    """Forward 1, backward 2, a message 0.5: F0 ->F1 B1 -> B0."""
    pipeline = simulate([[(1.0, 2.0)], [(1.0, 2.0)]], 1, 0.5, timeline=True)
    assert pipeline.seconds == pytest.approx(1 + 0.5 + 1 + 2 + 0.5 + 2)
    passes = [[(s.kind, s.start, s.end) for s in spans if s.kind != "exchange"] for spans in pipeline.spans]
    assert passes == [[("forward", 0, 1), ("backward", 5, 7)], [("forward", 1.5, 2.5), ("backward", 2.5, 4.5)]]
    assert pipeline.exchanging == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize("message", [0.0, 0.03])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("stages", "chunks"), [(2, 1), (4, 1), (4, 2), (3, 4)])
def test_a_long_step_is_extrapolated_exactly(stages: int, chunks: int, overlap: bool, message: float) -> None:
    passes = [[(1 / chunks, 2 / chunks)] * chunks for _ in range(stages)]
    passes[0][0], passes[-1][-1] = (1.7, 2.9), (0.8, 3.1)
    for micro_batches in (10 * stages, 10 * stages + (1 if chunks == 1 else stages)):
        full = simulate(passes, micro_batches, message, overlap=overlap, timeline=True)
        extrapolated = simulate(passes, micro_batches, message, overlap=overlap)
        assert not extrapolated.spans and full.spans
        assert extrapolated.ends == pytest.approx(full.ends, rel=1e-9)
        assert extrapolated.busy == pytest.approx(full.busy) and extrapolated.exchanging == pytest.approx(
            full.exchanging, rel=1e-6
        )


def test_messages_in_the_background_cost_less() -> None:
    passes = even(4, 2)
    hidden, exposed = (simulate(passes, 16, 0.1, overlap=overlap).seconds for overlap in (True, False))
    assert simulate(passes, 16, 0.0).seconds < hidden < exposed


@pytest.mark.parametrize(("stages", "chunks", "micro_batches"), [(1, 1, 3), (4, 1, 2), (4, 1, 9), (4, 3, 8)])
def test_every_pass_runs_once_and_messages_match(stages: int, chunks: int, micro_batches: int) -> None:
    """On every stage each micro-batch goes forward before it goes back, and what is sent is received."""
    events = [events_of_stage(stage, stages, chunks, micro_batches, True) for stage in range(stages)]
    for of_stage in events:
        for chunk in range(chunks):
            forward, back = (
                [e for e in of_stage if (e.kind, e.chunk) == (kind, chunk)] for kind in ("forward", "backward")
            )
            assert [e.micro_batch for e in forward] == [e.micro_batch for e in back] == list(range(micro_batches))
    for stage, of_stage in enumerate(events):
        after = events[(stage + 1) % stages]
        assert sum(e.send_next for e in of_stage) == sum(e.receive_previous for e in after)
        assert sum(e.receive_next for e in of_stage) == sum(e.send_previous for e in after)


def test_a_long_step_is_that_of_its_events_on_uneven_stages() -> None:
    """Extrapolated from the first groups, before the slack between stages is used up, it would be too short."""
    dice = random.Random(1)
    for _ in range(20):
        stages, chunks = dice.choice((2, 4)), dice.choice((1, 2))
        passes = [[(dice.uniform(0.5, 2), dice.uniform(1, 4)) for _ in range(chunks)] for _ in range(stages)]
        count = dice.randrange(60, 160) // stages * stages
        message = dice.choice((0.0, 0.05, 0.5))
        short, whole = (simulate(passes, count, message, timeline=timeline) for timeline in (False, True))
        assert short.seconds == pytest.approx(whole.seconds, rel=1e-3)
        assert short.bubble == pytest.approx(whole.bubble, abs=2e-3) and short.bubble >= 0
