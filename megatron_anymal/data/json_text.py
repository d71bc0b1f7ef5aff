"""JSON of unknown origin: what Python's parser accepts in silence, or fails on, is refused by name."""

from __future__ import annotations

import json
import re
from typing import Any

from megatron_anymal.config import LimitsConfig
from megatron_anymal.data.records import DataError

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json_text(data: bytes, where: str, limits: LimitsConfig) -> Any:
    """Parse one JSON document.

    Args:
        data: UTF-8, a byte order mark allowed.
        where: the file, line or sample, for messages.
        limits: max_text_bytes and max_json_depth.

    Raises:
        DataError: too long, nested too deeply, not UTF-8, not JSON, an object with the same key twice, a number too
            long to read, or half of a surrogate pair (which no text file can hold).
    """
    if len(data) > limits.max_text_bytes:
        raise DataError(f"{where}: {len(data)} bytes, above data.limits.max_text_bytes={limits.max_text_bytes}.")
    data = data.removeprefix(b"\xef\xbb\xbf")
    if data.count(b"[") + data.count(b"{") > limits.max_json_depth and _depth(data) > limits.max_json_depth:
        raise DataError(f"{where}: nested deeper than data.limits.max_json_depth={limits.max_json_depth}.")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}).") from None
    except UnicodeEncodeError:
        raise DataError(f"{where}: an escape such as \\ud83d is half of a surrogate pair, not a character.") from None
    # A number of more digits than Python converts is a plain ValueError.
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}).") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice in an object")
    return value


def _depth(data: bytes) -> int:
    """How deeply objects and lists are nested, brackets inside strings aside."""
    depth = deepest = 0
    for bracket in re.findall(rb"[\[\]{}]", _STRING.sub(b"", data)):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest
