"""Single parts of loading a media file: in the plain way, and as this trainer does them."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from megatron_anymal.modalities.audio import AudioModality
from megatron_anymal.modalities.image import ImageModality
from megatron_anymal.modalities.pixels import PixelTransform
from megatron_anymal.modalities.resizing import with_pillow, with_torch
from megatron_anymal.modalities.sounds import resample
from megatron_anymal.modalities.video import VideoModality

Calls = dict[str, Callable[[], Any]]


def floors(modality: str, data: bytes) -> Calls:
    """Decoding alone."""
    if modality == "image":
        import simplejpeg

        return {
            "JPEG, Pillow": lambda: Image.open(io.BytesIO(data)).load(),
            "JPEG, simplejpeg": lambda: simplejpeg.decode_jpeg(data, "RGB"),
        }
    if modality == "audio":
        import soundfile

        return {"FLAC, libsndfile": lambda: soundfile.read(io.BytesIO(data), dtype="float32")}
    return {"H.264, all frames": lambda: all_frames(data)}


def all_frames(data: bytes) -> int:
    """Decode a video from start to end; return the number of frames."""
    import av

    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].thread_count = 1
        return sum(1 for _ in container.decode(video=0))


def parts(kind: str, data: bytes, modality: Any) -> Calls:
    """Parts of loading one file; each name ends with the implementation."""
    if isinstance(modality, ImageModality):
        return _image_parts(data, modality.pixels)
    if isinstance(modality, AudioModality):
        return _audio_parts(data, modality)
    assert isinstance(modality, VideoModality), kind
    return _video_parts(data, modality)


def plainly_normalised(pixels: np.ndarray, transform: PixelTransform) -> np.ndarray:
    """[height, width, 3] uint8 to [3, height, width], channels last until the end."""
    scaled = (pixels.astype(np.float32) * np.float32(1 / 255) - transform.mean) / transform.std
    return np.ascontiguousarray(np.moveaxis(scaled, -1, -3))


def _image_parts(data: bytes, transform: PixelTransform) -> Calls:
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    pixels, side = np.array(picture), transform.resolution
    resized = with_pillow(picture, side, 3)
    out = np.empty((3, side, side), dtype=np.float32)
    return {
        "resize, Pillow": lambda: with_pillow(picture, side, 3),
        "resize, torch": lambda: with_torch(pixels, side, 3),
        "normalise, channels last": lambda: plainly_normalised(resized, transform),
        "normalise, plane by plane in place": lambda: transform.normalise(resized, out),
        "check for non-finite values, done only for floats": lambda: np.isfinite(out).all(),
    }


def with_ffmpeg(wave: np.ndarray, rate: int, target: int) -> np.ndarray:
    """Resample with FFmpeg's default filter."""
    import av

    resampler = av.AudioResampler(format="fltp", layout="mono", rate=target)
    frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
    frame.sample_rate = rate
    chunks = [*resampler.resample(frame), *resampler.resample(None)]
    return np.concatenate([chunk.to_ndarray()[0] for chunk in chunks])


def _audio_parts(data: bytes, modality: AudioModality) -> Calls:
    import soundfile

    wave, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    target, extractor = modality.sampling_rate, modality.extractor
    window = resample([wave], rate, target)[: modality.samples]
    return {
        "resample, FFmpeg": lambda: with_ffmpeg(wave, rate, target),
        "resample, soxr": lambda: resample([wave], rate, target),
        "spectrogram, transformers": lambda: extractor(
            [window], truncation="rand_trunc", padding="pad", max_length=modality.samples, sampling_rate=target
        ),
        "spectrogram, many frames at once": lambda: modality.log_mel(window),
    }


def _video_parts(data: bytes, modality: VideoModality) -> Calls:
    [clips] = modality.count_pieces(np.array([modality.probe(data, "mp4", {})]))
    return {
        "packets and duration": lambda: modality.probe(data, "mp4", {}),
        "seek, decode and resize the wanted frames": lambda: modality.decode(data, "mp4", {}, int(clips)),
    }
