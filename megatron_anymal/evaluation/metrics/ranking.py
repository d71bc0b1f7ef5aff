"""Area under the ROC curve."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def auroc(scores: Sequence[float], labels: Sequence[int]) -> float:
    """Probability that a positive sample scores above a negative one, ties counting half (Mann-Whitney's U).

    Returns:
        NaN if there are no samples of one of the classes.
    """
    values, positive = np.asarray(scores, dtype=np.float64), np.asarray(labels) == 1
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return float("nan")
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    # Mean rank of each group of ties, counted from 1.
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[group]
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))
