"""Media and shards for benchmarks/loader.py, and the configuration that reads them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image
from sklearn.datasets import load_sample_images
from tiny import SPECIAL, WORDS, make_config, make_tokenizer

from megatron_anymal.config import EncoderConfig, ModalityConfig, ProjectorConfig, RunConfig
from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.index_folder import make_index

SIDE = 336
SECONDS, RATE, VIDEO_RATE = 10, 44_100, 30


@dataclass(frozen=True)
class Kind:
    """How one kind of media is measured."""

    # Its modality, and the extension of its files.
    modality: str
    ending: str
    # Makes a file from a seed.
    make: Callable[[int], bytes]
    # Options of the modality.
    options: dict[str, Any]
    # Samples per round and per step.
    samples: int
    batch: int
    # Smallest acceptable ratio to webdataset's samples per CPU second.
    bar: float


def jpeg(seed: int) -> bytes:
    """A part of a photograph, 512 x 384, quality 90."""
    rng, photos = np.random.default_rng(seed), load_sample_images().images
    y, x = rng.integers(0, 43), rng.integers(0, 128)
    out = io.BytesIO()
    Image.fromarray(photos[seed % 2][y : y + 384, x : x + 512]).save(out, "JPEG", quality=90)
    return out.getvalue()


def flac(seed: int) -> bytes:
    """Ten seconds of 16-bit mono: a voice-like buzz under a slow envelope, and noise."""
    rng, time = np.random.default_rng(seed), np.arange(SECONDS * RATE) / RATE
    pitch = np.cumsum(120 + 30 * np.sin(2 * np.pi * 0.7 * time + seed)) / RATE
    voice = sum(np.sin(2 * np.pi * n * pitch) / n for n in range(1, 20)) * np.abs(np.sin(2 * np.pi * 2 * time))
    out = io.BytesIO()
    soundfile.write(out, 0.1 * voice + 0.003 * rng.standard_normal(len(time)), RATE, format="FLAC", subtype="PCM_16")
    return out.getvalue()


@cache
def mp4(seed: int, seconds: int = 60, gop: int = 250) -> bytes:
    """A slow pan over a photograph with changing light, 640 x 360, H.264 with x264's defaults."""
    import av

    rng = np.random.default_rng(seed)
    photo = np.asarray(Image.fromarray(load_sample_images().images[seed % 2]).resize((1280, 854)))
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as output:
        track = output.add_stream("libx264", rate=VIDEO_RATE, options={"preset": "veryfast", "g": str(gop)})
        track.width, track.height, track.pix_fmt = 640, 360, "yuv420p"
        for number in range(seconds * VIDEO_RATE):
            phase = 2 * np.pi * number / VIDEO_RATE / 20
            y, x = int(240 + 230 * np.sin(phase)), int(310 + 300 * np.sin(1.7 * phase + seed))
            window = photo[y : y + 360, x : x + 640]
            noise = rng.integers(0, 6, (90, 160, 1), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
            picture = np.minimum(window, 249) + noise
            output.mux(track.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(track.encode(None))
    return out.getvalue()


KINDS = {
    "image": Kind("image", "jpg", jpeg, {"max_grid": 1}, 256, 32, 2.0),
    "audio": Kind("audio", "flac", flac, {}, 48, 16, 4.0),
    "video, 8 clips": Kind("video", "mp4", mp4, {}, 2, 2, 2.0),
    "video, 8 clips, key frames every 2 s": Kind(
        "video", "mp4", lambda seed: mp4(seed, gop=2 * VIDEO_RATE), {}, 2, 2, 2.0
    ),
    "video, 1 clip": Kind("video", "mp4", mp4, {"max_clips": 1}, 2, 2, 2.0),
    "video, 1 clip, key frames every 2 s": Kind(
        "video", "mp4", lambda seed: mp4(seed, gop=2 * VIDEO_RATE), {"max_clips": 1}, 2, 2, 2.0
    ),
}


def write_shards(folder: Path, kind: Kind, count: int, tokenizer: str) -> None:
    """Write samples of a media file and a short text to up to four shards, and index them."""
    folder.mkdir(parents=True)
    rng, shards = np.random.default_rng(0), min(4, count)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard, count, shards):
                text = " ".join(rng.choice(WORDS, size=10)).encode()
                for ending, data in ((kind.ending, kind.make(number)), ("txt", text)):
                    info = tarfile.TarInfo(f"{number:06d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    make_index(str(folder), IndexOptions(tokenizer))


def tokenizer_of(folder: Path) -> str:
    """Write a word-level tokenizer; return its folder."""
    return make_tokenizer(folder)


def configuration(folder: Path, kind: Kind, tokenizer: str, **options: Any) -> RunConfig:
    """A run that reads the shards with CLIP's input format, or CLAP's for audio."""
    config = make_config(str(folder), tokenizer, folder / "run")
    encoder = EncoderConfig("clip", config={"image_size": SIDE})
    if kind.modality == "audio":
        encoder = EncoderConfig("clap", config={"enable_fusion": False})
    config.model.modalities = {
        kind.modality: ModalityConfig(
            encoder=encoder,
            projector=ProjectorConfig(type="linear", num_layers=1, num_tokens=16),
            options={**kind.options, **options},
            placeholder=SPECIAL[2],
        )
    }
    config.model.global_batch_size, config.data.seq_length = kind.batch, 1024
    return config
