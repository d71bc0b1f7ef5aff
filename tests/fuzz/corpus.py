"""Generate small valid files of every kind that the trainer reads."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tiny import flac, npy, png

from megatron_anymal.config import EncoderConfig, ModalityConfig

Members = list[tuple[str, bytes]]
_CLIP = EncoderConfig(type="clip", config={"image_size": 32, "patch_size": 8})
SECTIONS = {
    "image": ModalityConfig(encoder=_CLIP),
    "video": ModalityConfig(encoder=_CLIP, options={"clip_seconds": 1.0}),
    "audio": ModalityConfig(
        encoder=EncoderConfig(type="identity"),
        options={"piece_seconds": 1.0, "sampling_rate": 8000, "n_mels": 16, "hop_length": 256, "fft_window_size": 512},
    ),
    "imu": ModalityConfig(encoder=EncoderConfig(type="imu2clip"), options={"rate": 50}),
}


def picture(kind: str, mode: str = "RGB") -> bytes:
    """An image of 40 x 30 pixels."""
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind)
    return out.getvalue()


def sound(kind: str, seconds: float = 1.5) -> bytes:
    """Noise at 8 kHz, a rate that Ogg Opus supports as well."""
    import soundfile

    out = io.BytesIO()
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, int(8000 * seconds)).astype(np.float32)
    subtype = "OPUS" if kind == "OPUS" else None
    soundfile.write(out, noise, 8000, format="OGG" if kind == "OPUS" else kind, subtype=subtype)
    return out.getvalue()


def video(container: str, codec: str, frames: int = 16) -> bytes:
    """Grey frames of 64 x 48 pixels, eight per second."""
    import av

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"video.{container}"
        with av.open(str(file), "w") as output:
            stream = output.add_stream(codec, rate=8)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for number in range(frames):
                pixels = np.full((48, 64, 3), 20 + 6 * number, dtype=np.uint8)
                output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            output.mux(stream.encode(None))
        return file.read_bytes()


def motion_csv() -> bytes:
    """Two seconds of IMU data with a time column."""
    out = io.StringIO()
    rows = np.random.default_rng(0).normal(size=(100, 6)).round(4)
    writer = csv.writer(out)
    writer.writerow(["timestamp", "acc_x", "acc_y", "acc_z", "gyro_x", "gyro_y", "gyro_z"])
    writer.writerows([f"{n / 50:.2f}", *row] for n, row in enumerate(rows))
    return out.getvalue().encode()


def media() -> list[tuple[str, str, bytes, dict[str, Any]]]:
    """One file of each format: modality, extension, content and attributes."""
    return [
        *(("image", ending, picture(kind), {}) for ending, kind in (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"))),
        *(("image", ending, picture(kind), {}) for ending, kind in (("bmp", "BMP"), ("tif", "TIFF"), ("ppm", "PPM"))),
        ("image", "png", picture("PNG", "P"), {}),
        *(("audio", ending, sound(kind), {}) for ending, kind in (("wav", "WAV"), ("flac", "FLAC"), ("ogg", "OGG"))),
        *(("audio", ending, sound(kind), {}) for ending, kind in (("mp3", "MP3"), ("opus", "OPUS"))),
        *(("video", ending, video(ending, "libx264"), {}) for ending in ("mp4", "mkv")),
        ("video", "avi", video("avi", "mpeg4"), {}),
        ("imu", "npy", npy(1, 100), {"rate": 50}),
        ("imu", "csv", motion_csv(), {}),
    ]


def plain_members(count: int = 12) -> Members:
    """Members of a shard: images with captions."""
    return [(f"{n:04d}.{e}", png(n) if e == "png" else b"one two") for n in range(count) for e in ("png", "txt")]


def json_members(count: int = 12) -> Members:
    """Members of a shard: samples whose JSON names an image, audio and IMU data."""
    members: Members = []
    for n in range(count):
        parts = [{"text": "what is", "loss": False}, {"media": "0.png"}, {"media": "1.flac"}]
        parts += [{"media": "2.npy", "rate": 50}, {"text": "one two"}]
        key = f"s{n:04d}"
        members += [(f"{key}.0.png", png(n)), (f"{key}.1.flac", flac(n, 0.05)), (f"{key}.2.npy", npy(n, 20))]
        members.append((f"{key}.json", json.dumps({"parts": parts}).encode()))
    return members


def conversation_members(count: int = 12) -> Members:
    """Members of a shard: conversations about an image."""
    members: Members = []
    for n in range(count):
        content = [{"media": "0.png"}, {"text": "what is this"}]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "one two"}]
        members += [(f"c{n:04d}.0.png", png(n)), (f"c{n:04d}.json", json.dumps({"messages": turns}).encode())]
    return members


def manifests() -> list[tuple[str, bytes]]:
    """Extension and content of manifests that name a.png and b.flac."""
    lines = [{"key": n, "media": "a.png" if n % 2 else "b.flac", "text": f"number {n}"} for n in range(20)]
    turns = {"role": "user", "content": [{"media": "a.png"}, {"text": "what"}]}
    chats = [{"key": f"c{n}", "messages": [turns, {"role": "assistant", "content": "one"}]} for n in range(10)]
    rows = "".join(f"{row['key']},{row['media']},{row['text']}\n" for row in lines)
    return [
        (".jsonl", "".join(json.dumps(line) + "\n" for line in [*lines, *chats]).encode()),
        (".csv", ("key,media,text\n" + rows).encode()),
        (".csv", ("key\tmedia\ttext\r\n" + rows.replace(",", "\t").replace("\n", "\r\n")).encode()),
    ]


def checkpoint(folder: Path, tokenizer: str, shards: str) -> Path:
    """Committed checkpoint of a one-step run on one process."""
    from engine import train
    from ranks import run_ranks
    from tiny import make_config

    config = make_config(shards, tokenizer, folder / "run")
    config.trainer.max_steps = 1
    config.exp_manager.checkpoint.every_n_train_steps = 1
    run_ranks(1, train, config)
    return next((folder / "run" / "checkpoints").glob("step_*"))
