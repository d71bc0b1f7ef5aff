"""IMU signals against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from media import npy_bytes, section

from megatron_anymal.config import ConfigError
from megatron_anymal.modalities import MediaError, Modality, build_modality


def imu(**options: Any) -> Modality:
    return build_modality("imu", section("imu2clip", **options))


def signal(rows: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, 6))


def csv_bytes(values: np.ndarray, header: str = "") -> bytes:
    lines = [header] if header else []
    return "\n".join(lines + [",".join(repr(float(v)) for v in row) for row in values]).encode()


def test_same_rate_is_cut_and_zero_padded() -> None:
    values = signal(1300)
    modality = imu()
    assert modality.probe(npy_bytes(values), "npy", {"rate": 200}) == (6.5, 200.0)
    pieces = modality.load(npy_bytes(values), "npy", {"rate": 200})
    assert pieces.shape == (2, 6, 1000) and pieces.dtype == torch.float32
    np.testing.assert_allclose(pieces[0].numpy(), values[:1000].T, rtol=1e-6)
    np.testing.assert_allclose(pieces[1, :, :300].numpy(), values[1000:].T, rtol=1e-6)
    assert not pieces[1, :, 300:].any()


def test_edge_padding_and_normalisation() -> None:
    values = signal(100)
    mean, std = values.mean(0), values.std(0)
    pieces = imu(padding="edge", mean=mean.tolist(), std=std.tolist()).load(npy_bytes(values), "npy", {"rate": 200})
    normal = (values - mean) / std
    np.testing.assert_allclose(pieces[0, :, :100].numpy(), normal.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pieces[0, :, 100:].numpy(), np.repeat(normal[-1:].T, 900, axis=1), rtol=1e-5)


def test_linear_resampling() -> None:
    values = signal(50)
    pieces = imu(rate=100, piece_seconds=1).load(npy_bytes(values), "npy", {"rate": 50})
    at = np.arange(100) / 100
    expected = [np.interp(at, np.arange(50) / 50, channel) for channel in values.T]
    np.testing.assert_allclose(pieces[0].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_csv_with_and_without_header() -> None:
    values = signal(30)
    expected = imu().load(npy_bytes(values), "npy", {"rate": 10})
    assert torch.equal(imu().load(csv_bytes(values), "csv", {"rate": 10}), expected)
    assert torch.equal(imu().load(csv_bytes(values, "ax,ay,az,gx,gy,gz"), "csv", {"rate": 10}), expected)


@pytest.mark.parametrize("name", ["time", "Timestamp"])
def test_a_time_column_gives_the_rate(name: str) -> None:
    values = signal(30)
    times = 1000.0 + np.arange(30) / 10
    data = csv_bytes(np.column_stack([values[:, :3], times, values[:, 3:]]), f"ax,ay,az,{name},gx,gy,gz")
    assert imu().probe(data, "csv", {}) == (pytest.approx(3.0), pytest.approx(10.0))
    expected = imu().load(npy_bytes(values), "npy", {"rate": 10})
    torch.testing.assert_close(imu().load(data, "csv", {}), expected, rtol=1e-4, atol=1e-4)


def test_uneven_times_are_honoured() -> None:
    times = np.array([0.0, 0.1, 0.5, 1.0])
    values = np.repeat(times[:, None], 6, axis=1)
    data = csv_bytes(np.column_stack([times, values]), "time_s,ax,ay,az,gx,gy,gz")
    pieces = imu(rate=10, piece_seconds=1).load(data, "csv", {})
    np.testing.assert_allclose(pieces[0, 0].numpy(), np.arange(10) / 10, atol=1e-6)


def test_count_and_load_agree() -> None:
    modality = imu(rate=50, piece_seconds=2, max_pieces=3)
    for rows, rate in [(1, 10), (19, 10), (20, 10), (21, 10), (200, 33.3), (66, 33.0), (67, 33.0), (1000, 10)]:
        data = npy_bytes(signal(rows))
        size = modality.probe(data, "npy", {"rate": rate})
        count = modality.count_pieces(np.array([size, size]))
        assert count.dtype == np.int64 and count.shape == (2,)
        assert len(modality.load(data, "npy", {"rate": rate})) == count[0]
    assert modality.count_pieces(np.array([[2.0, 10.0], [2.1, 10.0], [99.0, 10.0]])).tolist() == [1, 2, 3]


def bad(row: int, value: float) -> np.ndarray:
    values = signal(20)
    values[row, 3] = value
    return values


@pytest.mark.parametrize(
    ("data", "extension", "attributes", "reason"),
    [
        (b"", "npy", {"rate": 10}, "empty"),
        (b"\x93NUMPY broken", "npy", {"rate": 10}, "cannot be read as an npy"),
        (npy_bytes(signal(20))[:-100], "npy", {"rate": 10}, "cannot be read as an npy"),
        (npy_bytes(np.array([{"a": 1}], dtype=object)), "npy", {"rate": 10}, "cannot be read as an npy"),
        (npy_bytes(signal(20).T), "npy", {"rate": 10}, r"shape \[6, 20\], not \[rows, 6\]"),
        (npy_bytes(signal(0)), "npy", {"rate": 10}, "no rows"),
        (npy_bytes(bad(7, np.nan)), "npy", {"rate": 10}, "row 7 contains NaN"),
        (npy_bytes(bad(9, np.inf)), "npy", {"rate": 10}, "row 9 contains NaN"),
        (csv_bytes(bad(7, np.nan)), "csv", {"rate": 10}, "row 7 contains NaN"),
        (npy_bytes(signal(20)), "npy", {}, r'\{"rate": 100\}'),
        (npy_bytes(signal(20)), "npy", {"rate": 0}, "rate 0"),
        (npy_bytes(signal(20)), "npy", {"rate": "fast"}, "rate 'fast'"),
        (csv_bytes(signal(20)) + b"\n1,2,x,4,5,6", "csv", {"rate": 10}, "row 20 is not 6 numbers"),
        (csv_bytes(signal(3), "ax,ay,az,gx,gy,gz") + b"\n1,2", "csv", {"rate": 10}, "row 3 is not 6 numbers"),
        (b"time,ax,ay,az,gx,gy,gz\n0,1,1,1,1,1,1\n0,1,1,1,1,1,1", "csv", {}, "row 1 is not later"),
        (csv_bytes(signal(3)[:, :5]), "csv", {"rate": 10}, "rows of 5 numbers, not 6, and no header"),
        (b"\xff\xfe\x00bad", "csv", {"rate": 10}, "cannot be read as csv"),
    ],
)
def test_bad_files_are_refused(data: bytes, extension: str, attributes: dict[str, Any], reason: str) -> None:
    with pytest.raises(MediaError, match=reason):
        imu().load(data, extension, attributes)


@pytest.mark.parametrize(
    "options", [{"rate": 0}, {"piece_seconds": -1.0}, {"padding": "wrap"}, {"mean": [0.0]}, {"std": [1, 1, 1, 1, 1, 0]}]
)
def test_impossible_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"options.{next(iter(options))}"):
        imu(**options)
