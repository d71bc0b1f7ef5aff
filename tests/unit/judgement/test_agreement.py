"""Krippendorff's alpha against the package of that name and against his published example."""

from __future__ import annotations

import krippendorff
import numpy as np
import pytest

from megatron_anymal.judgement.agreement import krippendorff_alpha

# "Computing Krippendorff's Alpha-Reliability" (2011), section C: four observers, twelve units, 0 for missing values.
PUBLISHED = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
    [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
]
# His results, to three digits.
RESULTS = {"nominal": 0.743, "ordinal": 0.815, "interval": 0.849}


def units_of(observers: list[list[float]]) -> list[list[int]]:
    return [[int(value) for value in column if not np.isnan(value)] for column in zip(*observers)]


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
@pytest.mark.parametrize("seed", range(6))
def test_alpha_is_that_of_the_reference(level: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 4, 40)
    data = np.where(rng.random((5, 40)) < 0.6, truth, rng.integers(0, 4, (5, 40))).astype(float)
    data[rng.random((5, 40)) < 0.35] = np.nan
    expected = krippendorff.alpha(reliability_data=data, level_of_measurement=level)
    assert krippendorff_alpha(units_of(data.tolist()), level) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("level", RESULTS)
def test_alpha_of_the_published_example(level: str) -> None:
    units = [[value for value in unit if value] for unit in zip(*PUBLISHED)]
    assert krippendorff_alpha(units, level) == pytest.approx(RESULTS[level], abs=5e-4)


def test_words_are_nominal() -> None:
    numbers = [[0, 1], [0, 0, 1], [2, 2], [1, 1, 0], [2]]
    words = [[("a", "b", "tie")[value] for value in unit] for unit in numbers]
    assert krippendorff_alpha(words, "nominal") == krippendorff_alpha(numbers, "nominal") is not None


def test_alpha_without_chance_or_pairs_is_undefined() -> None:
    assert krippendorff_alpha([[1], [2]], "nominal") is None
    assert krippendorff_alpha([[2, 2], [2, 2, 2]], "ordinal") is None
    assert krippendorff_alpha([[0, 0], [2, 2]], "ordinal") == 1
