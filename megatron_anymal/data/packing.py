"""Balanced sequence packing: assigns the documents of a global batch to packs of bounded length."""

from __future__ import annotations

import heapq
from bisect import bisect_left

import numpy as np

# Allowed pack length relative to the mean.
_UNEVENNESS = 1.02


def pack(lengths: np.ndarray, costs: np.ndarray, capacity: int, multiple: int) -> list[list[int]]:
    """Pack documents into as few, evenly loaded packs as possible; the number of packs is a multiple of `multiple`.

    Best-fit decreasing first determines how many packs are needed. The documents are then redistributed greedily,
    heaviest first, each to the pack with the smallest load, where a pack's load is the larger of its share of all
    tokens and its share of all encoder work. Pack length is limited to slightly more than the mean. If that does not
    fit, the load counts tokens only; if that does not fit either, the limit is `capacity`. If none of these fits, the
    packs of the first pass are kept.

    Args:
        lengths: [n] tokens of each document, each at most `capacity`.
        costs: [n] encoder work of each document, in any unit.
        capacity: maximum number of tokens in a pack.
        multiple: the number of packs is a multiple of this.

    Returns:
        The packs, most loaded first, each a list of document indices in ascending order. Packs may be empty if there
        are fewer documents than packs. The same arguments always give the same packs.
    """
    assert len(lengths) == 0 or int(lengths.max()) <= capacity
    # Longest first, then costliest, then in the given order.
    order = np.lexsort((-costs, -lengths)).tolist()
    tight = _best_fit(order, lengths, capacity)
    count = max(multiple, -(-len(tight) // multiple) * multiple)
    # All packs are padded to the longest one, so a limit close to the mean keeps the padding small.
    mean = int(lengths.sum()) / count
    even = min(capacity, max(int(lengths.max(initial=0)), int(mean * _UNEVENNESS) + 1))
    load = _shares(lengths, costs)
    tokens, work = np.array(load).reshape(-1, 2).T
    heaviest_first = np.lexsort((-(tokens + work), -np.maximum(tokens, work))).tolist()
    packs = (
        _deal(heaviest_first, lengths, load, even, count)
        or _deal(order, lengths, _shares(lengths, np.zeros_like(costs)), even, count)
        or _deal(order, lengths, load, capacity, count)
        or tight + [[] for _ in range(count - len(tight))]
    )
    return sorted((sorted(p) for p in packs), key=lambda p: (-sum(max(load[i]) for i in p), p))


def _best_fit(order: list[int], lengths: np.ndarray, capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    # room_of[r] lists the packs with exactly r free tokens; `rooms` holds the values of r with at least one pack.
    room_of: dict[int, list[int]] = {}
    rooms = _SortedRooms()
    for i in order:
        length = int(lengths[i])
        room = rooms.smallest_at_least(length)
        if room is None:
            packs.append([])
            number, room = len(packs) - 1, capacity
        else:
            number = room_of[room].pop()
            if not room_of[room]:
                rooms.remove(room)
        packs[number].append(i)
        left = room - length
        if not room_of.setdefault(left, []):
            rooms.add(left)
        room_of[left].append(number)
    return packs


class _SortedRooms:
    """A sorted set of integers."""

    def __init__(self) -> None:
        self._values: list[int] = []

    def smallest_at_least(self, value: int) -> int | None:
        at = self._find(value)
        return self._values[at] if at < len(self._values) else None

    def add(self, value: int) -> None:
        self._values.insert(self._find(value), value)

    def remove(self, value: int) -> None:
        del self._values[self._find(value)]

    def _find(self, value: int) -> int:
        return bisect_left(self._values, value)


def _shares(lengths: np.ndarray, costs: np.ndarray) -> list[tuple[float, float]]:
    """Share of all tokens and of all encoder work for each document."""
    tokens, work = max(1.0, float(lengths.sum())), max(1e-30, float(costs.sum()))
    return [(float(length) / tokens, float(cost) / work) for length, cost in zip(lengths, costs)]


def _deal(
    order: list[int], lengths: np.ndarray, shares: list[tuple[float, float]], capacity: int, count: int
) -> list[list[int]] | None:
    packs: list[list[int]] = [[] for _ in range(count)]
    room = [capacity] * count
    load = [(0.0, 0.0)] * count
    # `queue`: packs that may have room for the current document, least loaded first. `waiting`: packs that were too
    # full for an earlier document, most free space first, until a shorter document comes.
    queue: list[tuple[float, float, int]] = [(0.0, 0.0, k) for k in range(count)]
    waiting: list[tuple[int, int]] = []
    for i in order:
        length, (tokens, work) = int(lengths[i]), shares[i]
        while waiting and -waiting[0][0] >= length:
            k = heapq.heappop(waiting)[1]
            heapq.heappush(queue, (max(load[k]), sum(load[k]), k))
        while queue and room[queue[0][2]] < length:
            k = heapq.heappop(queue)[2]
            heapq.heappush(waiting, (-room[k], k))
        if not queue:
            return None
        k = heapq.heappop(queue)[2]
        packs[k].append(i)
        room[k] -= length
        load[k] = (load[k][0] + tokens, load[k][1] + work)
        heapq.heappush(queue, (max(load[k]), sum(load[k]), k))
    return packs
