"""Columns, times and units of IMU files."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from media import npy_bytes, section

from megatron_anymal.config import LimitsConfig
from megatron_anymal.modalities import MediaError, Modality, build_modality, imu_files

NAMES = "acc_x,acc_y,acc_z,gyr_x,gyr_y,gyr_z"
RNG = np.random.default_rng(0)
VALUES = RNG.normal(size=(60, 6)).round(6)


def imu(limits: LimitsConfig | None = None, **options: Any) -> Modality:
    options = {"rate": 50.0, "piece_seconds": 2.0, **options}
    return build_modality("imu", section("imu2clip", **options), limits or LimitsConfig())


def csv_of(columns: np.ndarray, header: str = "", delimiter: str = ",") -> bytes:
    rows = [delimiter.join(repr(float(value)) for value in row) for row in columns]
    return "\n".join([header, *rows] if header else rows).encode()


def heard(data: bytes, extension: str = "csv", **attributes: Any) -> np.ndarray:
    """The signal as the model receives it, [rows, 6], with the file's rate as the model's rate."""
    return imu().load(data, extension, attributes).numpy()[0].T[: len(VALUES)]


def same(signal: np.ndarray) -> None:
    np.testing.assert_allclose(signal, VALUES, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("acc", "gyr"),
    [
        ("acc_{}", "gyr_{}"),
        ("accl_{}", "gyro_{}"),
        ("Accel.{}", "Gyro.{}"),
        ("accelerometer {}", "gyroscope {}"),
        ("linear_acceleration.{}", "angular_velocity.{}"),
        ("/imu/data.linear_acceleration.{}", "/imu/data.angular_velocity.{}"),
        ("acc{}", "gyr{}"),
        ("a{}", "g{}"),
        ("a{}", "w{}"),
        ("{}_acc", "{}_gyro"),
        ("Acc{} [m/s^2]", "Gyro{} (deg/s)"),
        ("acc_{}_g", "gyro_{}_dps"),
        ("a_RS_S_{} [m s^-2]", "w_RS_S_{} [rad s^-1]"),
        ("accelerometerAcceleration{}(G)", "gyroRotation{}(rad/s)"),
    ],
)
def test_columns_are_found_by_name_in_any_order(acc: str, gyr: str) -> None:
    upper = "Acc{}" in acc or "(G)" in acc
    axes = "XYZ" if upper else "xyz"
    names = [*(acc.format(axis) for axis in axes), *(gyr.format(axis) for axis in axes)]
    order = [3, 4, 5, 0, 1, 2]
    same(heard(csv_of(VALUES[:, order], ",".join(names[column] for column in order)), rate=50))
    # Among other columns, which are ignored.
    more = np.column_stack([np.arange(60), VALUES[:, order], VALUES[:, :1]])
    header = ",".join(["sample", *(names[column] for column in order), "temperature"])
    same(heard(csv_of(more, header), rate=50))


def test_text_beside_the_columns_is_left_out() -> None:
    rows = [",".join(["walking", *(repr(float(value)) for value in row)]) for row in VALUES]
    same(heard("\n".join([f"activity,{NAMES}", *rows]).encode(), rate=50))


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("a,b,c,d,e,f", "does not name accelerometer x, accelerometer y"),
        ("mag_x,mag_y,mag_z,gyr_x,gyr_y,gyr_z", "does not name accelerometer x"),
        ("gravity_x,gravity_y,gravity_z,gyr_x,gyr_y,gyr_z", "does not name accelerometer x"),
        ("acc_x,acc_x,acc_y,acc_z,gyr_x,gyr_y", "names accelerometer x twice"),
    ],
)
def test_other_headers_are_refused(header: str, reason: str) -> None:
    with pytest.raises(MediaError, match=rf'{reason}.*rename the columns.*{{"columns"'):
        heard(csv_of(VALUES, header), rate=50)


def test_attributes_name_the_columns() -> None:
    order = [3, 4, 5, 0, 1, 2]
    data = csv_of(VALUES[:, order], "d,e,f,a,b,c")
    same(heard(data, rate=50, columns=["a", "b", "c", "d", "e", "f"]))
    same(heard(csv_of(VALUES[:, order]), rate=50, columns=order))
    wide = np.column_stack([np.arange(60) * 20, VALUES[:, order]])
    places = [4, 5, 6, 1, 2, 3]
    same(heard(npy_bytes(wide), "npy", columns=places, time_column=0, time_unit="ms"))
    same(heard(csv_of(wide), columns=places, time_column=0, time_unit="ms"))
    for columns in (["a", "b"], [0, 1, 2, 3, 4, 4], "abcdef"):
        with pytest.raises(MediaError, match="must name six columns, accelerometer x"):
            heard(data, rate=50, columns=columns)
    with pytest.raises(MediaError, match="columns with 'q', but the header names d, e"):
        heard(data, rate=50, columns=["a", "b", "c", "d", "e", "q"])
    with pytest.raises(MediaError, match="with 7, but the file has 6 columns and no header"):
        heard(csv_of(VALUES), rate=50, columns=[0, 1, 2, 3, 4, 7])
    with pytest.raises(MediaError, match="among its channels"):
        heard(csv_of(wide), columns=[0, 1, 2, 3, 4, 5], time_column=0, time_unit="ms")


@pytest.mark.parametrize(
    ("name", "per_second"),
    [
        ("timestamp", 1),
        ("time", 1),
        ("Time (s)", 1),
        ("seconds_elapsed", 1),
        ("timestamp_ms", 1e3),
        ("timestampMs", 1e3),
        ("t_us", 1e6),
        ("time [\u00b5s]", 1e6),
        ("#timestamp [ns]", 1e9),
        ("timestamp_ns", 1e9),
    ],
)
def test_the_time_columns_name_states_its_unit(name: str, per_second: float) -> None:
    times = 1.5e9 * 1e3 + np.arange(60) * 0.02 * per_second if per_second > 1 else np.arange(60) * 0.02
    same(heard(csv_of(np.column_stack([times, VALUES]), f"{name},{NAMES}")))


def test_a_unit_that_nothing_states_is_believed_only_in_the_usual_band() -> None:
    times = np.arange(60) * 20.0
    data = csv_of(np.column_stack([times, VALUES]), f"timestamp,{NAMES}")
    with pytest.raises(
        MediaError, match=r'0\.05 Hz if its unit is s \(50 Hz in ms.*outside 5 to 5000 Hz.*"time_unit": "ms"'
    ):
        heard(data)
    same(heard(data, time_unit="ms"))
    with pytest.raises(MediaError, match=r"of 50000 Hz if its unit is as stated; no IMU"):
        heard(data, time_unit="us")
    for unit in ("minutes", 3):
        with pytest.raises(MediaError, match="it must be one of s, ms, us, ns"):
            heard(data, time_unit=unit)
    with pytest.raises(MediaError, match="time_unit='us', but the column 'timestamp_ms' is in ms"):
        heard(data.replace(b"timestamp", b"timestamp_ms", 1), time_unit="us")
    # Slow, but with a stated unit.
    slow = csv_of(np.column_stack([np.arange(60.0), VALUES]), f"time_s,{NAMES}")
    assert imu().probe(slow, "csv", {}) == (60.0, 1.0)


def test_several_time_columns_need_a_choice() -> None:
    data = csv_of(np.column_stack([np.arange(60) * 0.02, np.arange(60) * 20, VALUES]), f"time,timestamp_ms,{NAMES}")
    with pytest.raises(MediaError, match=r'several time columns \(time, timestamp_ms\).*{"time_column": "time"}'):
        heard(data)
    same(heard(data, time_column="time"))
    same(heard(data, time_column="timestamp_ms"))


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_semicolons_and_tabs_and_decimal_commas(delimiter: str) -> None:
    times = np.arange(60) * 0.02
    data = csv_of(np.column_stack([times, VALUES]), f"time,{NAMES}".replace(",", delimiter), delimiter)
    same(heard(data))
    same(heard(b"\xef\xbb\xbf" + data.replace(b".", b",").replace(b"\n", b"\r\n")))
    same(heard(csv_of(VALUES, delimiter=delimiter), rate=50))
    with pytest.raises(MediaError, match="row 1 is not 7 numbers"):
        heard(delimiter.join(["time", *NAMES.split(",")]).encode() + b"\n" + data.split(b"\n")[1] + b"\n1.000,5")


def test_other_encodings_and_lines_without_end_are_refused() -> None:
    text = csv_of(VALUES, NAMES).decode()
    with pytest.raises(MediaError, match="cannot be read as csv: it is not UTF-8"):
        heard(text.encode("utf-16"), rate=50)
    with pytest.raises(MediaError, match="a line of more than 65536 characters"):
        heard(b"1," * 100_000, rate=50)
    with pytest.raises(MediaError, match="row 0 is not 6 numbers"):
        heard(b"1_0,2,3,4,5,6\n1,2,3,4,5,6", rate=50)


def test_gaps_are_refused_with_their_row() -> None:
    times = np.arange(60) * 0.02
    times[40:] += 5.0
    data = csv_of(np.column_stack([times, VALUES]), f"time,{NAMES}")
    with pytest.raises(
        MediaError, match=r"a gap of 5\.020 s before row 40, more than 20 times its median step of 0\.02 s"
    ):
        heard(data)
    times[40:] -= 5.0 - 0.36
    assert heard(csv_of(np.column_stack([times, VALUES]), f"time,{NAMES}")).shape == (60, 6)


def test_a_rate_beside_a_time_column_must_agree() -> None:
    data = csv_of(np.column_stack([np.arange(60) * 0.02, VALUES]), f"time,{NAMES}")
    same(heard(data, rate=51))
    with pytest.raises(MediaError, match="states the sampling rate 100 Hz, but its time column gives 50 Hz"):
        heard(data, rate=100)
    with pytest.raises(MediaError, match=r"states the sampling rate 1000000\.0: .*at most 20000"):
        heard(npy_bytes(VALUES), "npy", rate=1e6)


@pytest.mark.parametrize(
    "values",
    [
        VALUES.astype(np.complex128),
        VALUES.astype(bool),
        VALUES.astype("U8"),
        np.zeros(60, dtype=[("x", "f4"), ("y", "f4")]),
        VALUES.astype("M8[s]"),
    ],
)
def test_only_real_numbers_of_npy(values: np.ndarray) -> None:
    with pytest.raises(MediaError, match=r"cannot be read as an npy array of numbers: it contains .* not real numbers"):
        heard(npy_bytes(values), "npy", rate=50)


def test_npy_of_other_types_and_orders() -> None:
    for dtype in ("<f4", ">f8", "f2"):
        np.testing.assert_allclose(heard(npy_bytes(VALUES.astype(dtype)), "npy", rate=50), VALUES, rtol=1e-3, atol=1e-3)
    same(heard(npy_bytes(np.asfortranarray(VALUES)), "npy", rate=50))
    whole = (VALUES * 100).astype(">i2")
    np.testing.assert_array_equal(heard(npy_bytes(whole), "npy", rate=50), whole)


@pytest.mark.parametrize("timed", [False, True])
def test_blocks_do_not_show(timed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    values = RNG.normal(size=(1000, 6))
    times = np.sort(RNG.uniform(0, 20, 1000))
    data = csv_of(np.column_stack([times, values]), f"time,{NAMES}") if timed else csv_of(values, NAMES)
    attributes = {} if timed else {"rate": 50}
    monkeypatch.setattr(imu_files, "LONGEST_STEP", 1e9)
    modality = imu(max_pieces=3)
    whole = modality.load(data, "csv", attributes).numpy()
    grid = np.arange(300) / 50
    at = times - times[0] if timed else np.arange(1000) / 50
    expected = np.stack([np.interp(grid, at, channel) for channel in values.T])
    np.testing.assert_allclose(np.concatenate(list(whole), axis=1), expected, rtol=1e-4, atol=1e-5)
    for block in (1, 7, 100, 999):
        monkeypatch.setattr(imu_files, "BLOCK", block)
        np.testing.assert_array_equal(modality.load(data, "csv", attributes).numpy(), whole)
        with pytest.raises(MediaError, match="row 1000 contains NaN"):
            modality.load(data + b"\n" + b"nan," * (6 if timed else 5) + b"1", "csv", attributes)


def test_limits_are_named() -> None:
    data = csv_of(VALUES, NAMES)
    with pytest.raises(MediaError, match=r"has 360 numbers \(60 x 6\), above data.limits.max_values=359; cut it or"):
        imu().probe(data, "csv", {"rate": 50}, LimitsConfig(max_values=359))
    with pytest.raises(MediaError, match="max_values=359"):
        imu(LimitsConfig(max_values=359)).load(npy_bytes(VALUES), "npy", {"rate": 50})
    with pytest.raises(
        MediaError, match=r"lasts 1\.2 s, above data.limits.max_seconds=1\.1; cut it or raise the limit"
    ):
        imu().probe(data, "csv", {"rate": 50}, LimitsConfig(max_seconds=1.1))
    # No memory is reserved for a size that the header only claims.
    with pytest.raises(MediaError, match=r"it states \d+ bytes of data but contains 2880"):
        imu().probe(npy_bytes(VALUES).replace(b"(60, 6), }      ", b"(60000000, 6), }"), "npy", {"rate": 50})
