"""The save interval to choose: the best one under the model of goodput.py, and two published approximations of it.

Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974; Daly, "A higher order
estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006. Both hold for saves to disk only.
"""

from __future__ import annotations

import math

from megatron_anymal.planning.goodput import FailingJob, shares

# Points of the grid on which the search for the best interval begins.
_GRID = 64


def young(job: FailingJob) -> float:
    """Young's optimum: seconds of steps between saves to disk, to first order in stall / mtbf."""
    return math.sqrt(2.0 * job.stall * job.mtbf)


def daly(job: FailingJob) -> float:
    """Daly's optimum: seconds of steps between saves to disk, to higher order in stall / mtbf."""
    if job.stall >= 2.0 * job.mtbf:
        return job.mtbf
    x = job.stall / (2.0 * job.mtbf)
    return young(job) * (1.0 + math.sqrt(x) / 3.0 + x / 9.0) - job.stall


def best_interval(job: FailingJob) -> int:
    """Steps between saves that make the ratio largest; a multiple of `job.unit`.

    The ratio rises to a single maximum. It cannot lie beyond the mean time between restarts from the disk, at which
    losing an interval outweighs any stall.
    """

    def ratio(units: int) -> float:
        return shares(job, units * job.unit).ratio

    to_disk = 1.0 - job.peers.coverage if job.peers else 1.0
    longest = max(1, math.ceil(job.mtbf / to_disk / (job.unit * job.step)))
    grid = sorted({round(longest ** (i / (_GRID - 1))) for i in range(_GRID)})
    at = max(range(len(grid)), key=lambda i: ratio(grid[i]))
    low, high = grid[max(0, at - 1)], grid[min(len(grid) - 1, at + 1)]
    while low < high:
        middle = (low + high) // 2
        if ratio(middle + 1) > ratio(middle):
            low = middle + 1
        else:
            high = middle
    return low * job.unit
