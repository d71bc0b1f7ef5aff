"""Files of several streams (MP4, MOV, WebM, MKV, AVI) and raw AAC, MP3 or FLAC, opened with PyAV."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_anymal.config import LimitsConfig
from megatron_anymal.modalities.base import MediaError, reason, require_within
from megatron_anymal.modalities.libraries import library

# FFmpeg's demuxers. No others are tried: some, such as playlists, open further files and addresses.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
# Boxes at the top of an MP4 or MOV.
BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"sidx", b"styp", b"free", b"skip", b"wide", b"uuid")
RAW_SOUND = ("aac", "mp3", "flac")
# A stream that ends this much (seconds) before its stated end is cut off; less is rounding.
CUT_OFF = 0.5
# FFmpeg states a container's duration in these.
MICROSECONDS = 1_000_000
# Decoders round a frame's sides up to whole blocks before they check its size.
BLOCK_MARGIN = 2**21


@contextmanager
def opened_container(data: bytes, kind: str, limits: LimitsConfig) -> Iterator[tuple[Any, Any]]:
    """The container and its main stream of a kind, "video" or "audio".

    Raises:
        MediaError: not such a file, or no such stream; raised also for decoding errors while the body uses it.
    """
    av = library("av")
    if not data:
        raise MediaError("is empty (0 bytes)")
    _require_whole_boxes(data)
    options = {
        "format_whitelist": CONTAINERS if kind == "video" else ",".join([CONTAINERS, *RAW_SOUND]),
        # Holds for the frame that FFmpeg decodes to learn of the stream, too.
        "max_pixels": str(limits.max_frame_pixels + BLOCK_MARGIN),
    }
    try:
        # Unreadable titles and comments do not matter.
        with av.open(io.BytesIO(data), options=options, metadata_errors="replace") as container:
            stream = container.streams.best(kind)
            if stream is None or _is_cover(stream):
                raise MediaError(f"has no {kind} stream: it is another kind of file, or cut off")
            if stream.codec_context is None:
                raise MediaError("is coded in a way that cannot be decoded here")
            stream.codec_context.options = {**stream.codec_context.options, "max_pixels": options["max_pixels"]}
            # Loader processes already use the cores.
            stream.codec_context.thread_count = 1
            yield container, stream
    except MediaError:
        raise
    # FFmpeg's errors, and what PyAV raises on fields that a damaged file lacks.
    except Exception as error:
        why = getattr(error, "strerror", None) or reason(error)
        raise MediaError(
            f"cannot be decoded as {kind}, it is damaged, cut off or of a format that is not read: {why}"
        ) from error


def _is_cover(stream: Any) -> bool:
    """Whether a video stream is the cover picture of a recording."""
    return bool(stream.disposition & type(stream.disposition).attached_pic)


def _require_whole_boxes(data: bytes) -> None:
    """Refuse an MP4 or MOV whose boxes go on behind its end; FFmpeg leaves out the frames that are not there.

    Raises:
        MediaError: cut off.
    """
    offset = 0
    while data[offset + 4 : offset + 8] in BOXES:
        size = int.from_bytes(data[offset : offset + 4], "big")
        if size == 1:
            size = int.from_bytes(data[offset + 8 : offset + 16], "big")
        if size < 8:
            # 0: to the end of the file. Other values are for FFmpeg to judge.
            return
        offset += size
        if offset > len(data):
            raise MediaError(f"has {len(data)} bytes of {offset} that its boxes state: it is cut off")


def start(stream: Any) -> float:
    """When a stream begins, in seconds."""
    return float((stream.start_time or 0) * stream.time_base)


def stream_seconds(container: Any, stream: Any, limits: LimitsConfig) -> float:
    """Seconds from a stream's start to the end of its last packet; reads all packets, decodes none.

    A header may state less than there is. Where it states more, the file is cut off.

    Raises:
        MediaError: longer than the limit, or cut off.
    """
    ends: dict[int, float] = {}
    begin = start(stream)
    for packet in container.demux():
        # Packets outside an edit list are there for the decoder and not shown.
        if packet.pts is None or packet.is_discard:
            continue
        end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
        if end > ends.get(packet.stream_index, float("-inf")):
            ends[packet.stream_index] = end
            if packet.stream_index == stream.index:
                require_duration(limits, end - begin)
    end = ends.get(stream.index, begin)
    stated, reached = _stated_end(container, stream), end
    if stream.duration is None:
        # The container's duration is that of its longest stream.
        reached = max(ends.values(), default=0.0)
    if stated - reached > CUT_OFF:
        raise MediaError(f"ends at {reached:.2f} s of {stated:.2f} s: it is cut off")
    return end - begin


def _stated_end(container: Any, stream: Any) -> float:
    """Seconds at which a stream, or without that its container, is said to end; 0 where nothing reliable is said."""
    if container.format.name in RAW_SOUND:
        # FFmpeg's own estimate, from the bit rate.
        return 0.0
    if stream.duration is not None:
        return start(stream) + float(stream.duration * stream.time_base)
    return (container.duration or 0) / MICROSECONDS


def require_duration(limits: LimitsConfig, seconds: float) -> None:
    """Refuse what is longer than the limit.

    Raises:
        MediaError: naming it.
    """
    require_within(limits, "max_seconds", seconds, f"lasts {seconds:.1f} s or more", "cut it")
