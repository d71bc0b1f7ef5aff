"""Media in requests: base64 in content parts, converted to the parts and files that prompts are made of.

A part is OpenAI's `image_url` or `input_audio`, vLLM's `video_url` or `audio_url`, or `input_KIND` for any modality of
the model. Nothing is fetched: an address must be a `data:` URL.
"""

from __future__ import annotations

import base64
import binascii
import mimetypes
from collections.abc import Collection, Mapping
from typing import Any

from megatron_anymal.data.prompt_encoder import MediaFile
from megatron_anymal.serving.errors import invalid

# Types that `mimetypes` does not know on every system.
_EXTENSIONS = {
    "image/webp": "webp",
    "audio/wav": "wav",
    "audio/x-wav": "wav",
    "audio/flac": "flac",
    "audio/x-flac": "flac",
    "audio/mp3": "mp3",
    "audio/mpeg": "mp3",
    "audio/ogg": "ogg",
    "video/x-matroska": "mkv",
    "text/csv": "csv",
}
_URL, _INPUT = "_url", "input_"
# Settings of OpenAI's `image_url` with the values that have no effect here.
_DETAIL = (None, "auto")


def read_media_part(
    part: Mapping[str, Any], kind_of_part: str, kinds: Collection[str], at: str
) -> tuple[dict[str, Any], MediaFile]:
    """Convert a media part.

    Args:
        part: with `type` and the object that it names.
        kind_of_part: its `type`.
        kinds: kinds of media of the model.
        at: the part's position in the request.

    Returns:
        The part as in a conversation of a data set, and the file's content.

    Raises:
        RequestError: the part is malformed, names a file elsewhere, or the model has no such modality.
    """
    kind = kind_of_part.removesuffix(_URL) if kind_of_part.endswith(_URL) else kind_of_part.removeprefix(_INPUT)
    if kind == kind_of_part:
        raise invalid(f"{at}.type", f"unknown type {kind_of_part!r}; known: text, {', '.join(types_of(kinds))}.")
    if kind not in kinds:
        raise invalid(
            f"{at}.type", f"the model does not take {kind!r}; it takes: {', '.join(sorted(kinds)) or 'text only'}."
        )
    given = part.get(kind_of_part)
    if not isinstance(given, Mapping) or set(part) != {"type", kind_of_part}:
        raise invalid(at, f"a part of the type {kind_of_part} has `type` and the object `{kind_of_part}`.")
    field = f"{at}.{kind_of_part}"
    if kind_of_part.endswith(_URL):
        return {"media": field, "modality": kind}, _from_url(given, f"{field}.url")
    file, attributes = _from_data(given, field)
    return {"media": field, "modality": kind, **attributes}, file


def types_of(kinds: Collection[str]) -> list[str]:
    """Types of content parts that a model with these kinds of media takes, besides text."""
    with_url = [f"{kind}{_URL}" for kind in ("image", "audio", "video") if kind in kinds]
    return with_url + [f"{_INPUT}{kind}" for kind in sorted(kinds)]


def _from_url(given: Mapping[str, Any], field: str) -> MediaFile:
    url = given.get("url")
    if unknown := sorted(set(given) - {"url", "detail"}):
        raise invalid(f"{field.removesuffix('url')}{unknown[0]}", "unknown field.")
    if given.get("detail") not in _DETAIL:
        raise invalid(f"{field.removesuffix('url')}detail", "only 'auto' is supported: the model has one resolution.")
    if not isinstance(url, str) or not url:
        raise invalid(field, "must be a string, a `data:` URL.")
    if not url.startswith("data:"):
        if "://" in url[:40]:
            raise invalid(field, "this server does not fetch addresses. Send the file as a `data:` URL.")
        return MediaFile(_decoded(url, field), "")
    head, comma, data = url[len("data:") :].partition(",")
    mime, *settings = head.split(";")
    if not comma or "base64" not in settings:
        raise invalid(field, "a `data:` URL has the form data:TYPE;base64,DATA.")
    return MediaFile(_decoded(data, field), _extension(mime))


def _from_data(given: Mapping[str, Any], field: str) -> tuple[MediaFile, dict[str, Any]]:
    """A file in `data` of the type `format`; other fields are attributes of the item, such as `rate`."""
    data, extension = given.get("data"), given.get("format", "")
    if not isinstance(data, str) or not data:
        raise invalid(f"{field}.data", "must be a string, the file in base64.")
    if not isinstance(extension, str):
        raise invalid(f"{field}.format", "must be a string, the file's extension such as wav.")
    attributes = {name: value for name, value in given.items() if name not in ("data", "format")}
    if reserved := sorted({"media", "modality", "text", "loss"} & set(attributes)):
        raise invalid(f"{field}.{reserved[0]}", "unknown field.")
    return MediaFile(_decoded(data, f"{field}.data"), extension.lower().lstrip(".")), attributes


def _decoded(data: str, field: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(field, f"not base64 ({error}).") from None


def _extension(mime: str) -> str:
    """Extension for a media type; empty if unknown, in which case the file's content decides."""
    known = _EXTENSIONS.get(mime.strip().lower()) or mimetypes.guess_extension(mime.strip()) or ""
    return known.lstrip(".")
