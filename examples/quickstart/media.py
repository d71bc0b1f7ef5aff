"""The quickstart's media files and their manifests.

Images are scikit-learn's scanned handwritten digits: real data. Videos are generated from them (a digit moves), sounds
and motion signals are simulated. The digits are split into train and held-out before anything is generated from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from examples.quickstart.corpus import ACTIVITIES, DIGITS, DIRECTIONS, SOUNDS, pick, turns, write_lines

SPLITS = ("train", "held_out")
IMAGE_SIDE = 32
FRAME_SIDE, DIGIT_SIDE, FRAMES, FRAME_RATE = 32, 24, 8, 8
AUDIO_RATE, AUDIO_SECONDS = 8000, 1.0
IMU_RATE, IMU_SECONDS = 50, 4.0

# Writes the media file at a path (its parent exists) and returns attributes for the manifest.
Writer = Callable[[Path, np.random.Generator], Mapping[str, Any]]


@dataclass(frozen=True)
class QuickstartSizes:
    """Numbers of samples; all of scikit-learn's images are used, held_out_images of them held out."""

    held_out_images: int = 397
    train_videos: int = 2000
    held_out_videos: int = 400
    train_audio: int = 800
    held_out_audio: int = 200
    train_imu: int = 800
    held_out_imu: int = 200


@dataclass(frozen=True)
class QuickstartItem:
    """A media file to write and its facts."""

    file: str
    facts: tuple[str, ...]
    write: Writer


def write_media(
    folder: str | Path, seed: int = 1234, sizes: QuickstartSizes | None = None
) -> dict[str, dict[str, Path]]:
    """Write all media and manifests; the same seed gives the same files.

    Held-out lines ask for the caption, training lines for the caption or one of its facts.

    Returns:
        Modality -> split ("train", "held_out") -> path of the JSONL manifest, next to its media.
    """
    folder = Path(folder)
    makers = {"image": _images, "video": _videos, "audio": _audio, "imu": _imu}
    manifests: dict[str, dict[str, Path]] = {}
    splits = split_digits(seed, (sizes or QuickstartSizes()).held_out_images)
    for number, (modality, make) in enumerate(makers.items()):
        manifests[modality] = {}
        for split_number, split in enumerate(SPLITS):
            rng = np.random.default_rng([seed, number, split_number])
            items = make(splits[split], split, sizes or QuickstartSizes(), rng)
            manifests[modality][split] = _write_split(folder, modality, split, items, rng)
    return manifests


def split_digits(seed: int, held_out: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """scikit-learn's digits, shuffled within each class and split so that both splits are balanced.

    Returns:
        split -> (pictures [n, 8, 8] uint8, labels [n] int64).
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pictures = np.round(digits.images * (255.0 / 16.0)).astype(np.uint8)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(pictures))
    # Sort by rank within the class, so that any prefix has the same number of images per class.
    rank = np.zeros(len(order), dtype=np.int64)
    for label in range(10):
        in_class = digits.target[order] == label
        rank[in_class] = np.arange(in_class.sum())
    order = order[np.argsort(rank, kind="stable")]
    parts = {"held_out": np.sort(order[:held_out]), "train": np.sort(order[held_out:])}
    return {name: (pictures[rows], digits.target[rows]) for name, rows in parts.items()}


def _write_split(
    folder: Path, modality: str, split: str, items: Iterator[QuickstartItem], rng: np.random.Generator
) -> Path:
    lines = []
    for number, item in enumerate(items):
        key = f"{modality}-{split}-{number:06d}"
        file = folder / f"{modality}_{split}" / f"{key}.{item.file}"
        file.parent.mkdir(parents=True, exist_ok=True)
        attributes = item.write(file, rng)
        choices = turns(modality, item.facts)
        captions = [turn for turn in choices if turn.kind == "caption"]
        trained = [turn for turn in choices if turn.kind in ("caption", "part")]
        turn = pick(captions if split == "held_out" or rng.random() < 0.5 else trained, rng)
        media = {"media": str(file.relative_to(folder)), "modality": modality, **attributes}
        lines.append({"key": key, "parts": [media, *turn.parts()], "facts": list(item.facts)})
    return write_lines(folder / f"{modality}_{split}.jsonl", lines)


def _balanced(count: int, classes: int, rng: np.random.Generator) -> np.ndarray:
    """`count` class numbers in random order, every class equally often (up to the remainder)."""
    return rng.permutation(np.arange(count) % classes)


# Images


def _images(
    digits: tuple[np.ndarray, np.ndarray], split: str, sizes: QuickstartSizes, rng: np.random.Generator
) -> Iterator[QuickstartItem]:
    for picture, label in zip(*digits):

        def write(path: Path, _: np.random.Generator, picture: np.ndarray = picture) -> Mapping[str, Any]:
            enlarge(picture, IMAGE_SIDE).save(path)
            return {}

        yield QuickstartItem("png", (DIGITS[label],), write)


def enlarge(picture: np.ndarray, side: int) -> Image.Image:
    """Resize a scan [8, 8] uint8 to `side` x `side` pixels."""
    return Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)


# Videos


def _videos(
    digits: tuple[np.ndarray, np.ndarray], split: str, sizes: QuickstartSizes, rng: np.random.Generator
) -> Iterator[QuickstartItem]:
    pictures, labels = digits
    count = sizes.train_videos if split == "train" else sizes.held_out_videos
    for number in _balanced(count, len(DIGITS) * len(DIRECTIONS), rng):
        label, direction = divmod(int(number), len(DIRECTIONS))
        picture = pictures[rng.choice(np.flatnonzero(labels == label))]

        def write(
            path: Path, rng: np.random.Generator, picture: np.ndarray = picture, direction: int = direction
        ) -> Mapping[str, Any]:
            _encode(path, _moving(picture, direction, rng))
            return {}

        yield QuickstartItem("mp4", (DIGITS[label], DIRECTIONS[direction]), write)


def _moving(picture: np.ndarray, direction: int, rng: np.random.Generator) -> np.ndarray:
    """Frames [FRAMES, side, side] uint8 of a digit that crosses the frame."""
    room = FRAME_SIDE - DIGIT_SIDE
    digit = np.asarray(enlarge(picture, DIGIT_SIDE))
    # Start and length of the path vary, so that no single frame gives the direction away.
    length = rng.uniform(0.6, 1.0) * room
    along = rng.uniform(0.0, room - length) + length * np.linspace(0.0, 1.0, FRAMES)
    along = along[::-1] if DIRECTIONS[direction] in ("left", "up") else along
    across = np.full(FRAMES, rng.uniform(0.0, room))
    lefts, tops = (along, across) if DIRECTIONS[direction] in ("left", "right") else (across, along)
    frames = np.zeros((FRAMES, FRAME_SIDE, FRAME_SIDE), dtype=np.uint8)
    for frame, left, top in zip(frames, np.rint(lefts).astype(int), np.rint(tops).astype(int)):
        frame[top : top + DIGIT_SIDE, left : left + DIGIT_SIDE] = digit
    return frames


def _encode(path: Path, frames: np.ndarray) -> None:
    """Write grey frames [n, height, width] uint8 as an mp4 (H.264, which browsers play; nearly lossless)."""
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=FRAME_RATE, options={"preset": "ultrafast", "crf": "10"})
        stream.height, stream.width = frames.shape[1:]
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, FRAME_RATE)
        stream.codec_context.thread_count = 1
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.repeat(frame[..., None], 3, axis=2), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


# Sounds


def _audio(
    digits: tuple[np.ndarray, np.ndarray], split: str, sizes: QuickstartSizes, rng: np.random.Generator
) -> Iterator[QuickstartItem]:
    def write(sound: str) -> Writer:
        def save(path: Path, rng: np.random.Generator) -> Mapping[str, Any]:
            import soundfile

            soundfile.write(path, synthesise(sound, rng), AUDIO_RATE, subtype="PCM_16")
            return {}

        return save

    count = sizes.train_audio if split == "train" else sizes.held_out_audio
    for number in _balanced(count, len(SOUNDS), rng):
        yield QuickstartItem("flac", (SOUNDS[number],), write(SOUNDS[number]))


def synthesise(sound: str, rng: np.random.Generator) -> np.ndarray:
    """Synthesise one of `SOUNDS`, [AUDIO_SECONDS x AUDIO_RATE] float32 in -1 to 1; pitch, level and noise vary."""
    t = np.arange(int(AUDIO_SECONDS * AUDIO_RATE)) / AUDIO_RATE
    low, high = rng.uniform(350, 700), rng.uniform(1200, 1900)
    phase = rng.uniform(0, 2 * np.pi)
    wave: np.ndarray
    if sound == "siren":
        # The pitch swings up and down.
        swing = 0.5 * (1 + np.sin(2 * np.pi * rng.uniform(1.5, 2.5) * t + phase))
        wave = np.sin(2 * np.pi * np.cumsum(low + (high - low) * swing) / AUDIO_RATE)
    elif sound == "beep":
        on = (t * rng.uniform(3, 5) + rng.uniform()) % 1.0 < 0.5
        wave = np.sin(2 * np.pi * rng.uniform(700, 1600) * t + phase) * on
    elif sound == "whistle":
        # The pitch slides up once.
        wave = np.sin(2 * np.pi * np.cumsum(low + (high + 800 - low) * t / AUDIO_SECONDS) / AUDIO_RATE + phase)
    elif sound == "drum":
        since = (t * rng.uniform(3, 5) + rng.uniform()) % 1.0
        wave = np.sin(2 * np.pi * rng.uniform(70, 140) * t + phase) * np.exp(-6 * since)
    elif sound == "hum":
        # A deep tone with overtones.
        overtones = np.arange(1, 6)[:, None]
        angle = 2 * np.pi * rng.uniform(90, 160) * t + phase
        wave = (np.sin(overtones * angle) / overtones).sum(axis=0) / 2
    else:
        wave = rng.normal(0, 0.5, len(t))
    wave = rng.uniform(0.3, 0.8) * wave + rng.uniform(0.002, 0.02) * rng.normal(size=len(t))
    return np.clip(wave, -1, 1).astype(np.float32)


# Motion


def _imu(
    digits: tuple[np.ndarray, np.ndarray], split: str, sizes: QuickstartSizes, rng: np.random.Generator
) -> Iterator[QuickstartItem]:
    def write(activity: str) -> Writer:
        def save(path: Path, rng: np.random.Generator) -> Mapping[str, Any]:
            np.save(path, simulate(activity, rng))
            return {"rate": IMU_RATE}

        return save

    count = sizes.train_imu if split == "train" else sizes.held_out_imu
    for number in _balanced(count, len(ACTIVITIES), rng):
        yield QuickstartItem("npy", (ACTIVITIES[number],), write(ACTIVITIES[number]))


# Steps or turns per second, amplitude of acceleration (m/s^2) and rotation (rad/s), share of higher harmonics.
_MOTION = {
    "walking": ((1.5, 2.0), 2.5, 0.6, 0.3),
    "running": ((2.6, 3.2), 9.0, 1.8, 0.5),
    "cycling": ((0.9, 1.3), 1.2, 1.5, 0.05),
    "resting": ((0.1, 0.3), 0.05, 0.02, 0.0),
}


def simulate(activity: str, rng: np.random.Generator) -> np.ndarray:
    """Simulate a motion signal, [IMU_SECONDS x IMU_RATE, 6] float32: acceleration in m/s^2, then rotation in rad/s.

    Frequency, strength, phase, sensor orientation and noise vary.
    """
    (low, high), push, turn, harmonics = _MOTION[activity]
    t = np.arange(int(IMU_SECONDS * IMU_RATE)) / IMU_RATE
    cycle = 2 * np.pi * rng.uniform(low, high) * t + rng.uniform(0, 2 * np.pi)
    gain = rng.uniform(0.7, 1.3)
    up = np.sin(cycle) + harmonics * np.sin(2 * cycle + rng.uniform(0, 2 * np.pi))
    ahead = 0.5 * np.sin(cycle + rng.uniform(0, 2 * np.pi))
    # The sideways sway has half the step frequency: left, right.
    sway = 0.4 * np.sin(cycle / 2 + rng.uniform(0, 2 * np.pi))
    body = push * gain * np.stack([ahead, sway, up], axis=1) + np.array([0.0, 0.0, 9.81])
    spin = turn * gain * np.stack([np.sin(cycle / 2), np.sin(cycle + rng.uniform(0, 2 * np.pi)), 0.3 * ahead], axis=1)
    tilt = _rotation(rng.normal(0, 0.15, 3))
    signal = np.concatenate([body @ tilt.T, spin @ tilt.T], axis=1)
    noise = rng.normal(0, 1, signal.shape) * np.array([0.2] * 3 + [0.05] * 3)
    return (signal + noise).astype(np.float32)


def _rotation(angles: np.ndarray) -> np.ndarray:
    """Rotation by small angles about x, y and z in turn, [3, 3]."""
    out = np.eye(3)
    for axis, angle in enumerate(angles):
        a, b = [k for k in range(3) if k != axis]
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        out = turn @ out
    return out
