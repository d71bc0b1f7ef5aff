"""The formula agrees with a simulation of the process, with its limits, and with Young and Daly at low rates."""

from __future__ import annotations

import dataclasses
import math

import pytest
from simulated_job import SimulatedJob, estimate

from megatron_anymal.planning.goodput import FailingJob, PeerSnapshots, RecoveryTime, Shares, shares
from megatron_anymal.planning.save_interval import best_interval, daly, young

EPOCHS = 20_000
# Standard errors of one comparison; there are four for each of the settings, with fixed seeds.
TOLERANCE = 4.0

RECOVERY = RecoveryTime(seconds=20.0, lost_node_seconds=60.0, lost_node_share=0.3)
QUICK = RecoveryTime(seconds=5.0, lost_node_seconds=60.0, lost_node_share=0.3)


def job(**changes: object) -> FailingJob:
    base = FailingJob(mtbf=1000.0, step=2.0, stall=3.0, write=0.0, recovery=RECOVERY)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def with_peers(every: int, coverage: float = 0.8, stall: float = 0.5, **changes: object) -> FailingJob:
    return job(peers=PeerSnapshots(every, stall, coverage, QUICK), **changes)


SETTINGS = {
    "rare": (job(mtbf=20_000.0), 30),
    "waits for its writing": (job(mtbf=300.0), 20),
    "asynchronous": (job(mtbf=300.0, write=25.0), 20),
    "failures are the rule": (job(mtbf=40.0, write=15.0), 10),
    "recovery takes longer than the mean": (job(mtbf=30.0, step=0.5, recovery=RecoveryTime(50.0)), 10),
    "writing takes longer than the interval": (job(mtbf=300.0, write=70.0), 20),
    "writing takes several intervals": (job(mtbf=120.0, write=45.0), 5),
    "no stall": (job(mtbf=200.0, stall=0.0, write=10.0), 15),
    "peers": (with_peers(5, mtbf=2000.0, write=20.0), 100),
    "peers, failures are the rule": (with_peers(2, mtbf=60.0, write=23.0), 20),
    "peers, writing ends in a snapshot": (with_peers(4, mtbf=100.0, write=34.0, stall=4.0), 20),
    "peers, writing takes longer than the interval": (with_peers(4, mtbf=150.0, write=60.0), 20),
    "peers, one snapshot per save": (with_peers(10, mtbf=100.0, write=8.0), 10),
    "peers cover little": (with_peers(2, mtbf=100.0, coverage=0.1, write=10.0), 10),
    "peers cover nearly all": (with_peers(1, mtbf=50.0, coverage=0.98, write=10.0), 40),
}


def deviations(predicted: Shares, setting: FailingJob, save_every: int, seed: int) -> dict[str, float]:
    """Difference of each share from the simulation, in standard errors."""
    epochs = SimulatedJob(setting, save_every, seed).run(EPOCHS)
    values = {
        "ratio": [epoch.kept for epoch in epochs],
        "stalls": [epoch.spent["stalls"] for epoch in epochs],
        "lost": [epoch.spent["steps"] - epoch.kept for epoch in epochs],
        "recovery": [epoch.spent["recovery"] for epoch in epochs],
    }
    differences = {}
    for share, of_epochs in values.items():
        mean, error = estimate(epochs, of_epochs)
        assert error < 0.01
        differences[share] = abs(getattr(predicted, share) - mean) / max(error, 1e-12)
    return differences


@pytest.mark.parametrize("name", SETTINGS)
def test_simulation_agrees(name: str) -> None:
    setting, save_every = SETTINGS[name]
    differences = deviations(shares(setting, save_every), setting, save_every, seed=sorted(SETTINGS).index(name))
    assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.parametrize("name", ["asynchronous", "peers, failures are the rule"])
def test_a_wrong_formula_is_found(name: str) -> None:
    """The comparison sees an error of a fifth in the rate, in a save's stall and in its writing."""
    setting, save_every = SETTINGS[name]
    for field in ("mtbf", "stall", "write"):
        wrong = dataclasses.replace(setting, **{field: 1.2 * getattr(setting, field)})
        differences = deviations(shares(wrong, save_every), setting, save_every, seed=0)
        assert max(differences.values()) > TOLERANCE, (field, differences)


@pytest.mark.parametrize("name", SETTINGS)
def test_shares_add_up(name: str) -> None:
    fractions = dataclasses.astuple(shares(*SETTINGS[name]))
    assert sum(fractions) == pytest.approx(1.0, abs=1e-12) and all(0.0 <= share <= 1.0 for share in fractions)


@pytest.mark.parametrize("mtbf", [math.inf, 1e12])
def test_without_failures(mtbf: float) -> None:
    never = shares(job(mtbf=mtbf, write=10.0), 20)
    assert never.ratio == pytest.approx(40.0 / 43.0, rel=1e-9) and never.stalls == pytest.approx(3.0 / 43.0, rel=1e-9)
    # A save waits for the one before.
    assert shares(job(mtbf=mtbf, write=50.0), 20).ratio == pytest.approx(40.0 / 53.0, rel=1e-9)
    # Four snapshots and a save.
    assert shares(with_peers(5, mtbf=mtbf), 20).ratio == pytest.approx(40.0 / 45.0, rel=1e-9)


@pytest.mark.parametrize("mtbf", [50.0, 3000.0])
def test_saves_that_wait_have_dalys_ratio(mtbf: float) -> None:
    """Daly 2006: M e^(R/M) (e^((t + d)/M) - 1) wall seconds for t seconds of steps and a dump of d."""
    steps, stall, restart = 60.0, 3.0, 20.0
    wall = mtbf * math.exp(restart / mtbf) * math.expm1((steps + stall) / mtbf)
    assert shares(job(mtbf=mtbf, recovery=RecoveryTime(restart)), 30).ratio == pytest.approx(steps / wall, rel=1e-9)


def test_writing_costs_what_the_page_says() -> None:
    """docs/operations/goodput.md: a writing of w costs a factor of e^(w / M) if it ends before the next save."""
    without, written = shares(job(), 30), shares(job(write=25.0), 30)
    assert written.ratio == pytest.approx(without.ratio * math.exp(-25.0 / 1000.0), rel=1e-9)


def test_snapshots_that_cover_nothing_are_stalls() -> None:
    """If no failure leaves a snapshot behind, one just before each save only makes the save's stall longer."""
    with_stall = shares(job(stall=4.0, write=7.0), 30)
    with_snapshots = shares(with_peers(30, coverage=0.0, stall=1.0, write=7.0), 30)
    assert dataclasses.astuple(with_snapshots) == pytest.approx(dataclasses.astuple(with_stall), rel=1e-9)


def test_nothing_is_finished() -> None:
    assert shares(job(mtbf=0.01), 30).ratio == 0.0
    breakdown = shares(job(mtbf=1e-3, recovery=RecoveryTime(10.0)), 30)
    assert breakdown == Shares(0.0, 0.0, 0.0, 1.0)
    assert shares(with_peers(1, mtbf=1e-4), 30).ratio == 0.0
    assert best_interval(job(mtbf=1e-3)) == 1


BEST = [
    job(mtbf=50.0),
    job(mtbf=3000.0, write=30.0),
    # The best interval is the time that the writing takes.
    job(mtbf=400.0, stall=0.0, write=41.0),
    job(mtbf=30.0, stall=0.0, write=100.0),
    with_peers(3, mtbf=300.0, write=20.0),
    with_peers(3, mtbf=300.0, write=20.0, coverage=0.98),
    with_peers(1, mtbf=60.0, stall=0.0, write=20.0),
]


@pytest.mark.parametrize("number", range(len(BEST)))
def test_the_best_interval_is_the_best_of_all(number: int) -> None:
    setting = BEST[number]
    best = best_interval(setting)
    every = [shares(setting, k * setting.unit).ratio for k in range(1, 2001)]
    assert best % setting.unit == 0 and shares(setting, best).ratio == pytest.approx(max(every), rel=1e-12)


@pytest.mark.parametrize("mtbf", [1e4, 1e6, 1e8])
def test_young_and_daly_at_low_rates(mtbf: float) -> None:
    setting = job(mtbf=mtbf, step=0.01, write=5.0)
    best = best_interval(setting) * setting.step
    # Young neglects the stall itself; Daly's next terms are of order (stall / mtbf)^(3/2). At the best interval the
    # ratio is so flat that rounding moves the maximum by 1e-5 of it.
    assert best == pytest.approx(young(setting) - 2.0 / 3.0 * setting.stall, abs=0.02 * setting.stall, rel=1e-5)
    assert best == pytest.approx(daly(setting), abs=0.005 * setting.stall + setting.step, rel=1e-5)
    # First order of the loss: half of it is stalls, half lost steps.
    breakdown = shares(job(mtbf=mtbf, step=0.01, recovery=RecoveryTime(0.0)), best_interval(setting))
    assert 1.0 - breakdown.ratio == pytest.approx(
        math.sqrt(2.0 * setting.stall / mtbf), rel=2.0 / math.sqrt(mtbf / 3.0)
    )


@pytest.mark.parametrize("mtbf", [20.0, 500.0])
def test_recovery_does_not_move_the_best_interval(mtbf: float) -> None:
    """docs/operations/goodput.md: (1 - T / M) exp((T + c) / M) = 1, or the writing if that takes longer."""
    for recovery in (RecoveryTime(0.0), RECOVERY):
        setting = job(mtbf=mtbf, step=0.001, recovery=recovery, write=2.0)
        best = best_interval(setting) * setting.step
        assert (1.0 - best / mtbf) * math.exp((best + setting.stall) / mtbf) == pytest.approx(1.0, abs=1e-3)
        assert best_interval(dataclasses.replace(setting, write=0.5 * mtbf)) * setting.step == pytest.approx(
            max(best, 0.5 * mtbf), rel=1e-3
        )


def test_daly_of_a_job_that_hardly_runs() -> None:
    assert daly(job(mtbf=1.0, stall=3.0)) == 1.0
