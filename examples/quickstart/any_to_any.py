"""Prepare the quickstart's any-to-any stage: tokenizers of pictures and sounds, and samples with media in answers.

python -m examples.quickstart.any_to_any FOLDER
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from examples.quickstart.corpus import DIGITS, SOUNDS, pick, turns, write_lines

# Names in model.discrete.
PICTURE, SOUND = "picture", "sound"
# Wordings of requests for a digit, for two, for a sound, and for the rest of a video.
DRAW = ("draw the digit {0}.", "show me the number {0}.", "write the figure {0} by hand.")
DRAW_TWO = ("draw the digit {0}, then the digit {1}.", "show me the numbers {0} and {1}.")
SAY = ("make the sound of a {0}.", "let me hear a {0}.")
CONTINUE = ("continue the video.", "what comes next?")
# Frames of a video that are shown, and those that are asked for.
SHOWN, NEXT = (0, 2), (4, 6)
# Smallest size of a digit in a varied picture, relative to the scan.
SMALLEST = 0.9

Line = dict[str, Any]


@dataclass(frozen=True)
class AnyToAnyAmounts:
    """Numbers of samples, requests and training steps."""

    # Training pictures, varied copies of each, samples with two of them, videos to continue, and sounds.
    pictures: int = 1400
    copies: int = 2
    pairs: int = 1400
    videos: int = 1000
    sounds: int = 800
    # Requests for a digit, for two digits, for the rest of a held-out video, and for a sound.
    digit_requests: int = 200
    pair_requests: int = 200
    video_requests: int = 400
    sound_requests: int = 200
    # Training of the tokenizers.
    picture_steps: int = 1200
    sound_steps: int = 300


def prepare_any_to_any(folder: Path, amounts: AnyToAnyAmounts | None = None) -> None:
    """Train the tokenizers on the quickstart's training media, and write manifests, unless that is done already.

    FOLDER/picture_tokenizer.safetensors, FOLDER/sound_tokenizer.safetensors
    FOLDER/media/any_to_any_train.jsonl       samples for `anymal prepare --encode`
    FOLDER/media/any_to_any_held_out.jsonl    held-out questions about pictures and sounds, worded as for the encoders
    FOLDER/media/any_to_any_requests.jsonl    prompts whose answers are media
    """
    media, amounts = folder / "media", amounts or AnyToAnyAmounts()
    finished = media / "any_to_any_prepared"
    if finished.is_file():
        print(f"{folder} is already prepared; delete it to start over")
        return
    rng = np.random.default_rng(5)
    pictures = _read(media / "image_train.jsonl")[: amounts.pictures]
    sounds = _read(media / "audio_train.jsonl")[: amounts.sounds]
    _train_tokenizers(folder, pictures, sounds, amounts)
    varied = [*pictures, *_varied(media, pictures, amounts.copies, rng)]
    train = [
        # Reading is learned sooner than drawing.
        *(_question(line, PICTURE, rng) for line in varied[::2]),
        *(_drawing(line, rng) for line in varied),
        *_pairs(pictures, amounts.pairs, rng),
        *_continuations(media, _read(media / "video_train.jsonl")[: amounts.videos], rng),
        *(_question(line, SOUND, rng) for line in sounds),
        *(_saying(line, rng) for line in sounds),
    ]
    held_out = [
        *(_as_codes(line, PICTURE) for line in _read(media / "image_held_out.jsonl")),
        *(_as_codes(line, SOUND) for line in _read(media / "audio_held_out.jsonl")),
    ]
    write_lines(media / "any_to_any_train.jsonl", train)
    write_lines(media / "any_to_any_held_out.jsonl", held_out)
    write_lines(media / "any_to_any_requests.jsonl", _requests(folder, amounts, rng))
    finished.touch()


def _train_tokenizers(folder: Path, pictures: Sequence[Line], sounds: Sequence[Line], amounts: AnyToAnyAmounts) -> None:
    # They import torch and soundfile.
    import soundfile

    from examples.quickstart.picture_codes import train_picture_tokenizer
    from examples.quickstart.sound_codes import train_sound_tokenizer

    scans = np.stack([_scan(folder / "media" / _file(line)) for line in pictures])
    waves = np.stack([soundfile.read(folder / "media" / _file(line), dtype="float32")[0] for line in sounds])
    digits = [line["facts"][0] for line in pictures]
    for what, losses in (
        (
            PICTURE,
            train_picture_tokenizer(scans, digits, folder / "picture_tokenizer.safetensors", amounts.picture_steps),
        ),
        (SOUND, train_sound_tokenizer(waves, folder / "sound_tokenizer.safetensors", amounts.sound_steps)),
    ):
        print(f"{what} tokenizer: loss {losses[0]:.4f} at first, {np.mean(losses[-20:]):.4f} after {len(losses)} steps")


def _read(manifest: Path) -> list[Line]:
    return [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]


def _file(line: Line) -> str:
    """The media file of a line of the quickstart's manifests, relative to it."""
    return str(line["parts"][0]["media"])


def _scan(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("L"))


def _varied(media: Path, lines: Sequence[Line], copies: int, rng: np.random.Generator) -> Iterator[Line]:
    """Write slightly moved, turned and slanted copies of the pictures, and describe them like the originals."""
    import torch

    from examples.quickstart.vision import scatter

    (media / "picture_copies").mkdir(exist_ok=True)
    scans = torch.from_numpy(np.stack([_scan(media / _file(line)) for line in lines]))[:, None].float()
    for copy in range(copies):
        for number, picture in enumerate(scatter(scans, rng, SMALLEST).round().clamp(0, 255).byte().numpy()):
            name, line = f"picture_copies/{copy}-{number:06d}.png", lines[number]
            Image.fromarray(picture[0]).save(media / name)
            yield {"key": f"{line['key']}-{copy}", "parts": [{"media": name}], "facts": line["facts"]}


def _codes(name: str, kind: str) -> dict[str, str]:
    """The part of a media item that `--encode` turns into codes."""
    return {"media": name, "modality": kind}


def _as_codes(line: Line, kind: str) -> Line:
    """A line of the quickstart's manifests whose media item becomes codes; question and answer stay."""
    return {"key": f"codes-{line['key']}", "parts": [_codes(_file(line), kind), *line["parts"][1:]]}


def _question(line: Line, kind: str, rng: np.random.Generator) -> Line:
    """A question about a media item, and its answer."""
    choices = [
        turn for turn in turns("image" if kind == PICTURE else "audio", line["facts"]) if turn.kind != "knowledge"
    ]
    return _as_codes({**line, "parts": [line["parts"][0], *pick(choices, rng).parts()]}, kind)


def _drawing(line: Line, rng: np.random.Generator) -> Line:
    request = pick(DRAW, rng).format(*line["facts"])
    return _chat(f"draw-{line['key']}", [{"text": request}], [_codes(_file(line), PICTURE)])


def _saying(line: Line, rng: np.random.Generator) -> Line:
    request = pick(SAY, rng).format(*line["facts"])
    return _chat(f"say-{line['key']}", [{"text": request}], [_codes(_file(line), SOUND)])


def _pairs(lines: Sequence[Line], count: int, rng: np.random.Generator) -> Iterator[Line]:
    """Requests for two digits, answered by text and pictures in turn."""
    for number in range(count):
        two = [pick(lines, rng) for _ in range(2)]
        words = [line["facts"][0] for line in two]
        answer = [
            part for line, word in zip(two, words) for part in ({"text": f" {word}:"}, _codes(_file(line), PICTURE))
        ]
        yield _chat(f"two-{number:06d}", [{"text": pick(DRAW_TWO, rng).format(*words)}], answer)


def _continuations(media: Path, lines: Sequence[Line], rng: np.random.Generator) -> Iterator[Line]:
    for line in lines:
        frames = _frames(media, line)
        asked = [*(_codes(frames[number], PICTURE) for number in SHOWN), {"text": f" {pick(CONTINUE, rng)}"}]
        yield _chat(f"next-{line['key']}", asked, [_codes(frames[number], PICTURE) for number in NEXT])


def _frames(media: Path, line: Line) -> dict[int, str]:
    """Write the frames of a video that are used; their names by their number."""
    import av

    (media / "video_frames").mkdir(exist_ok=True)
    names = {number: f"video_frames/{line['key']}-{number}.png" for number in (*SHOWN, *NEXT)}
    with av.open(str(media / _file(line))) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in names:
                frame.to_image().save(media / names[number])
    return names


def _chat(key: str, asked: list[dict[str, Any]], answer: list[dict[str, Any]]) -> Line:
    return {
        "key": key,
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}],
    }


def _requests(folder: Path, amounts: AnyToAnyAmounts, rng: np.random.Generator) -> Iterator[Line]:
    """Requests without a reference answer: `asked` and `facts` describe what the answer must show."""
    for number in range(amounts.digit_requests):
        fact = DIGITS[number % len(DIGITS)]
        yield _request("digit", [fact], [{"text": pick(DRAW, rng).format(fact)}])
    for number in range(amounts.pair_requests):
        facts = [DIGITS[number % len(DIGITS)], pick(DIGITS, rng)]
        yield _request("two digits", facts, [{"text": pick(DRAW_TWO, rng).format(*facts)}])
    yield from _video_requests(folder, amounts.video_requests, rng)
    for number in range(amounts.sound_requests):
        fact = SOUNDS[number % len(SOUNDS)]
        yield _request("sound", [fact], [{"text": pick(SAY, rng).format(fact)}])


def _video_requests(folder: Path, count: int, rng: np.random.Generator) -> Iterator[Line]:
    """Requests to continue held-out videos; prompts have codes, which the plug-in makes here."""
    from examples.quickstart.picture_codes import PictureTokenizer

    media, tokenizer = folder / "media", PictureTokenizer(folder / "picture_tokenizer.safetensors")
    for line in _read(media / "video_held_out.jsonl")[:count]:
        frames = _frames(media, line)
        shown = []
        for number in SHOWN:
            [codes] = tokenizer.encode([np.repeat(_scan(media / frames[number])[:, :, None], 3, axis=2)])
            np.save(media / f"{frames[number]}.codes.npy", codes)
            shown.append(_codes(f"{frames[number]}.codes.npy", PICTURE))
        request = _request("video", line["facts"], [*shown, {"text": f" {pick(CONTINUE, rng)}"}])
        yield {**request, "last": frames[SHOWN[-1]]}


def _request(kind: str, facts: Sequence[str], asked: list[dict[str, Any]]) -> Line:
    return {"asked": kind, "facts": list(facts), "messages": [{"role": "user", "content": asked}]}


def main(argv: Sequence[str]) -> int:
    """Prepare the stage in the quickstart's folder given by the arguments; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.quickstart.any_to_any", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    prepare_any_to_any(parser.parse_args(argv).folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
