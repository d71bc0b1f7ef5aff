"""The samples of a step with several alignments (`model.multiplex`): a global batch of each, in the order in which it
would use them alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_anymal.config import AlignmentConfig, DatasetConfig
from megatron_anymal.data.global_order import GlobalOrder
from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_index import ShardIndex


class AlignedSamples:
    """The alignments of a run, and the samples of each at every step.

    Args:
        datasets: of all alignments.
        sizes: number of samples of each dataset.
        alignments: `model.multiplex`; those without any of the datasets have no samples.
        seed: `model.seed`, from which each alignment's order comes as if it ran alone.
        ends: whether alignments end at their `max_steps`; otherwise, as in validation, they take part in every step.
    """

    def __init__(
        self,
        datasets: Mapping[str, DatasetConfig],
        sizes: Sequence[int],
        alignments: Mapping[str, AlignmentConfig],
        seed: int,
        *,
        ends: bool,
    ):
        self.names = tuple(alignments)
        # Per alignment: its global batch, its last step (0: none), the numbers of its datasets, and their order.
        self._parts: list[tuple[int, int, np.ndarray, GlobalOrder]] = []
        # Per dataset: number of its alignment.
        self.owner = np.zeros(len(sizes), np.int64)
        for number, alignment in enumerate(alignments.values()):
            own = [position for position, name in enumerate(datasets) if name in alignment.datasets]
            self.owner[own] = number
            if not own:
                continue
            weights = tuple(dataset.weight for name, dataset in datasets.items() if name in alignment.datasets)
            order = GlobalOrder(tuple(sizes[position] for position in own), weights, seed)
            last = alignment.max_steps if ends else 0
            self._parts.append((alignment.global_batch_size, last, np.array(own), order))

    def samples(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples of a step, which counts from 0, alignment by alignment.

        Returns:
            Dataset and sample within the dataset, [n] int64 each.
        """
        parts = []
        for size, last, own, order in self._parts:
            if not last or step < last:
                dataset, sample = order.samples(step * size, (step + 1) * size)
                parts.append((own[dataset], sample))
        return np.concatenate([dataset for dataset, _ in parts]), np.concatenate([sample for _, sample in parts])

    def check_media(self, indexes: Sequence[ShardIndex], modality_of: Mapping[str, str], keys: Sequence[str]) -> None:
        """Reject datasets with media that another alignment trains on: their samples would reach its weights.

        Args:
            indexes: of the datasets.
            modality_of: the modality that reads each kind of media.
            keys: of the datasets' folders in the configuration, for messages.

        Raises:
            DataError: naming the folder, the kind of media and the fix.
        """
        for index, owner, key in zip(indexes, self.owner, keys):
            name = self.names[owner]
            strange = [kind for kind in sorted(index.kinds_used()) if modality_of[kind] != name]
            if strange:
                raise DataError(
                    f"{key}: {index.folder!r} contains {strange[0]}, but model.multiplex.{name} trains on media of "
                    f"{name!r} only. Use a folder without them, or run the alignments one by one."
                )

    def identity(self) -> list[dict[str, Any]]:
        """What decides on the samples of each alignment, besides the datasets and the seed."""
        return [
            {"global_batch_size": size, "datasets": own.tolist(), "weights": order.weights}
            for size, _, own, order in self._parts
        ]
