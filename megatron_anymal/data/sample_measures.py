"""Lengths, targets and encoder costs of samples, computed from the index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megatron_anymal.data.codes import NO_CODES, PlannedCodes
from megatron_anymal.data.configured_modality import PlannedModality, integer_costs
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.data.shared_prompts import shared_tokens, span_lengths


@dataclass(frozen=True)
class Measures:
    """Lengths and costs of n samples with m media items in total, from the index."""

    # [n, 2]: LLM tokens of each sample's documents; 0 if there is no second document.
    documents: np.ndarray
    # [n]: target tokens of both documents.
    targets: np.ndarray
    # [n] int64: encoder cost of the sample's media, in units of `integer_costs`.
    costs: np.ndarray
    # [m]: row of each media item's sample.
    owner: np.ndarray
    # [m]: position of each media item's modality among those of the planner, those of codes last.
    modality: np.ndarray
    # [m]: number of pieces of each media item; of codes, the number of their tokens.
    pieces: np.ndarray
    # [n]: tokens of the prompt that a pack holds once for both documents; 0 if it holds whole documents.
    shared: np.ndarray

    @property
    def length(self) -> np.ndarray:
        """[n]: LLM tokens that each sample takes in a pack."""
        return span_lengths(self.documents, self.shared).sum(axis=1)


def measure_samples(
    index: ShardIndex,
    sample: np.ndarray,
    by_kind: Mapping[str, PlannedModality],
    codes: Mapping[str, PlannedCodes] = NO_CODES,
    *,
    shared_prompts: bool = False,
) -> Measures:
    """Lengths and costs of samples of one dataset, computed without a loop over samples.

    Args:
        sample: [n] row numbers.
        by_kind: the configured modalities by their kind of media.
        codes: those of model.discrete, likewise.
        shared_prompts: packs hold the prompt of a pair once.
    """
    samples, items = index.readers
    rows = samples.take(sample)
    documents, targets = index.lengths_in(rows)
    has = documents > 0
    counts = rows["media_count"].astype(np.int64)
    owner = np.repeat(np.arange(len(sample)), counts)
    media = items.take_ranges(rows["media_start"].astype(np.int64), counts)
    costs = np.zeros(len(sample), np.int64)
    pieces, modality = np.zeros(len(media), np.int64), np.zeros(len(media), np.int64)
    cost_per_piece = integer_costs([planned.cost_per_piece for planned in by_kind.values()])
    for number, (kind, planned) in enumerate(by_kind.items()):
        if kind not in index.header.kinds:
            continue
        mine = np.flatnonzero(media["kind"] == index.header.kinds.index(kind))
        modality[mine] = number
        pieces[mine] = planned.modality.count_pieces(media["size"][mine])
        # Sums of integers, which are exact in float64.
        of_sample = np.bincount(owner[mine], pieces[mine], len(sample)).astype(np.int64)
        # Each document of a sample contains all its media, but they are encoded only once.
        documents += has * (of_sample * planned.soft_tokens_per_piece)[:, None]
        costs += of_sample * cost_per_piece[number]
    for number, (kind, of_kind) in enumerate(codes.items(), start=len(by_kind)):
        if kind not in index.header.kinds:
            continue
        mine = np.flatnonzero(media["kind"] == index.header.kinds.index(kind))
        modality[mine] = number
        pieces[mine] = of_kind.tokens(media["size"][mine, 0])
        of_sample = np.bincount(owner[mine], pieces[mine], len(sample)).astype(np.int64)[:, None]
        documents += has * np.array(of_kind.documents) * of_sample
        targets += has * np.array(of_kind.documents) * of_kind.loss * of_sample
    shared = shared_tokens(documents, targets) if shared_prompts else np.zeros(len(sample), np.int64)
    return Measures(documents, targets.sum(axis=1), costs, owner, modality, pieces, shared)
