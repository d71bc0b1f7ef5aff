"""Strict parsing of untrusted JSON: rejects input that Python's parser silently accepts or crashes on."""

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
        data: UTF-8, optionally with a byte order mark.
        where: the file, line or sample, for error messages.
        limits: max_text_bytes and max_json_depth apply.

    Raises:
        DataError: the text is too long, nested too deeply, not UTF-8 or not JSON, or contains a duplicate key, a number
            with too many digits, or half of a surrogate pair (which cannot be encoded as UTF-8).
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
    # ValueError instead of JSONDecodeError: Python raises it for numbers with too many digits.
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
    """Nesting depth of objects and lists, ignoring brackets in strings."""
    depth = deepest = 0
    for bracket in re.findall(rb"[\[\]{}]", _STRING.sub(b"", data)):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest
