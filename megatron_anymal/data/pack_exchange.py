"""Local search on packs: documents and packs are exchanged until lengths and encoder costs are even.

Many pairs of packs, or of replicas, are improved at once. The number of rounds is bounded by the size of the problem,
never by a clock.
"""

from __future__ import annotations

import math

import numpy as np

# Documents of a pack that one round looks at: so many that their pairs are at most _PAIRS_PER_ROUND.
_SMALLEST_WINDOW, _LARGEST_WINDOW = 12, 64
_PAIRS_PER_ROUND, _PAIRS_PER_SEARCH = 50_000, 600_000
_MOST_ROUNDS = 100
# Sweeps over all pairs of positions that do not lower the highest cost, after which the search stops.
_PATIENCE = 3
_IMPOSSIBLE = np.int64(1) << 62


class PackTable:
    """Documents of each pack, in a table with free slots.

    Args:
        lengths: [n] int64 tokens of each document.
        costs: [n] int64 encoder cost of each document.
        pack_of: [n] int64: the pack of each document.
        count: number of packs.
    """

    def __init__(self, lengths: np.ndarray, costs: np.ndarray, pack_of: np.ndarray, count: int):
        self._free = len(lengths)
        # [n + 1]: those of each document, and 0 for a free slot, so that an exchange with one is a move.
        self.lengths, self.costs = np.append(lengths, 0), np.append(costs, 0)
        sizes = np.bincount(pack_of, minlength=count)
        by_pack = np.argsort(pack_of, kind="stable")
        slots = np.arange(len(by_pack)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        # [packs, slots]: document in each slot.
        self._members = np.full((count, int(sizes.max(initial=0)) + 1), self._free)
        self._members[pack_of[by_pack], slots] = by_pack
        # [packs]: tokens and encoder cost of each pack.
        self.tokens, self.work = (values[self._members].sum(axis=1) for values in (self.lengths, self.costs))

    def rounds(self, pairs: int) -> int:
        """Rounds of a search that exchanges documents between this many pairs of packs in each round."""
        return min(_PAIRS_PER_SEARCH // max(1, pairs * self._window(pairs) ** 2), _MOST_ROUNDS)

    def _window(self, pairs: int) -> int:
        fitting = math.isqrt(_PAIRS_PER_ROUND // max(1, pairs))
        return min(max(fitting, _SMALLEST_WINDOW), _LARGEST_WINDOW, self._members.shape[1])

    def exchange(
        self, high: np.ndarray, low: np.ndarray, surplus: np.ndarray, values: np.ndarray, limit: int, turn: int
    ) -> int:
        """Exchange one document, or none, between the packs of each pair, so that their surplus becomes smallest.

        Args:
            high: [k] the longer or costlier pack of each pair; no pack occurs twice.
            low: [k] the other pack of each pair.
            surplus: [k] int64 by how much `high` exceeds `low`, at least 0. Moving a value changes it twice.
            values: [n + 1] int64 `lengths` or `costs`.
            limit: no pack becomes longer than this.
            turn: shifts the window of documents that is looked at in packs of many documents.

        Returns:
            Number of pairs that became more even.
        """
        width = self._members.shape[1]
        window = self._window(len(high))
        slots = (turn * window + np.arange(window)) % width
        given, taken = self._members[high[:, None], slots], self._members[low[:, None], slots]
        longer = self.lengths[given][:, :, None] - self.lengths[taken][:, None, :]
        more = longer if values is self.lengths else values[given][:, :, None] - values[taken][:, None, :]
        left = np.abs(surplus[:, None, None] - 2 * more)
        fits = longer <= (limit - self.tokens[low])[:, None, None]
        fits &= -longer <= (limit - self.tokens[high])[:, None, None]
        left = np.where(fits, left, _IMPOSSIBLE).reshape(len(high), -1)
        best = left.argmin(axis=1)
        better = np.flatnonzero(left[np.arange(len(high)), best] < surplus)
        i, j = np.divmod(best[better], window)
        self._swap(high[better], slots[i], low[better], slots[j])
        return len(better)

    def _swap(self, high: np.ndarray, i: np.ndarray, low: np.ndarray, j: np.ndarray) -> None:
        given, taken = self._members[high, i], self._members[low, j]
        self._members[high, i], self._members[low, j] = taken, given
        for totals, values in ((self.tokens, self.lengths), (self.work, self.costs)):
            moved = values[given] - values[taken]
            totals[high] -= moved
            totals[low] += moved

    def documents(self, order: np.ndarray) -> list[list[int]]:
        """Document indices of each pack, in ascending order, for the packs in `order`, [packs] int64."""
        rows = np.sort(self._members[order], axis=1)
        sizes = (rows < self._free).sum(axis=1).tolist()
        return [row[:size] for row, size in zip(rows.tolist(), sizes)]


def shorten(packs: PackTable, limit: int) -> None:
    """Exchange documents between long and short packs until none is longer than `limit`, as far as possible."""
    most = len(packs.tokens) // 2
    stuck = 0
    for turn in range(packs.rounds(min(most, int((packs.tokens > limit).sum())))):
        shortest_first = np.argsort(packs.tokens, kind="stable")
        pairs = min(most, int((packs.tokens > limit).sum()))
        if not pairs or stuck > 3:
            return
        high, low = shortest_first[::-1][:pairs], np.roll(shortest_first[:pairs], turn)
        surplus = packs.tokens[high] - packs.tokens[low]
        # An exchange must not make another pack too long, but the long ones may still be longer than the limit.
        longest = int(packs.tokens.max()) - 1
        moved = packs.exchange(high, low, surplus, packs.lengths, longest, turn)
        stuck = 0 if moved else stuck + 1


def deal_to_replicas(packs: PackTable, replicas: int) -> np.ndarray:
    """Deal packs to replicas so that each gets the same number and nearly the same encoder cost.

    Returns:
        [packs / replicas, replicas] int64: pack that each replica runs at each position. Costs fall from row to row.
    """
    costliest_first = np.lexsort((-packs.tokens, -packs.work)).reshape(-1, replicas)
    load = np.zeros(replicas, np.int64)
    order = np.empty_like(costliest_first)
    for position, row in enumerate(costliest_first):
        order[position, np.argsort(load, kind="stable")] = row
        load += packs.work[order[position]]
    _exchange_packs(packs.work, order)
    return order


def _exchange_packs(work: np.ndarray, order: np.ndarray) -> None:
    """Exchange the packs of one position between replicas while that evens out the replicas' encoder costs."""
    half = order.shape[1] // 2
    for _ in range(_MOST_ROUNDS if half else 0):
        load = work[order].sum(axis=0)
        lowest_first = np.argsort(load, kind="stable")
        low, high = lowest_first[:half], lowest_first[::-1][:half]
        surplus = load[high] - load[low]
        left = np.abs(surplus - 2 * (work[order[:, high]] - work[order[:, low]]))
        best = left.argmin(axis=0)
        better = np.flatnonzero(left[best, np.arange(half)] < surplus)
        if not len(better):
            return
        at, one, other = best[better], high[better], low[better]
        order[at, one], order[at, other] = order[at, other], order[at, one]


def even_out_costs(packs: PackTable, order: np.ndarray, limit: int, tolerance: int) -> None:
    """Exchange documents between replicas with high and low encoder cost; no pack becomes longer than `limit`.

    Args:
        order: [positions, replicas] int64: the packs of each replica. A single row evens out the packs themselves.
        tolerance: costs are even if the highest one exceeds the mean by at most 1 / tolerance of it.
    """
    positions, replicas = order.shape
    half, stuck = replicas // 2, 0
    highest = int(packs.work[order].sum(axis=0).max())
    for turn in range(packs.rounds(half) if half else 0):
        load = packs.work[order].sum(axis=0)
        stuck = 0 if load.max() < highest else stuck + 1
        highest, total = int(load.max()), int(load.sum())
        if (highest * replicas - total) * tolerance <= total or stuck > _PATIENCE * positions**2:
            return
        lowest_first = np.argsort(load, kind="stable")
        high = lowest_first[::-1][:half]
        # Every position of one replica meets every position of the other; then other replicas are paired.
        low = np.roll(lowest_first[:half], turn // positions**2)
        one, other = order[turn % positions, high], order[(turn + turn // positions) % positions, low]
        packs.exchange(one, other, load[high] - load[low], packs.costs, limit, turn // positions)
