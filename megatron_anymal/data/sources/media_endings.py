"""The file ending of media whose name is not known, from their first bytes."""

from __future__ import annotations

from megatron_anymal.data.shard_samples import SampleError

# First bytes -> ending.
_STARTS = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
    b"fLaC": "flac",
    b"OggS": "ogg",
    b"ID3": "mp3",
    b"\xff\xfb": "mp3",
    b"\xff\xf3": "mp3",
    b"\x1aE\xdf\xa3": "mkv",
    b"\x93NUMPY": "npy",
}
# What follows the size in RIFF files.
_RIFF = {b"WAVE": "wav", b"WEBP": "webp", b"AVI ": "avi"}


def ending_of(data: bytes, path: str = "") -> str:
    """The ending of a media file.

    Args:
        data: its content.
        path: its name; empty if it is not known.

    Raises:
        SampleError: neither the name nor the content tells.
    """
    name = path.replace("\\", "/").rpartition("/")[2]
    if "." in name.strip("."):
        return name.rpartition(".")[2].lower()
    if data[:4] == b"RIFF" and data[8:12] in _RIFF:
        return _RIFF[data[8:12]]
    if data[4:8] == b"ftyp":
        return "mp4"
    for start, ending in _STARTS.items():
        if data.startswith(start):
            return ending
    raise SampleError(
        "media", f"its media begin with {data[:8]!r}, which is not a known format, and they have no name."
    )
