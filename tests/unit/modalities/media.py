"""Small media files built in memory, and small encoder sections."""

from __future__ import annotations

import io
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_anymal.config import EncoderConfig, ModalityConfig

CLIP_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
VIDEOMAE_SHAPE = {**CLIP_SHAPE, "num_frames": 4, "tubelet_size": 2}
DINOV2_SHAPE = {k: v for k, v in CLIP_SHAPE.items() if k != "intermediate_size"}
CLAP_SHAPE = {
    "spec_size": 64,
    "num_mel_bins": 32,
    "window_size": 4,
    "patch_embeds_hidden_size": 16,
    "hidden_size": 32,
    "depths": [2, 2],
    "num_attention_heads": [2, 4],
    "num_hidden_layers": 2,
}
SMALL_AUDIO = {"piece_seconds": 1.0, "sampling_rate": 8000, "n_mels": 32, "hop_length": 256, "fft_window_size": 512}


def section(type_name: str, shape: dict[str, Any] | None = None, path: str = "", **options: Any) -> ModalityConfig:
    """A modality section with an encoder of this type."""
    return ModalityConfig(encoder=EncoderConfig(type=type_name, config=shape or {}, path=path), options=options)


def noise_image(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A picture in which every pixel is different."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (height, width, bands) if bands > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), mode=None)


def image_bytes(picture: Image.Image, kind: str = "PNG", **arguments: Any) -> bytes:
    """The picture as a file."""
    stream = io.BytesIO()
    picture.save(stream, kind, **arguments)
    return stream.getvalue()


def png_bytes(values: np.ndarray, bits: int, transparent: bytes = b"") -> bytes:
    """A PNG of the given samples, [height, width] (grey) or [height, width, 3], with a transparent colour."""
    height, width = values.shape[:2]

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    samples = values.reshape(height, -1).astype(">u2")
    spread = np.unpackbits(samples.view(np.uint8).reshape(height, -1, 2), axis=2)[:, :, 16 - bits :]
    rows = np.packbits(spread.reshape(height, -1), axis=1)
    packed = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, bits, 2 if values.ndim == 3 else 0, 0, 0, 0)
    chunks = [(b"IHDR", head), *([(b"tRNS", transparent)] if transparent else []), (b"IDAT", zlib.compress(packed))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in [*chunks, (b"IEND", b"")])


def tiff_bytes(width: int, height: int, samples: bytes, bits: int, sample_format: int = 1) -> bytes:
    """An uncompressed grey TIFF in one strip."""
    entries = [
        (256, width),
        (257, height),
        (258, bits),
        (259, 1),
        (262, 1),
        (273, 8 + 2 + 12 * 10 + 4),
        (277, 1),
        (278, height),
        (279, len(samples)),
        (339, sample_format),
    ]
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + fields + struct.pack("<I", 0) + samples


def video_bytes(
    frames: int,
    rate: int = 8,
    container: str = "mp4",
    codec: str = "libx264",
    sound_seconds: float = 0.0,
    noise: np.random.Generator | None = None,
    **options: str,
) -> bytes:
    """A video whose frame i is uniform grey 20 + 6 * (i mod 36), or noise; a key frame every 2 seconds."""
    import av

    # FFmpeg reads the finished file again to move its index to the front, so an in-memory file is not enough.
    file = Path(tempfile.mkstemp(suffix=".video")[1])
    with av.open(str(file), "w", format=container, options=options) as output:
        video = output.add_stream(codec, rate=rate)
        video.gop_size = 2 * rate
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        # All streams must exist before the first packet is written.
        audio = output.add_stream("aac", rate=48000, layout="mono") if sound_seconds else None
        for number in range(frames):
            picture = np.full((48, 64, 3), 20 + 6 * (number % 36), dtype=np.uint8)
            if noise is not None:
                picture = noise.integers(0, 256, picture.shape, dtype=np.uint8)
            output.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(video.encode(None))
        if audio is not None:
            for start in range(0, int(48000 * sound_seconds), 1024):
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 48000, start
                output.mux(audio.encode(frame))
            output.mux(audio.encode(None))
    data = file.read_bytes()
    file.unlink()
    return data


def sine(seconds: float, rate: int, frequency: float = 440.0) -> np.ndarray:
    """A mono sine of amplitude 0.5."""
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def sound_bytes(wave: np.ndarray, rate: int, kind: str = "WAV", **arguments: Any) -> bytes:
    """A waveform, [samples] or [samples, channels], as a file."""
    import soundfile

    stream = io.BytesIO()
    soundfile.write(stream, wave, rate, format=kind, **arguments)
    return stream.getvalue()


def container_sound(wave: np.ndarray, container: str, codec: str, rate: int = 48000, layout: str = "mono") -> bytes:
    """A mono waveform (copied to each channel of `layout`) in a container that PyAV writes."""
    import av

    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as output:
        track = output.add_stream(codec, rate=rate, layout=layout)
        channels = np.repeat(wave[None], track.codec_context.layout.nb_channels, axis=0)
        frame = av.AudioFrame.from_ndarray(channels, format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        resampler = av.AudioResampler(
            format=track.codec_context.format,
            layout=layout,
            rate=rate,
            frame_size=track.codec_context.frame_size or 1024,
        )
        for given in (frame, None):
            for part in resampler.resample(given):
                output.mux(track.encode(part))
        output.mux(track.encode(None))
    return stream.getvalue()


def npy_bytes(values: np.ndarray) -> bytes:
    """An array as an npy file."""
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def coded_video(
    folder: Path, codec: str, pixels: str, width: int, height: int, references: int, count: int, container: str = "mp4"
) -> bytes:
    """Grey frames of changing brightness, coded with this many reference frames if the codec has such an option."""
    import av

    path = folder / f"made.{container}"
    parameters = f"ref={references}:bframes=0:log-level=0"
    options = {
        "libx264": {"preset": "ultrafast", "x264-params": f"ref={references}:bframes=0"},
        "libx265": {"preset": "ultrafast", "x265-params": parameters},
    }.get(codec, {"deadline": "realtime", "cpu-used": "8"})
    with av.open(str(path), "w") as output:
        track = output.add_stream(codec, rate=8, options=options)
        track.width, track.height, track.pix_fmt = width, height, pixels
        for number in range(count):
            shade = np.full((height, width), 40 + 8 * number % 200, dtype=np.uint8)
            output.mux(track.encode(av.VideoFrame.from_ndarray(shade, format="gray").reformat(format=pixels)))
        output.mux(track.encode(None))
    return path.read_bytes()


def with_matrix(data: bytes, linear: tuple[float, float, float, float]) -> bytes:
    """An MP4 whose display matrix is x' = ax + cy, y' = bx + dy for (a, b, c, d)."""
    a, b, c, d = (round(entry * 0x10000) for entry in linear)
    identity = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    head, track_header, tail = data.partition(b"tkhd")
    assert identity in tail[:80]
    return head + track_header + tail.replace(identity, struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000), 1)
