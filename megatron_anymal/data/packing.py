"""Balanced packing: documents of a global batch into packs of bounded length."""

from __future__ import annotations

import heapq
from bisect import bisect_left

import numpy as np

# How much longer than the mean a pack may be.
_UNEVENNESS = 1.02


def pack(lengths: np.ndarray, costs: np.ndarray, capacity: int, multiple: int) -> list[list[int]]:
    """Cut documents into the fewest packs that hold them, in a number that `multiple` divides, evenly filled.

    First best-fit decreasing finds how few packs suffice. Then the documents are dealt out again, each to the pack
    whose larger share (of all tokens, of all encoder work) is smallest: heaviest first, with room for little more than
    the mean pack; where that does not fit, by tokens alone; then with room for `capacity`. Where no dealing fits, the
    tight packs of the first pass are kept.

    Args:
        lengths: [n] tokens of each document, each at most `capacity`.
        costs: [n] encoder work of each document, in any unit.
        capacity: tokens a pack may hold.
        multiple: what the number of packs must be a multiple of.

    Returns:
        The packs, most loaded first, each the indices of its documents in ascending order. Packs may be empty where
        there are fewer documents than packs. The same arguments always give the same packs.
    """
    assert len(lengths) == 0 or int(lengths.max()) <= capacity
    order = sorted(range(len(lengths)), key=lambda i: (-int(lengths[i]), -float(costs[i]), i))
    tight = _best_fit(order, lengths, capacity)
    count = max(multiple, -(-len(tight) // multiple) * multiple)
    # All packs are padded to the longest: dealing to little more than the mean first keeps the padding small.
    mean = int(lengths.sum()) / count
    even = min(capacity, max(int(lengths.max(initial=0)), int(mean * _UNEVENNESS) + 1))
    load = _shares(lengths, costs)
    heaviest_first = sorted(order, key=lambda i: (-max(load[i]), -sum(load[i]), i))
    packs = (
        _deal(heaviest_first, lengths, load, even, count)
        or _deal(order, lengths, _shares(lengths, np.zeros_like(costs)), even, count)
        or _deal(order, lengths, load, capacity, count)
        or tight + [[] for _ in range(count - len(tight))]
    )
    return sorted((sorted(p) for p in packs), key=lambda p: (-sum(max(load[i]) for i in p), p))


def _best_fit(order: list[int], lengths: np.ndarray, capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    # Packs by the room that is left; room_of[r] lists those with exactly r, rooms is sorted and without empties.
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
    """A sorted set of whole numbers."""

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
    """Each document's share of all tokens and of all encoder work."""
    tokens, work = max(1.0, float(lengths.sum())), max(1e-30, float(costs.sum()))
    return [(float(length) / tokens, float(cost) / work) for length, cost in zip(lengths, costs)]


def _deal(
    order: list[int], lengths: np.ndarray, shares: list[tuple[float, float]], capacity: int, count: int
) -> list[list[int]] | None:
    packs: list[list[int]] = [[] for _ in range(count)]
    room = [capacity] * count
    load = [(0.0, 0.0)] * count
    # Packs with room for the document at hand, least loaded first; the others wait, roomiest first, for a shorter one.
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
