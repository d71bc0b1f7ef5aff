"""What the headers of sound files say about length, checked before a library relies on it."""

from __future__ import annotations

from megatron_anymal.modalities.base import MediaError

# Programs that write to a pipe cannot go back to state a size and write one near 2 or 4 GiB: the sound goes on to the
# end of the file.
STREAMED = 0x7FFF_0000
# Flag of an Ogg page that begins a stream.
FIRST_PAGE = 2
# What may follow the last frame of an MP3: a little padding, and old tags.
MP3_TAIL, ID3V1 = 4096, 128


def is_wav_or_aiff(data: bytes) -> bool:
    """Whether the file is RIFF WAVE (also RIFX, RF64, BW64) or AIFF."""
    return (data[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and data[8:12] == b"WAVE") or (
        data[:4] == b"FORM" and data[8:12] in (b"AIFF", b"AIFC")
    )


def require_whole(data: bytes) -> None:
    """Refuse a WAV or AIFF with fewer bytes of sound than its header states; libsndfile takes what is there.

    Raises:
        MediaError: cut off, or a size of 0 with sound behind it.
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
                raise MediaError(f"states {size} bytes of sound and holds {present}: it is cut off")
            if size == 0 and present:
                raise MediaError(
                    f"states 0 bytes of sound, {present} bytes follow: its header was never completed. Write it again"
                )
            return
        # Chunks are padded to an even length.
        offset += size + size % 2


def ogg_links(data: bytes) -> list[bytes]:
    """The Ogg files that follow each other in one (a chained stream), each to be read on its own.

    Raises:
        MediaError: several streams side by side.
    """
    begins: list[int] = []
    beginning, offset = False, 0
    while (offset := data.find(b"OggS", offset)) >= 0 and offset + 27 <= len(data):
        if data[offset + 5] & FIRST_PAGE:
            if beginning:
                raise MediaError("is an Ogg file of several streams side by side: extract the sound into a file of one")
            begins.append(offset)
        beginning = bool(data[offset + 5] & FIRST_PAGE)
        segments = data[offset + 27 : offset + 27 + data[offset + 26]]
        offset += 27 + len(segments) + sum(segments)
    return [data[a:b] for a, b in zip([0, *begins[1:]], [*begins[1:], len(data)])]


def behind_id3(data: bytes) -> int:
    """Where the sound begins behind ID3v2 tags."""
    offset = 0
    while data[offset : offset + 3] == b"ID3" and len(data) >= offset + 10:
        size = 0
        for byte in data[offset + 6 : offset + 10]:
            size = size << 7 | byte & 0x7F
        offset += 10 + size + (10 if data[offset + 5] & 0x10 else 0)
    return offset


def flac_states_length(data: bytes) -> bool:
    """Whether this is FLAC whose header counts its samples; programs that write to a pipe leave 0 there."""
    # Four bytes of name, four of block header, then STREAMINFO; 36 bits from its byte 13 on are the total.
    total = int.from_bytes(data[21:26], "big") & 0xF_FFFF_FFFF
    return data[:4] == b"fLaC" and total > 0


def mp3_states_length(frames: bytes) -> bool:
    """Whether this is an MP3 that begins with a Xing or Info header, which counts its frames and covers the file.

    Without one the length is an estimate from the first frames; one that ends early is of the first of several files
    written behind each other.
    """
    # ADTS AAC has the same marker and layer 0.
    if len(frames) < 4 or frames[0] != 0xFF or frames[1] & 0xE0 != 0xE0 or frames[1] & 0x06 == 0:
        return False
    mpeg_1, mono = frames[1] & 0x08 != 0, frames[3] >> 6 == 3
    at = 4 + {(True, False): 32, (True, True): 17, (False, False): 17, (False, True): 9}[mpeg_1, mono]
    if frames[at : at + 4] not in (b"Xing", b"Info") or len(frames) < at + 16:
        return False
    has_frames, has_bytes = frames[at + 7] & 1, frames[at + 7] & 2
    stated = int.from_bytes(frames[at + 12 : at + 16], "big") if has_frames and has_bytes else len(frames)
    return bool(has_frames) and len(frames) - stated <= MP3_TAIL + ID3V1
