"""Balanced sequence packing: assigns the documents of a global batch to packs of bounded length, and packs to replicas.

Everything is computed on integers with stable sorts, so that every rank and platform gets the same packs, and on whole
arrays, so that the time grows with the number of packs and of different lengths rather than of documents.
"""

from __future__ import annotations

import numpy as np

from megatron_anymal.data.context_parallel import padded
from megatron_anymal.data.pack_exchange import PackTable, deal_to_replicas, even_out_costs, shorten

# Encoder costs are even if the highest exceeds the mean by at most 1 / _EVEN of it. If it exceeds it by more than
# 1 / _UNEVEN, packs may exceed their mean length by up to 1 / _SLACK to even them out: the padding costs less.
_EVEN, _UNEVEN, _SLACK = 200, 50, 100
# Bisections of the capacity, and the largest batch, in documents, for which there is time for them.
_SEARCHES, _MOST_SEARCHED = 7, 4096


def pack(
    lengths: np.ndarray,
    costs: np.ndarray,
    capacity: int,
    multiple: int,
    *,
    replicas: int = 1,
    length_multiple: int = 1,
) -> list[list[int]]:
    """Pack documents into as few, evenly loaded packs as possible; the number of packs is a multiple of `multiple`.

    All packs of a step are padded to the longest one, rounded up to `length_multiple`. Within that length, the encoder
    cost is evened out, first over the packs and then over the replicas. The number of packs is the smallest that the
    number of tokens allows, or, if documents dealt out evenly do not fit into that, the number that best-fit decreasing
    needs.

    Args:
        lengths: [n] int64 tokens of each document, each at most `capacity`.
        costs: [n] int64 encoder cost of each document, in any unit.
        capacity: maximum number of tokens in a pack.
        multiple: the number of packs is a multiple of this, which is a multiple of `replicas`.
        replicas: number of replicas that run the packs.
        length_multiple: packs are padded to a multiple of this.

    Returns:
        The packs, each a list of document indices in ascending order; pack k * replicas + r is the k-th of replica r.
        The packs of a replica come in the order of their encoder cost, highest first, except for the last exchanges of
        documents; those that the replicas run at the same time have similar costs. Packs may be empty if there are
        fewer documents than packs.
    """
    assert len(lengths) == 0 or int(lengths.max()) <= capacity
    assert multiple % replicas == 0
    packs = _even_packs(lengths, costs, capacity, multiple, length_multiple)
    tight = min(capacity, padded(int(packs.tokens.max()), length_multiple))
    even_out_costs(packs, np.arange(len(packs.tokens))[None], tight, _EVEN)
    order = deal_to_replicas(packs, replicas)
    even_out_costs(packs, order, tight, _EVEN)
    mean = int(lengths.sum()) // len(packs.tokens)
    roomy = (mean + mean // _SLACK) // length_multiple * length_multiple
    if tight < roomy <= capacity:
        even_out_costs(packs, order, roomy, _UNEVEN)
    return packs.documents(order.ravel())


def _even_packs(
    lengths: np.ndarray, costs: np.ndarray, capacity: int, multiple: int, length_multiple: int
) -> PackTable:
    """Packs of even length and at most `capacity` tokens."""
    total, longest = int(lengths.sum()), int(lengths.max(initial=0))

    def even_length(count: int) -> int:
        return min(capacity, padded(max(-(-total // count), longest), length_multiple))

    def shortened(pack_of: np.ndarray, count: int) -> PackTable:
        packs = PackTable(lengths, costs, pack_of, count)
        shorten(packs, even_length(count))
        return packs

    count = max(multiple, padded(-(-total // capacity), multiple))
    packs = shortened(deal(lengths, costs, count), count)
    if packs.tokens.max() <= capacity:
        return packs
    fewest = int(best_fit_decreasing(lengths, capacity).max()) + 1
    count = max(count, padded(fewest, multiple))
    dealt = shortened(deal(lengths, costs, count), count)
    fitting = shortened(_multifit(lengths, even_length(count), capacity, count), count)
    return dealt if dealt.tokens.max() <= fitting.tokens.max() else fitting


def _multifit(lengths: np.ndarray, low: int, high: int, count: int) -> np.ndarray:
    """[n] int64: packs of best-fit decreasing with the lowest capacity found in [low, high] for which it needs at most
    `count` packs, as it does for `high` (MULTIFIT, Coffman, Garey and Johnson 1978)."""
    pack_of = best_fit_decreasing(lengths, high)
    for _ in range(_SEARCHES if len(lengths) <= _MOST_SEARCHED else 0):
        middle = (low + high) // 2
        packs = best_fit_decreasing(lengths, middle)
        if packs.max() < count:
            pack_of, high = packs, middle
        else:
            low = min(middle + 1, high)
    return pack_of


def deal(lengths: np.ndarray, costs: np.ndarray, count: int) -> np.ndarray:
    """Deal documents to packs so that tokens are even and encoder costs nearly so.

    Longest first, as in the LPT rule (Graham 1969), but in rounds: a round serves the packs that the rule would serve
    before it returns to the shortest one. Within a round, whose documents are of similar length, the costliest one
    goes to the pack with the lowest cost.

    Args:
        lengths: [n] int64 tokens.
        costs: [n] int64 encoder costs.
        count: number of packs.

    Returns:
        [n] int64: the pack of each document.
    """
    order = np.lexsort((-costs, -lengths))
    length, cost = lengths[order], costs[order]
    tokens, work = np.zeros(count, np.int64), np.zeros(count, np.int64)
    dealt = np.empty(len(order), np.int64)
    start = 0
    while start < len(order):
        shortest_first = np.argsort(tokens, kind="stable")
        sorted_tokens = tokens[shortest_first]
        served = int(np.searchsorted(sorted_tokens, sorted_tokens[0] + max(1, length[start])))
        stop = min(start + served, len(order))
        to = shortest_first[: stop - start]
        to = to[np.argsort(work[to], kind="stable")]
        documents = start + np.argsort(-cost[start:stop], kind="stable")
        dealt[documents] = to
        tokens[to] += length[documents]
        work[to] += cost[documents]
        start = stop
    pack_of = np.empty(len(order), np.int64)
    pack_of[order] = dealt
    return pack_of


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing bin packing, one round per distinct length: each document, longest first, goes to the fullest
    pack that has room for it. It needs at most 11/9 of the minimum number of packs, plus 4 (Johnson 1974).

    Args:
        lengths: [n] int64 tokens, each at most `capacity`.

    Returns:
        [n] int64: the pack of each document; packs are numbered from 0 without gaps.
    """
    order = np.argsort(-lengths, kind="stable")
    pack_of = np.empty(len(order), np.int64)
    room = np.zeros(0, np.int64)
    distinct, starts = np.unique(-lengths[order], return_index=True)
    for length, documents in zip((-distinct).tolist(), np.split(order, starts[1:])):
        length = max(1, length)
        open_packs = np.flatnonzero(room >= length)
        open_packs = open_packs[np.argsort(room[open_packs], kind="stable")]
        # The fullest pack stays the fullest one while documents of this length go to it.
        to = np.repeat(open_packs, room[open_packs] // length)[: len(documents)]
        rest, each = len(documents) - len(to), capacity // length
        to = np.append(to, len(room) + np.arange(rest) // each)
        room = np.append(room, np.full(-(-rest // each), capacity))
        pack_of[documents] = to
        room -= length * np.bincount(to, minlength=len(room))
    return pack_of
