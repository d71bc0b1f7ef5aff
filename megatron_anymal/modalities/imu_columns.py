"""Identification of the columns of an IMU file, by header names or by attributes of the sample."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_anymal.modalities.base import MediaError

# The model's channels.
CHANNELS = (
    "accelerometer x",
    "accelerometer y",
    "accelerometer z",
    "gyroscope x",
    "gyroscope y",
    "gyroscope z",
)
SECONDS_OF = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}

_ACCELEROMETER = "linear_?acceleration|accelerometer|acceleration|accel|accl|acce|acc"
_GYROSCOPE = "angular_?velocity|angular_?rate|rotation_?rate|gyro_?rotation|gyroscope|gyro|gyr|omega"
_UNIT = r"(?:_(?:g|mg|m?_?s_?2|mps2|m_s_?2|mss|dps|mdps|deg_?s|degps|rad_?s|radps|raw|axis))?"
# "acc_x", "imu0_linear_acceleration_x", "gx"; EuRoC's frame tag "a_RS_S_x". Gravity is not an accelerometer reading.
_AXIS_LAST = re.compile(
    rf"(?:(?!.*gravity).*_)?(?:(?P<acc>{_ACCELEROMETER}|a)|(?:{_GYROSCOPE}|g|w))(?:_rs_s|_axis|_raw)?_?(?P<axis>[xyz]){_UNIT}"
)
# "x_acc", "y_axis_gyro".
_AXIS_FIRST = re.compile(rf"(?:.*_)?(?P<axis>[xyz])(?:_axis)?_?(?:(?P<acc>{_ACCELEROMETER})|(?:{_GYROSCOPE})){_UNIT}")
_TIME_UNITS = {
    "s": "s|sec|secs|second|seconds",
    "ms": "ms|msec|msecs|millis|millisecond|milliseconds",
    "us": "us|usec|usecs|micros|microsecond|microseconds",
    "ns": "ns|nsec|nsecs|nanos|nanosecond|nanoseconds",
}
_ANY_TIME_UNIT = "|".join(_TIME_UNITS.values())
_TIME = re.compile(
    rf"(?:(?:imu|sensor|device|sample|elapsed|relative|unix|epoch|utc)_)*(?:time_?stamps?|times?|ts|t)"
    rf"(?:_(?P<unit>{_ANY_TIME_UNIT}))?(?:_elapsed)?|(?P<alone>{_ANY_TIME_UNIT})(?:_elapsed)?"
)
_BRACKETS = re.compile(r"[\[(]([^\])]*)[\])]")


@dataclass(frozen=True)
class Columns:
    """Column indices of the six channels, in the order of `CHANNELS`, and of the times."""

    # Column of each channel.
    channels: tuple[int, ...]
    # Column of the times; None if there is none.
    time: int | None
    # "s", "ms", "us" or "ns"; empty if it is not stated.
    time_unit: str


def columns_of(header: Sequence[str], width: int, attributes: Mapping[str, Any]) -> Columns:
    """Identify the columns of a file.

    Args:
        header: column names; empty without a header.
        width: number of columns.
        attributes: may contain "columns" (six names or indices: accelerometer x, y, z, gyroscope x, y, z),
            "time_column" (a name or an index) and "time_unit".

    Raises:
        MediaError: the header does not name each channel exactly once, or the attributes do not match the file.
    """
    unit = attributes.get("time_unit", "")
    if unit not in ("", *SECONDS_OF):
        raise MediaError(f"has the attribute time_unit={unit!r}: it must be one of {', '.join(SECONDS_OF)}")
    time, named_unit = _time_column(header, width, attributes)
    if unit and named_unit and unit != named_unit:
        raise MediaError(
            f"has the attribute time_unit={unit!r}, but the column {header[time or 0]!r} is in {named_unit}"
        )
    stated = attributes.get("columns")
    if stated is not None:
        if not isinstance(stated, (list, tuple)) or len(stated) != len(CHANNELS) or len(set(map(str, stated))) < 6:
            raise MediaError(f"has the attribute columns={stated!r}: it must name six columns, {', '.join(CHANNELS)}")
        channels = tuple(_column_index("columns", one, header, width) for one in stated)
    elif header:
        channels = _channels_by_name(header, time)
    elif width != len(CHANNELS):
        raise MediaError(
            f"has rows of {width} numbers, not {len(CHANNELS)}, and no header that names them; give the column indices "
            'with {"columns": [...]}, counted from 0'
        )
    else:
        channels = tuple(range(len(CHANNELS)))
    if time in channels:
        raise MediaError(f"has the time column {time} among its channels {list(channels)}")
    return Columns(channels, time, unit or named_unit)


def _column_index(attribute: str, column: Any, header: Sequence[str], width: int) -> int:
    """Index of a column that an attribute gives by name or by index."""
    if isinstance(column, str) and column in header:
        return header.index(column)
    if isinstance(column, int) and not isinstance(column, bool) and 0 <= column < width:
        return column
    known = f"the header names {', '.join(header)}" if header else f"the file has {width} columns and no header"
    raise MediaError(f"has the attribute {attribute} with {column!r}, but {known}")


def _plain(name: str) -> tuple[str, str]:
    """Split a column name into its normalised form (lower case, single underscores) and its bracketed text."""
    name = name.replace("\u00b5", "u").replace("\u03bc", "u")
    bracketed = _BRACKETS.search(name)
    name = _BRACKETS.sub("", name).strip()
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    return re.sub(r"[^a-z0-9]+", "_", name).strip("_"), bracketed.group(1).strip().lower() if bracketed else ""


def _time_column(header: Sequence[str], width: int, attributes: Mapping[str, Any]) -> tuple[int | None, str]:
    """Index of the time column, and the unit in its name."""
    candidates = [index for index, name in enumerate(header) if _TIME.fullmatch(_plain(name)[0])]
    stated = attributes.get("time_column")
    if stated is not None:
        candidates = [_column_index("time_column", stated, header, width)]
    if len(candidates) > 1:
        raise MediaError(
            f"has several time columns ({', '.join(header[index] for index in candidates)}): choose one with "
            f'{{"time_column": "{header[candidates[0]]}"}}'
        )
    if not candidates:
        return None, ""
    if not header:
        return candidates[0], ""
    plain, bracketed = _plain(header[candidates[0]])
    match = _TIME.fullmatch(plain)
    word = bracketed or (match and (match["unit"] or match["alone"])) or ""
    unit = next((unit for unit, words in _TIME_UNITS.items() if word in words.split("|")), "")
    return candidates[0], unit


def _channels_by_name(header: Sequence[str], time: int | None) -> tuple[int, ...]:
    columns: dict[int, list[int]] = {}
    for index, name in enumerate(header):
        plain, _ = _plain(name)
        match = _AXIS_LAST.fullmatch(plain) or _AXIS_FIRST.fullmatch(plain)
        if match and index != time:
            channel = "xyz".index(match["axis"]) + (0 if match["acc"] else 3)
            columns.setdefault(channel, []).append(index)
    twice = [channel for channel, indices in columns.items() if len(indices) > 1]
    missing = [name for channel, name in enumerate(CHANNELS) if channel not in columns]
    if twice or missing:
        what = f"names {CHANNELS[twice[0]]} twice" if twice else f"does not name {', '.join(missing)}"
        raise MediaError(
            f"has a header that {what} ({', '.join(header)[:120]}): rename the columns, for example acc_x and gyro_x, "
            'or name the six columns of accelerometer and gyroscope with {"columns": [...]}'
        )
    return tuple(columns[channel][0] for channel in range(len(CHANNELS)))
