"""The data guide's tables match the code."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from megatron_anymal.cli.prepare import _parser
from megatron_anymal.config import LimitsConfig
from megatron_anymal.data.left_out import CODES
from megatron_anymal.modalities.imu_files import LONGEST_STEP, RATE_TOLERANCE, USUAL_RATES

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "data.md").read_text()


def test_codes_of_the_ledger() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \|$", GUIDE, re.MULTILINE)
    assert dict(rows) == CODES


def test_limits_and_their_defaults() -> None:
    rows = {name: value.replace(",", "") for name, value in re.findall(r"^\| `(max_\w+)` \| ([\d,]+) \|", GUIDE, re.M)}
    assert rows == {field.name: f"{field.default:.0f}" for field in dataclasses.fields(LimitsConfig)}


def test_options_exist() -> None:
    known = {option for action in _parser()._actions for option in action.option_strings}
    assert set(re.findall(r"`(--[a-z-]+)", GUIDE)) <= known


def test_numbers_of_imu_files() -> None:
    low, high = USUAL_RATES
    text = " ".join(GUIDE.split())
    assert f"between {low:g} and {high:g} Hz" in text and f"within {RATE_TOLERANCE:.0%}".replace("%", " %") in text
    assert f"more than {LONGEST_STEP} times the median" in text
