"""A JSON array is read element by element, with the values of Python's parser, and strictly."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from megatron_anymal.config import LimitsConfig
from megatron_anymal.data.json_array import read_objects
from megatron_anymal.data.records import DataError

# Windows of 4 x 128 characters, so that elements lie across their borders.
LIMITS = LimitsConfig(max_text_bytes=128)


def elements(path: Path, data: str | bytes, limits: LimitsConfig = LIMITS) -> list[tuple[str, int, dict[str, Any]]]:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return list(read_objects(path, limits))


@pytest.mark.parametrize("indent", [None, 0, 3])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_the_same_values_as_json_loads(indent: int | None, bom: bytes, tmp_path: Path) -> None:
    draws = random.Random(0)
    words = ["a", "\u00e4\u4e2d\U0001f600", '"[{', "\\", "]}", "\n"]
    values = [{"n": n, "w": "".join(draws.choices(words, k=draws.randrange(4)))} for n in range(200)]
    path = tmp_path / "a.json"
    for ascii_only in (True, False):
        text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
        objects = elements(path, bom + f" {text}\n".encode())
        assert [value for _, _, value in objects] == values
    assert [number for _, number, _ in objects] == list(range(1, 201)) and objects[7][0] == f"{path}[7]"
    assert elements(path, "[]") == [] == elements(path, " [ \n ] ")


@pytest.mark.parametrize(
    ("data", "fragments"),
    [
        ('{"a": 1}', ["must be a JSON array", '{"a": 1}']),
        ("", ["must be a JSON array"]),
        ('[{"a": 1}, {"a": 2},]', ["a comma follows the last element, 1"]),
        ('[{"a": 1} {"a": 2}]', ["after element 0", '{"a": 2}']),
        ('[{"a": 1}, {"a": 2}', ["after element 1", "end of the file"]),
        ('[{"a": 1}, {"a": ', ["[1]: not JSON"]),
        ('[{"a": 1}] x', ["text follows the end", "'x'"]),
        ('[{"a": 1}, 3]', ["[1]: not a JSON object"]),
        ('[{"a": 1, "a": 2}]', ["[0]", "'a' occurs twice"]),
        ('[{"a": "\\ud800"}]', ["[0]", "surrogate"]),
        ('[{"a": ' + "[" * 40 + "]" * 40 + "}]", ["[0]", "max_json_depth"]),
        ('[{"a": 1}, {"a": "' + "x" * 500 + '"}]', ["[1]", "max_text_bytes=64"]),
        ('[{"a": "' + "x" * 70 + '"}]', ["[0]", "max_text_bytes=64"]),
        (b'[{"a": "\xe4"}]', ["not UTF-8"]),
        ('[{"a": 1}]'.encode("utf-16"), ["UTF-16"]),
    ],
)
def test_other_files_are_refused_in_one_line(data: str | bytes, fragments: list[str], tmp_path: Path) -> None:
    limits = LimitsConfig(max_text_bytes=100 if "[[" in str(data) else 64)
    with pytest.raises(DataError) as error:
        elements(tmp_path / "a.json", data, limits)
    message = str(error.value)
    assert all(word in message for word in fragments) and str(tmp_path / "a.json") in message, message
    assert "\n" not in message and len(message) < 300


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path, limits = tmp_path / "a.json", LimitsConfig(max_text_bytes=4096)
    peaks = []
    for count in (1_000, 8_000):
        path.write_text(json.dumps([{"n": n, "text": "x" * 40} for n in range(count)]))
        tracemalloc.start()
        assert sum(1 for _ in read_objects(path, limits)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 50_000
