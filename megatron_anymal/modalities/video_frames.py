"""The frames of a video at given times, decoded from the key frames before them.

The frames are those that decoding from the start gives, to the bit. That rests on what a codec promises about its key
frames (`PacketTable.add`), on the timestamps of the packets, and on the decoder returning exactly the expected frames.
If any of these does not hold, everything is decoded from the start.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np

from megatron_anymal.modalities.base import MediaError
from megatron_anymal.modalities.containers import start
from megatron_anymal.modalities.libraries import library
from megatron_anymal.modalities.nal_units import begins_anew, is_disposable

# FFmpeg's own VP8 and VP9 decoders ignore the transparency of WebM; those of libvpx support it.
WITH_TRANSPARENCY = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# Codecs whose key frames reset the decoder: VP8, VP9 and AV1 by definition, the others code every frame alone. H.264
# and H.265 are examined (nal_units.py). MPEG-4 part 2 is absent because of packed B-frames in AVI, and what remains
# because its key frames have not been examined.
_RESETS = ("vp8", "vp9", "av1", "mjpeg", "prores", "png")
_EXAMINED = ("h264", "hevc")
# Packets that are decoded rather than jumped over. A decoder needs some of them anyway, to return frames in order.
_SMALL_GAP = 16


class CannotSeek(Exception):
    """The file or its decoder is not as assumed: decode from the start."""


class Decoder:
    """Decodes the packets of a stream, including transparency.

    Raises:
        MediaError: the stream has transparency and FFmpeg was built without the decoder for it.
    """

    def __init__(self, container: Any, stream: Any) -> None:
        self.container, self.stream = container, stream
        self._own: Any = None
        coder = WITH_TRANSPARENCY.get(stream.codec_context.name)
        if coder and stream.metadata.get("alpha_mode") == "1":
            av = library("av")
            try:
                self._own = av.CodecContext.create(coder, "r")
            except av.codec.codec.UnknownCodecError:
                raise MediaError(
                    f"has transparency, which only {coder} can decode, but PyAV was built without it: convert it"
                ) from None
            self._own.options = dict(stream.codec_context.options)
            self._own.extradata = stream.codec_context.extradata
            self._own.thread_count = 1

    @cached_property
    def codec(self) -> str:
        """FFmpeg's name of the format, for example "h264"."""
        return str(self.stream.codec_context.codec.canonical_name)

    @cached_property
    def header(self) -> bytes:
        """The stream's codec-specific data."""
        return bytes(self.stream.codec_context.extradata or b"")

    def rewind(self) -> None:
        """Continue at the start of the container."""
        self.container.seek(0)
        self._flush()

    def seek(self, timestamp: int) -> None:
        """Continue at the last key frame at or before a timestamp, as far as the container's index is right."""
        self.container.seek(timestamp, stream=self.stream, backward=True)
        self._flush()

    def _flush(self) -> None:
        if self._own is not None:
            self._own.flush_buffers()

    def packets(self) -> Iterator[Any]:
        """Packets from the current position on; an empty one at the end of the file."""
        yield from self.container.demux(self.stream)

    def decode(self, packet: Any) -> list[Any]:
        """The frames that a packet completes."""
        return list(packet.decode() if self._own is None else self._own.decode(packet))

    def frames(self) -> Iterator[Any]:
        """Frames from the current position on."""
        for packet in self.packets():
            yield from self.decode(packet)


@dataclass
class PacketTable:
    """The packets of a video stream in decoding order.

    Attributes:
        decoder: the stream and its decoder.
        pts: time of display, in units of the stream's time base.
        dts: time of decoding; None if unknown.
        shown: positions of the packets that are displayed: all but those that an edit list leaves out.
        entries: positions at which decoding may start.
    """

    decoder: Decoder
    pts: list[int | None] = field(default_factory=list)
    dts: list[int | None] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)

    def add(self, packet: Any) -> None:
        """Add the next packet."""
        if not packet.size:
            return
        position = len(self.pts)
        self.pts.append(packet.pts)
        self.dts.append(packet.dts)
        if not packet.is_discard:
            self.shown.append(position)
        if position == 0 or (packet.is_keyframe and self._begins_anew(packet)):
            self.entries.append(position)

    def _begins_anew(self, packet: Any) -> bool:
        codec = self.decoder.codec
        return codec in _RESETS or (codec in _EXAMINED and begins_anew(bytes(packet), codec, self.decoder.header))

    def entry_of(self, position: int) -> int:
        """The last position at which decoding may start for a packet's frame.

        Frames that are displayed before the key frame that they follow (B-frames of an open GOP) refer to the key frame
        before it as well.

        Raises:
            CannotSeek: there is none.
        """
        for entry in reversed(self.entries):
            if entry == 0 or (entry <= position and self.pts[entry] <= self.pts[position]):  # type: ignore[operator]
                return entry
        raise CannotSeek


@dataclass
class _Run:
    """Frames that are decoded without a jump."""

    # Position of the packet to start at.
    entry: int
    # Positions of the packets whose frames are wanted, in decoding order.
    wanted: list[int]


def frames_at(table: PacketTable, times: np.ndarray, rate: float) -> Iterator[tuple[list[int], Any]]:
    """For each time, the frame displayed then: the last one that does not start later.

    Args:
        times: [n] seconds from the start of the stream.
        rate: frames per second.

    Yields:
        Numbers of times, and their frame. A number may recur, if the file turns out not to be suited for jumps; the
        last frame counts.

    Raises:
        MediaError: the video ends before one of the times, or a frame is damaged.
    """
    slack = 1e-6 + 1e-3 / rate
    try:
        yield from _by_jumps(table, times, rate, slack)
    except (CannotSeek, library("av").error.FFmpegError):
        yield from _from_the_start(table.decoder, times, rate, slack)


def _by_jumps(table: PacketTable, times: np.ndarray, rate: float, slack: float) -> Iterator[tuple[list[int], Any]]:
    decoder, numbers_of = table.decoder, _numbers_by_position(table, times, slack)
    last = max(table.pts[position] for position in table.shown)  # type: ignore[type-var]
    for run in _runs(table, sorted(numbers_of)):
        for position, frame in _decoded(table, run):
            numbers = numbers_of[position]
            if frame.pts == last:
                _require_shown_at(decoder, frame, float(times[numbers].max()), rate, slack)
            yield numbers, frame


def _numbers_by_position(table: PacketTable, times: np.ndarray, slack: float) -> dict[int, list[int]]:
    """Position of a packet -> numbers of the times at which its frame is displayed."""
    stamps: list[Any] = [table.pts[position] for position in table.shown]
    if not stamps or None in table.pts or len(set(stamps)) < len(stamps):
        raise CannotSeek
    # AVI, for example, states no times of display: those that ascend although pictures are reordered are guesses.
    if table.decoder.stream.codec_context.has_b_frames and stamps == sorted(stamps):
        raise CannotSeek
    order = np.argsort(stamps, kind="stable")
    begin, time_base = start(table.decoder.stream), float(table.decoder.stream.time_base)
    seconds = np.array(stamps, dtype=np.float64)[order] * time_base - begin
    # Before the first frame, the first one.
    indices = np.maximum(np.searchsorted(seconds, times + slack, side="right") - 1, 0)
    numbers_of: dict[int, list[int]] = {}
    for number, index in enumerate(indices):
        numbers_of.setdefault(table.shown[order[index]], []).append(number)
    return numbers_of


def _runs(table: PacketTable, wanted: list[int]) -> list[_Run]:
    runs: list[_Run] = []
    for position in wanted:
        entry = table.entry_of(position)
        if runs and entry <= runs[-1].wanted[-1] + _SMALL_GAP:
            runs[-1].wanted.append(position)
        else:
            runs.append(_Run(entry, [position]))
    return runs


def _decoded(table: PacketTable, run: _Run) -> Iterator[tuple[int, Any]]:
    """The wanted frames of a run, each with the position of its packet, in order of display.

    Raises:
        CannotSeek: the packets or frames are not the expected ones, or one of them is damaged.
    """
    position_of: dict[Any, int] = {table.pts[position]: position for position in run.wanted}
    # The next one last.
    pending = sorted(position_of, reverse=True)
    for frame in _frames_from(table, run):
        if frame.pts is None or frame.is_corrupt or frame.pts > pending[-1]:
            raise CannotSeek
        if frame.pts == pending[-1]:
            yield position_of[pending.pop()], frame
            if not pending:
                return
    raise CannotSeek


def _frames_from(table: PacketTable, run: _Run) -> Iterator[Any]:
    """Decode from the key frame of a run on, without pictures that are neither wanted nor referred to."""
    decoder, wanted = table.decoder, set(run.wanted)
    position, packets = _jump(table, run.entry)
    first, begun = table.pts[position], position == 0
    for packet in packets:
        if packet.size:
            if position == len(table.pts) or packet.pts != table.pts[position]:
                raise CannotSeek
            unwanted = decoder.codec == "h264" and position not in wanted
            position += 1
            if unwanted and is_disposable(bytes(packet), decoder.header):
                continue
        for frame in decoder.decode(packet):
            # Frames that are displayed before the key frame lack what they refer to.
            if not begun and frame.pts is not None and frame.pts < first:
                continue
            if not begun and not (frame.pts == first and frame.key_frame):
                raise CannotSeek
            begun = True
            yield frame


def _jump(table: PacketTable, entry: int) -> tuple[int, Iterator[Any]]:
    """Seek to an entry, or an earlier one: the position reached, and the packets from there on.

    Raises:
        CannotSeek: the container's index leads elsewhere.
    """
    decoder = table.decoder
    if entry == 0:
        decoder.rewind()
        return 0, decoder.packets()
    # Some containers are indexed by time of display, others by time of decoding.
    for timestamp in (table.pts[entry], table.dts[entry]):
        if timestamp is not None:
            decoder.seek(timestamp)
            packets = decoder.packets()
            packet = next(packets, None)
            position = table.pts.index(packet.pts) if packet is not None and packet.pts in table.pts else -1
            if position in table.entries and position <= entry:
                return position, chain([packet], packets)
    raise CannotSeek


def _require_shown_at(decoder: Decoder, frame: Any, time: float, rate: float, slack: float) -> None:
    """Check that the last frame of a stream is still displayed at a time.

    Raises:
        MediaError: the video ends before.
    """
    # It may have a long duration, which the container states.
    lasts = max(float((frame.duration or 0) * decoder.stream.time_base), 1.5 / rate)
    end = frame.time - start(decoder.stream) + lasts
    if time > end + slack:
        raise MediaError(f"ends at {end:.2f} s although a frame at {time:.2f} s is expected: it is cut off")


def _from_the_start(decoder: Decoder, times: np.ndarray, rate: float, slack: float) -> Iterator[tuple[list[int], Any]]:
    """`frames_at` without jumps. Only the current and the next frame are kept in memory."""
    begin = start(decoder.stream)
    decoder.rewind()
    frames = decoder.frames()

    def following() -> tuple[Any, float]:
        frame = next(frames, None)
        if frame is not None and frame.time is None:
            raise MediaError("has frames without timestamps")
        return frame, 0.0 if frame is None else frame.time - begin

    shown, (coming, seconds) = None, following()
    # Spread clips may overlap, so frames are decoded in the order of time, not clip by clip.
    for number in np.argsort(times, kind="stable"):
        while coming is not None and (shown is None or seconds <= times[number] + slack):
            # A damaged frame also spoils the frames predicted from it, which are not marked as corrupt.
            if coming.is_corrupt:
                raise MediaError(f"is damaged at {seconds:.2f} s")
            shown, (coming, seconds) = coming, following()
        if shown is None:
            raise MediaError("has no frame that can be decoded")
        if coming is None:
            _require_shown_at(decoder, shown, float(times[number]), rate, slack)
        yield [int(number)], shown
