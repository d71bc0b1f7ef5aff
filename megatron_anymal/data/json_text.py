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
    _require_shallow(data, where, limits)
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}).") from None
    # ValueError instead of JSONDecodeError: Python raises it for numbers with too many digits.
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}).") from None
    _require_characters(value, data, where)
    return value


def parse_next(text: str, start: int, where: str, limits: LimitsConfig) -> tuple[Any, int]:
    """Parse the JSON value that begins at a position of a longer text.

    Args:
        text: holds at least `limits.max_text_bytes` characters from `start`, or ends with the file.
        start: position of the value's first character.
        where: as for `parse_json_text`.
        limits: likewise.

    Returns:
        the value, and the position behind it.

    Raises:
        DataError: as `parse_json_text`.
    """
    try:
        value, end = _DECODER.raw_decode(text, start)
    except RecursionError:
        raise DataError(f"{where}: nested deeper than data.limits.max_json_depth={limits.max_json_depth}.") from None
    except ValueError as error:
        # The position in the text would mislead: it is not that in the file.
        why = getattr(error, "msg", error)
        if len(text) - start > limits.max_text_bytes:
            why = f"{why}; an element may have at most data.limits.max_text_bytes={limits.max_text_bytes} bytes"
        raise DataError(f"{where}: not JSON ({why}).") from None
    data = text[start:end].encode("utf-8", "surrogatepass")
    if len(data) > limits.max_text_bytes:
        raise DataError(f"{where}: {len(data)} bytes, above data.limits.max_text_bytes={limits.max_text_bytes}.")
    _require_shallow(data, where, limits)
    _require_characters(value, data, where)
    return value, end


def _require_shallow(data: bytes, where: str, limits: LimitsConfig) -> None:
    if data.count(b"[") + data.count(b"{") > limits.max_json_depth and _depth(data) > limits.max_json_depth:
        raise DataError(f"{where}: nested deeper than data.limits.max_json_depth={limits.max_json_depth}.")


def _require_characters(value: Any, data: bytes, where: str) -> None:
    """Refuse half of a surrogate pair, which cannot be encoded as UTF-8."""
    if _SURROGATE.search(data):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            message = "an escape such as \\ud83d is half of a surrogate pair, not a character."
            raise DataError(f"{where}: {message}") from None


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


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
