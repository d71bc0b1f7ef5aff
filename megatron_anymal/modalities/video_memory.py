"""Estimate of the memory for decoding a video: the frames held by the decoder, and the conversion to RGB."""

from __future__ import annotations

from typing import Any

# H.264, table A-1, MaxDpbMbs: macroblocks of 16 x 16 pixels in the decoded picture buffer, by level_idc.
_H264 = {
    9: 396,
    10: 396,
    11: 900,
    12: 2_376,
    13: 2_376,
    20: 2_376,
    21: 4_752,
    22: 8_100,
    30: 8_100,
    31: 18_000,
    32: 20_480,
    40: 32_768,
    41: 32_768,
    42: 34_816,
    50: 110_400,
    51: 184_320,
    52: 184_320,
    60: 696_320,
    61: 696_320,
    62: 696_320,
}
# H.265, table A.8, MaxLumaPs: maximum pixels per frame, by general_level_idc.
_H265 = {
    30: 36_864,
    60: 122_880,
    63: 245_760,
    90: 552_960,
    93: 983_040,
    120: 2_228_224,
    123: 2_228_224,
    150: 8_912_896,
    153: 8_912_896,
    156: 8_912_896,
    180: 35_651_584,
    183: 35_651_584,
    186: 35_651_584,
}
# Maximum number of reference frames of other codecs; unknown codecs get the maximum of H.264 and H.265.
_REFERENCES = {"av1": 8, "vp9": 8, "vp8": 3, "mpeg4": 2, "mpeg2video": 2, "mpeg1video": 2, "mjpeg": 1, "prores": 1}
_MOST = 16
# Frames in addition to the references: the one being decoded, the current one and the next one. Factor for the padding
# that decoders add at the edges of a frame.
_FURTHER, _PADDED = 3, 1.06
# Bytes per pixel for the conversion to an upright image: FFmpeg's RGB, PyAV's copy, Pillow's 4 bytes, the rotated copy,
# and a reserve.
_PICTURE = 20


def frames_held(codec: str, header: bytes, width: int, height: int) -> int:
    """Maximum number of reference frames that a decoder holds at this frame size.

    Args:
        codec: FFmpeg's name of the codec.
        header: the stream's codec-specific data (ISO/IEC 14496-15: avcC, hvcC), whose level limits H.264 and H.265.
    """
    if codec == "h264" and len(header) > 3 and header[0] == 1 and header[3] in _H264:
        return min(_MOST, max(1, _H264[header[3]] // (-(-width // 16) * -(-height // 16))))
    if codec == "hevc" and len(header) > 12 and header[0] == 1 and header[12] in _H265:
        # H.265, section A.4.2.
        pixels, most = width * height, _H265[header[12]]
        return next((held for held, share in ((16, 0.25), (12, 0.5), (8, 0.75)) if pixels <= share * most), 6)
    return _REFERENCES.get(codec, _MOST)


def decoding_bytes(context: Any, width: int, height: int, pixel_format: Any) -> int:
    """Maximum memory in bytes for decoding frames of this size.

    Args:
        context: the stream's av.VideoCodecContext.
        pixel_format: av.VideoFormat of the frames; None if it is not known yet.
    """
    bits = pixel_format.padded_bits_per_pixel if pixel_format else 12
    references = frames_held(context.codec.canonical_name, bytes(context.extradata or b""), width, height)
    return int(width * height * (_PADDED * bits / 8 * (references + _FURTHER) + _PICTURE))
