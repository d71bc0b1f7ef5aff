"""The pictures in a media file that image classifiers look at."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_anymal.config import LimitsConfig
from megatron_anymal.modalities.pictures import decoded, opened
from megatron_anymal.modalities.video import evenly_spread_pictures

if TYPE_CHECKING:
    from PIL import Image

# Kinds of media with pictures.
KINDS = ("image", "video")


def pictures_of(kind: str, data: bytes, video_frames: int, limits: LimitsConfig) -> list[Image.Image]:
    """The image itself, or frames of a video; RGB and upright.

    Args:
        kind: one of KINDS.
        video_frames: number of frames, evenly spread over the video.

    Raises:
        MediaError: the file is damaged or beyond a limit.
    """
    if kind == "video":
        return evenly_spread_pictures(data, video_frames, limits)
    with opened(data, limits) as picture:
        return [decoded(picture, data)]
