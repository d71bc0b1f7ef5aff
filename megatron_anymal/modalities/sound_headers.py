"""Length information in the headers of audio files, checked before a library relies on it."""

from __future__ import annotations

from megatron_anymal.modalities.base import MediaError

# Programs that write to a pipe cannot update the size afterwards and write a value near 2 or 4 GiB instead: the audio
# extends to the end of the file.
STREAMED = 0x7FFF_0000
# Flags of the first and the last page of an Ogg stream.
FIRST_PAGE, LAST_PAGE = 2, 4
# Bytes that may follow the last frame of an MP3: padding, and an ID3v1 tag.
MP3_TAIL, ID3V1 = 4096, 128


def is_wav_or_aiff(data: bytes) -> bool:
    """Whether the file is RIFF WAVE (also RIFX, RF64, BW64) or AIFF."""
    return (data[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and data[8:12] == b"WAVE") or (
        data[:4] == b"FORM" and data[8:12] in (b"AIFF", b"AIFC")
    )


def require_whole(data: bytes) -> None:
    """Refuse a WAV or AIFF file with fewer bytes of audio than its header states; libsndfile would accept it.

    Raises:
        MediaError: the file is truncated, or states a size of 0 although data follow.
    """
    order = "big" if data[:4] in (b"RIFX", b"FORM") else "little"
    sound_chunk = b"SSND" if data[:4] == b"FORM" else b"data"
    offset, size_64 = 12, None
    while offset + 8 <= len(data):
        name, size = data[offset : offset + 4], int.from_bytes(data[offset + 4 : offset + 8], order)  # type: ignore[arg-type]
        offset += 8
        if name == b"ds64":
            size_64 = int.from_bytes(data[offset + 8 : offset + 16], "little")
        if name == sound_chunk:
            if size == 0xFFFF_FFFF and size_64:
                size = size_64
            elif size >= STREAMED:
                return
            present = len(data) - offset
            if size > present:
                raise MediaError(f"states {size} bytes of audio but contains {present}: it is cut off")
            if size == 0 and present:
                raise MediaError(
                    f"states 0 bytes of audio, but {present} bytes follow: its header was never completed; rewrite it"
                )
            return
        # Chunks are padded to an even length.
        offset += size + size % 2


def ogg_links(data: bytes) -> list[bytes]:
    """Split a chained Ogg stream into its consecutive logical streams, which are read separately.

    Raises:
        MediaError: the file has multiplexed streams, or a stream without its last page (RFC 3533, section 6).
    """
    begins: list[int] = []
    beginning, ended, offset, stop = False, True, 0, 0
    while (offset := data.find(b"OggS", offset)) >= 0 and offset + 27 <= len(data):
        if data[offset + 5] & FIRST_PAGE:
            if beginning:
                raise MediaError("is an Ogg file with several multiplexed streams: extract the audio to its own file")
            begins.append(offset)
            _require_ended(ended)
        beginning = bool(data[offset + 5] & FIRST_PAGE)
        segments = data[offset + 27 : offset + 27 + data[offset + 26]]
        ended = bool(data[offset + 5] & LAST_PAGE)
        offset = stop = offset + 27 + len(segments) + sum(segments)
    _require_ended(ended and stop <= len(data))
    return [data[a:b] for a, b in zip([0, *begins[1:]], [*begins[1:], len(data)])]


def _require_ended(ended: bool) -> None:
    if not ended:
        raise MediaError("has no end-of-stream page: it is cut off")


def behind_id3(data: bytes) -> int:
    """Offset of the audio after any ID3v2 tags."""
    offset = 0
    while data[offset : offset + 3] == b"ID3" and len(data) >= offset + 10:
        size = 0
        for byte in data[offset + 6 : offset + 10]:
            size = size << 7 | byte & 0x7F
        offset += 10 + size + (10 if data[offset + 5] & 0x10 else 0)
    return offset


def flac_states_length(data: bytes) -> bool:
    """Whether this is FLAC with a sample count in its header; programs that write to a pipe leave it 0."""
    # Four bytes of magic and four of block header, then STREAMINFO, whose last 36 bits before the MD5 are the count.
    total = int.from_bytes(data[21:26], "big") & 0xF_FFFF_FFFF
    return data[:4] == b"fLaC" and total > 0


def mp3_states_length(frames: bytes) -> bool:
    """Whether this is an MP3 that begins with a Xing or Info header that states the frame count of the whole file.

    Without such a header the length is only an estimate from the first frames. A header that covers less than the file
    belongs to the first of several concatenated files.
    """
    # ADTS AAC has the same sync word but layer 0.
    if len(frames) < 4 or frames[0] != 0xFF or frames[1] & 0xE0 != 0xE0 or frames[1] & 0x06 == 0:
        return False
    mpeg_1, mono = frames[1] & 0x08 != 0, frames[3] >> 6 == 3
    at = 4 + {(True, False): 32, (True, True): 17, (False, False): 17, (False, True): 9}[mpeg_1, mono]
    if frames[at : at + 4] not in (b"Xing", b"Info") or len(frames) < at + 16:
        return False
    has_frames, has_bytes = frames[at + 7] & 1, frames[at + 7] & 2
    stated = int.from_bytes(frames[at + 12 : at + 16], "big") if has_frames and has_bytes else len(frames)
    return bool(has_frames) and len(frames) - stated <= MP3_TAIL + ID3V1
