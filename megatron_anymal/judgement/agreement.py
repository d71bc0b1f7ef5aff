"""Krippendorff's alpha: how far annotators agree beyond chance, also if not everyone judged everything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Optional, Union

import numpy as np

Value = Union[int, str]


def krippendorff_alpha(units: Iterable[Sequence[Value]], level: str) -> Optional[float]:
    """Krippendorff's alpha by coincidences (K. Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011).

    1 is perfect agreement, 0 that of chance; it is negative for systematic disagreement.

    Args:
        units: for each unit, the values that its annotators gave, in any order. Units with fewer than two do not count.
        level: `nominal` (equal or not), `ordinal` (order of the values) or `interval` (their difference).

    Returns:
        None if alpha is undefined: no unit has two values, or all values are the same.
    """
    pairable = [unit for unit in units if len(unit) > 1]
    domain = sorted({value for unit in pairable for value in unit}, key=lambda value: (str(type(value)), value))
    if len(domain) < 2:
        return None
    position = {value: number for number, value in enumerate(domain)}
    coincidences = np.zeros((len(domain), len(domain)))
    for unit in pairable:
        counts = np.bincount([position[value] for value in unit], minlength=len(domain)).astype(float)
        coincidences += (np.outer(counts, counts) - np.diag(counts)) / (len(unit) - 1)
    totals = coincidences.sum(axis=1)
    distance = _distance(domain, totals, level)
    expected = (np.outer(totals, totals) * distance).sum() / (totals.sum() - 1)
    return float(1 - (coincidences * distance).sum() / expected)


def _distance(domain: Sequence[Value], totals: np.ndarray, level: str) -> np.ndarray:
    """Squared difference of each pair of values, [values, values].

    Args:
        totals: how often each value occurs, [values].
    """
    if level == "nominal":
        return 1.0 - np.eye(len(domain))
    if level == "interval":
        values = np.array(domain, dtype=float)
        return (values[:, None] - values) ** 2
    # Ordinal: the number of values between two, half of both ends included.
    middles = np.cumsum(totals) - totals / 2
    return (middles[:, None] - middles) ** 2
