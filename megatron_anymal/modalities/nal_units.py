"""NAL units of H.264 and H.265 packets: where decoding may start, and which pictures no other one refers to."""

from __future__ import annotations

import re
from collections.abc import Iterator

# ITU-T H.264, table 7-1: slices, of them those of an IDR picture, which ends all references to earlier pictures.
_H264_SLICES, _H264_IDR = range(1, 6), (5,)
# Units that may accompany a slice in a packet that is left out: messages, delimiters, filler.
_H264_HARMLESS = (6, 9, 12)
# ITU-T H.265, table 7-1: slices, of them those of IRAP pictures (BLA, IDR, CRA). A picture that follows one of them in
# decoding order and in display order does not refer to any earlier picture.
_H265_SLICES, _H265_IRAP = range(32), range(16, 22)
# ISO/IEC 14496-15: position of the byte in avcC and hvcC that gives the size of a unit's length.
_LENGTH_SIZE = {"h264": 4, "hevc": 21}
# Annex B of both: the start of a unit.
_START_CODE = re.compile(rb"\x00\x00\x01")


def begins_anew(packet: bytes, codec: str, header: bytes) -> bool:
    """Whether decoding may start at a packet: what follows it in display order never refers to what precedes it.

    H.264 pictures that are only recovery points are not accepted: how later pictures refer to earlier ones is up to the
    encoder, and the container's mark of a key frame does not tell them apart.

    Args:
        codec: "h264" or "hevc".
        header: the stream's codec-specific data.
    """
    slices, entries = (_H264_SLICES, _H264_IDR) if codec == "h264" else (_H265_SLICES, _H265_IRAP)
    kinds = [_kind(unit, codec) for unit in _first_bytes(packet, codec, header)]
    pictures = [kind for kind in kinds if kind in slices]
    return bool(pictures) and all(kind in entries for kind in pictures)


def is_disposable(packet: bytes, header: bytes) -> bool:
    """Whether no other picture refers to that of an H.264 packet (nal_ref_idc 0), and the packet has nothing else."""
    slices = 0
    for unit in _first_bytes(packet, "h264", header):
        kind = _kind(unit, "h264")
        if kind == 1 and not unit & 0x60:
            slices += 1
        elif kind not in _H264_HARMLESS:
            return False
    return slices > 0


def _kind(unit: int, codec: str) -> int:
    """nal_unit_type, from the first byte of a unit."""
    return unit & 0x1F if codec == "h264" else unit >> 1 & 0x3F


def _first_bytes(packet: bytes, codec: str, header: bytes) -> Iterator[int]:
    """The first byte of each unit: after its length, if `header` is avcC or hvcC, else after a start code."""
    if header[:1] != b"\x01" or len(header) <= _LENGTH_SIZE[codec]:
        yield from (packet[match.end()] for match in _START_CODE.finditer(packet) if match.end() < len(packet))
        return
    size, at = (header[_LENGTH_SIZE[codec]] & 3) + 1, 0
    while at + size < len(packet):
        yield packet[at + size]
        at += size + int.from_bytes(packet[at : at + size], "big")
