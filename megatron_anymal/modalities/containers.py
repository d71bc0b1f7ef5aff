"""Media containers (MP4, MOV, WebM, MKV, AVI) and raw AAC, MP3 or FLAC, opened with PyAV."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron_anymal.config import LimitsConfig
from megatron_anymal.modalities.base import MediaError, reason, require_within
from megatron_anymal.modalities.libraries import library

# Allowed FFmpeg demuxers. Others are never tried: some, such as those for playlists, open further files and URLs.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
# Top-level boxes of an MP4 or MOV file.
BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"sidx", b"styp", b"free", b"skip", b"wide", b"uuid")
RAW_SOUND = ("aac", "mp3", "flac")
# A stream that ends more than this (seconds) before its stated end is truncated; smaller differences are rounding.
CUT_OFF = 0.5
# Unit of a container's duration in FFmpeg, per second.
MICROSECONDS = 1_000_000
# Decoders round the sides of a frame up to whole blocks before they check its size.
BLOCK_MARGIN = 2**21


@contextmanager
def opened_container(data: bytes, kind: str, limits: LimitsConfig) -> Iterator[tuple[Any, Any]]:
    """Open a container and its main stream of a kind, "video" or "audio".

    Raises:
        MediaError: the data is not a supported file or has no such stream. Decoding errors in the body of the `with`
            statement are converted as well.
    """
    av = library("av")
    if not data:
        raise MediaError("is empty (0 bytes)")
    _require_whole_boxes(data)
    options = {
        "format_whitelist": CONTAINERS if kind == "video" else ",".join([CONTAINERS, *RAW_SOUND]),
        # Also applies to the frame that FFmpeg decodes while probing the stream.
        "max_pixels": str(limits.max_frame_pixels + BLOCK_MARGIN),
    }
    try:
        # Undecodable titles and comments are harmless.
        with av.open(io.BytesIO(data), options=options, metadata_errors="replace") as container:
            stream = container.streams.best(kind)
            if stream is None or _is_cover(stream):
                raise MediaError(f"has no {kind} stream: it is another kind of file, or cut off")
            if stream.codec_context is None:
                raise MediaError("uses a codec that cannot be decoded here")
            stream.codec_context.options = {**stream.codec_context.options, "max_pixels": options["max_pixels"]}
            # The loader processes already use all cores.
            stream.codec_context.thread_count = 1
            yield container, stream
    except MediaError:
        raise
    # Errors of FFmpeg, and exceptions of PyAV about fields that are missing in a damaged file.
    except Exception as error:
        why = getattr(error, "strerror", None) or reason(error)
        raise MediaError(
            f"cannot be decoded as {kind}: it is damaged, cut off or in an unsupported format ({why})"
        ) from error


def _is_cover(stream: Any) -> bool:
    """Whether a video stream is the cover image of an audio file."""
    return bool(stream.disposition & type(stream.disposition).attached_pic)


def _require_whole_boxes(data: bytes) -> None:
    """Refuse an MP4 or MOV whose boxes extend past the end of the file; FFmpeg would silently skip missing frames.

    Raises:
        MediaError: the file is truncated.
    """
    offset = 0
    while data[offset + 4 : offset + 8] in BOXES:
        size = int.from_bytes(data[offset : offset + 4], "big")
        if size == 1:
            size = int.from_bytes(data[offset + 8 : offset + 16], "big")
        if size < 8:
            # 0: extends to the end of the file. Other values are left to FFmpeg.
            return
        offset += size
        if offset > len(data):
            raise MediaError(f"has {len(data)} bytes of the {offset} stated by its boxes: it is cut off")


def start(stream: Any) -> float:
    """Start time of a stream in seconds."""
    return float((stream.start_time or 0) * stream.time_base)


def stream_seconds(
    container: Any, stream: Any, limits: LimitsConfig, each: Callable[[Any], None] | None = None
) -> float:
    """Seconds from the start of a stream to the end of its last packet; reads all packets without decoding.

    A header may state less than the actual duration. If it states more, the file is truncated.

    Args:
        each: called with each packet of the stream, those outside the edit list included.

    Raises:
        MediaError: the stream is longer than the limit, or truncated.
    """
    # End of each stream so far, in its time base: integers, as fractions for each packet take longer than reading it.
    ends: dict[int, int] = {}
    bases: dict[int, Any] = {}

    def seconds(number: int) -> float:
        return ends[number] * bases[number].numerator / bases[number].denominator

    begin = start(stream)
    for packet in container.demux():
        number = packet.stream_index
        if each is not None and number == stream.index:
            each(packet)
        # Packets outside the edit list are needed by the decoder but not displayed.
        if packet.pts is None or packet.is_discard:
            continue
        end = packet.pts + (packet.duration or 0)
        if number not in bases:
            ends[number], bases[number] = end, packet.time_base
        ends[number] = max(ends[number], end)
        if number == stream.index:
            require_duration(limits, seconds(number) - begin)
    end = seconds(stream.index) if stream.index in ends else begin
    stated, reached = _stated_end(container, stream), end
    if stream.duration is None:
        # The duration of the container is that of its longest stream.
        reached = max(map(seconds, ends), default=0.0)
    if stated - reached > CUT_OFF:
        raise MediaError(f"ends at {reached:.2f} s of {stated:.2f} s: it is cut off")
    return end - begin


def _stated_end(container: Any, stream: Any) -> float:
    """Stated end in seconds of a stream, or else of its container; 0 without a reliable value."""
    if container.format.name in RAW_SOUND:
        # The duration is only FFmpeg's estimate from the bit rate.
        return 0.0
    if stream.duration is not None:
        return start(stream) + float(stream.duration * stream.time_base)
    return (container.duration or 0) / MICROSECONDS


def require_duration(limits: LimitsConfig, seconds: float) -> None:
    """Refuse a duration above the limit.

    Raises:
        MediaError: naming the limit.
    """
    require_within(limits, "max_seconds", seconds, f"lasts {seconds:.1f} s or more", "cut it")
