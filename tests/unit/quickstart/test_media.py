"""The quickstart's media: deterministic, cleanly split, balanced, and readable by the trainer's own modalities."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from examples.quickstart import media
from examples.quickstart.corpus import DIRECTIONS, all_facts, caption
from megatron_anymal.config import EncoderConfig, ModalityConfig
from megatron_anymal.data.content_parts import parse_parts
from megatron_anymal.data.records import MediaPart, TextPart
from megatron_anymal.modalities import build_modality

SIZES = media.QuickstartSizes(
    train_videos=80, held_out_videos=40, train_audio=24, held_out_audio=12, train_imu=24, held_out_imu=12
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("media")
    media.write_media(path, seed=3, sizes=SIZES)
    return path


def lines(folder: Path, modality: str, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{modality}_{split}.jsonl").read_text().splitlines()]


def digest(folder: Path) -> str:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    names = "".join(f"{p.relative_to(folder)} {hashlib.sha256(p.read_bytes()).hexdigest()}\n" for p in files)
    return hashlib.sha256(names.encode()).hexdigest()


def test_same_seed_same_files_another_seed_others(folder, tmp_path):
    media.write_media(tmp_path, seed=3, sizes=SIZES)
    assert digest(folder) == digest(tmp_path)
    one, other = (media.split_digits(seed, 397)["held_out"][0] for seed in (3, 4))
    assert not np.array_equal(one, other)


def test_digits_are_all_there_split_once_and_balanced():
    from sklearn.datasets import load_digits

    parts = media.split_digits(seed=0, held_out=397)
    rows = [
        (*picture.ravel().tolist(), int(label))
        for pictures, labels in parts.values()
        for picture, label in zip(pictures, labels)
    ]
    digits = load_digits()
    # The conversion from 16 grey levels to 8 bits is lossless.
    back = Counter(tuple(np.round(np.array(row[:-1]) * 16 / 255).astype(int)) + (row[-1],) for row in rows)
    assert back == Counter((*x.astype(int), int(y)) for x, y in zip(digits.data, digits.target))
    assert len(parts["held_out"][0]) == 397
    counts = Counter(parts["held_out"][1].tolist())
    assert max(counts.values()) - min(counts.values()) <= 1


def test_videos_show_digits_of_their_own_split(monkeypatch, tmp_path):
    used: dict[str, list] = {"train": [], "held_out": []}
    splits = media.split_digits(3, 397)
    known = {name: {picture.tobytes() for picture in pictures} for name, (pictures, _) in splits.items()}
    original = media._moving

    def spy(picture, direction, rng):
        used[current[0]].append(picture.tobytes())
        return original(picture, direction, rng)

    monkeypatch.setattr(media, "_moving", spy)
    for split in media.SPLITS:
        current = [split]
        rng = np.random.default_rng(0)
        for number, item in enumerate(media._videos(splits[split], split, SIZES, rng)):
            item.write(tmp_path / f"{split}{number}.mp4", rng)
        assert used[split] and set(used[split]) <= known[split]


@pytest.mark.parametrize("modality", ["image", "video", "audio", "imu"])
def test_held_out_lines_ask_for_balanced_captions(folder, modality):
    samples = [parse_parts(line["parts"], "line") for line in lines(folder, modality, "held_out")]
    for parts in samples:
        assert [type(part) for part in parts] == [MediaPart, TextPart, TextPart]
        assert parts[0].modality == modality and not parts[1].loss and parts[2].loss
        assert parts[1].text.startswith(" question: ") and parts[1].text.endswith(" answer:")
    answers = Counter(parts[2].text for parts in samples)
    assert len(answers) == len(all_facts(modality))
    assert max(answers.values()) - min(answers.values()) <= 1


@pytest.mark.parametrize("modality", ["image", "video", "audio", "imu"])
def test_facts_are_those_of_the_answers(folder, modality):
    for line in lines(folder, modality, "held_out"):
        assert line["parts"][-1]["text"].strip() == caption(modality, line["facts"])


@pytest.mark.parametrize("modality", ["image", "video", "audio", "imu"])
def test_keys_are_unique_and_files_of_the_splits_differ(folder, modality):
    rows = [line for split in media.SPLITS for line in lines(folder, modality, split)]
    assert len({row["key"] for row in rows}) == len(rows)
    contents = [(folder / row["parts"][0]["media"]).read_bytes() for row in rows if modality != "image"]
    assert len(set(contents)) >= 0.99 * len(contents)


def test_modalities_read_every_kind(folder):
    clip = EncoderConfig(
        type="clip", config={"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_attention_heads": 2}
    )
    audio = {"piece_seconds": 1.0, "sampling_rate": media.AUDIO_RATE, "n_mels": 32, "hop_length": 256}
    sections = {
        "image": (ModalityConfig(encoder=clip, options={"max_grid": 1}), (1, 3, 32, 32)),
        "video": (ModalityConfig(encoder=clip, options={"clip_seconds": 1.0, "num_frames": 4}), (1, 4, 3, 32, 32)),
        "audio": (
            ModalityConfig(encoder=EncoderConfig(type="identity"), options={**audio, "fft_window_size": 512}),
            (1, 32, 32),
        ),
        "imu": (
            ModalityConfig(encoder=EncoderConfig(type="imu2clip"), options={"rate": 50.0, "piece_seconds": 4.0}),
            (1, 6, 200),
        ),
    }
    for modality, (section, shape) in sections.items():
        reader = build_modality(modality, section)
        for line in lines(folder, modality, "held_out")[:5]:
            part = parse_parts(line["parts"], "line")[0]
            file = folder / part.media
            assert tuple(reader.load(file.read_bytes(), file.suffix[1:], part.attributes).shape) == shape


def test_videos_move_as_their_answers_say(folder):
    """The centre of the bright pixels, measured in the decoded file, moves in the named direction."""
    import av

    for line in lines(folder, "video", "held_out"):
        with av.open(str(folder / line["parts"][0]["media"])) as container:
            frames = np.stack([f.to_ndarray(format="gray") for f in container.decode(video=0)]).astype(float)
        weight = frames / frames.sum(axis=(1, 2), keepdims=True)
        side = np.arange(media.FRAME_SIDE)
        x = (weight.sum(axis=1) * side).sum(axis=1)
        y = (weight.sum(axis=2) * side).sum(axis=1)
        dx, dy = x[-1] - x[0], y[-1] - y[0]
        seen = ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("up" if dy < 0 else "down")
        assert len(frames) == media.FRAMES
        assert line["parts"][-1]["text"].split()[-1] == seen
        assert seen in DIRECTIONS
