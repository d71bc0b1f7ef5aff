"""Ask the quickstart's any-to-any model for pictures, videos and sounds, and judge what it makes.

python -m examples.quickstart.creations FOLDER
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from examples.quickstart.any_to_any import NEXT, PICTURE, SOUND
from examples.quickstart.judges import SIDE, DigitJudge, SoundJudge, centre, read_picture
from megatron_anymal.config import DiscreteConfig
from megatron_anymal.data.code_grammar import CodeItem
from megatron_anymal.data.media_tokenizers import MediaTokenizer

# Requests answered together, and the longest answer in tokens.
BATCH, LONGEST = 250, 64


def create(folder: Path) -> None:
    """Answer all requests. FOLDER/creations gets a file for each picture and sound, and answers.json."""
    from examples.quickstart.picture_codes import PictureTokenizer
    from examples.quickstart.sound_codes import SoundTokenizer
    from megatron_anymal.data.item_files import ItemFiles
    from megatron_anymal.generation.checkpoint_generator import NativeGenerator
    from megatron_anymal.generation.prompts import read_prompts
    from megatron_anymal.generation.sampling import Sampling

    requests = folder / "media" / "any_to_any_requests.jsonl"
    generator = NativeGenerator.of_run(str(folder / "any_to_any"))
    assert generator.grammar is not None
    sections = generator.grammar.layout.sections
    # What an answer consists of is left to the model.
    sampling = Sampling(max_new_tokens=LONGEST, modalities=("text", PICTURE, SOUND))
    replies = generator.replies(read_prompts(str(requests)), sampling, BATCH)
    tokenizers: dict[str, MediaTokenizer] = {
        PICTURE: PictureTokenizer(folder / "picture_tokenizer.safetensors"),
        SOUND: SoundTokenizer(folder / "sound_tokenizer.safetensors"),
    }
    out = folder / "creations"
    files, rows = ItemFiles(out, sections, tokenizers), []
    for number, (line, reply) in enumerate(zip(requests.read_text(encoding="utf-8").splitlines(), replies)):
        request = json.loads(line)
        grammar = {
            "grammatical": all(is_complete(item, sections[item.name]) for item in reply.items),
            "grammatical_by_itself": reply.grammatical,
        }
        rows.append({**request, "parts": files.write(str(number), reply.parts), **grammar})
    (out / "answers.json").write_text(json.dumps(rows))


def is_complete(item: CodeItem, section: DiscreteConfig) -> bool:
    """Whether an item has as many codes of each codebook as its section states, none of them outside its codebook."""
    sizes = np.array(section.codebooks)[:, None]
    whole = item.codes.shape == (len(sizes), section.codes_per_item // len(sizes))
    return bool(whole and (item.codes >= 0).all() and (item.codes < sizes).all())


def judge(folder: Path) -> dict[str, Any]:
    """Judge the answers of `create`.

    Returns:
        "as_asked": kind of request -> share of the answers that show what was asked for: "digit", "two digits" (both,
        in this order), "video" (the same digit, moved on in its direction) and "sound". "answers": their number.
        "grammatical": share of them whose items are complete; "grammatical_by_itself": share in which the likeliest
        token always obeyed the grammar, even before it was enforced. "judges": accuracy of the judges on the training
        media.
    """
    out, media = folder / "creations", folder / "media"
    rows = json.loads((out / "answers.json").read_text())
    digits, sounds = DigitJudge(media / "image_held_out.jsonl"), SoundJudge(media / "audio_held_out.jsonl")
    right: dict[str, list[bool]] = {}
    for row in rows:
        right.setdefault(row["asked"], []).append(_as_asked(folder, row, digits, sounds))
    return {
        "as_asked": {kind: sum(outcomes) / len(outcomes) for kind, outcomes in right.items()},
        "answers": len(rows),
        **{name: sum(row[name] for row in rows) / len(rows) for name in ("grammatical", "grammatical_by_itself")},
        "judges": {
            "digits": digits.accuracy(media / "image_train.jsonl"),
            "sounds": sounds.accuracy(media / "audio_train.jsonl"),
        },
    }


def _as_asked(folder: Path, row: Mapping[str, Any], digits: DigitJudge, sounds: SoundJudge) -> bool:
    """Whether an answer has the items that were asked for, and no others."""
    items = [part for part in row["parts"] if "media" in part]
    files = [folder / "creations" / part["media"] for part in items]
    if row["asked"] == "sound":
        return [part["modality"] for part in items] == [SOUND] and sounds.name(soundfile.read(files[0])[0]) == row[
            "facts"
        ][0]
    pictures = [read_picture(file) for file, part in zip(files, items) if part["modality"] == PICTURE]
    if row["asked"] == "video":
        return len(items) == len(pictures) == len(NEXT) and _goes_on(folder, row, pictures, digits)
    return len(items) == len(pictures) and [digits.name(picture) for picture in pictures] == row["facts"]


def _goes_on(folder: Path, row: Mapping[str, Any], pictures: Sequence[np.ndarray], digits: DigitJudge) -> bool:
    """Whether frames show the digit of a video, each further in its direction than the one before."""
    digit, direction = row["facts"]
    centres = [centre(picture) for picture in (read_picture(folder / "media" / row["last"]), *pictures)]
    axis, sign = {"left": (1, -1), "right": (1, 1), "up": (0, -1), "down": (0, 1)}[direction]
    steps = sign * np.diff([position[axis] for position in centres])
    return bool((steps > 0).all()) and all(digits.name(picture, SIDE) == digit for picture in pictures)


def main(argv: Sequence[str]) -> int:
    """Answer and judge in the quickstart's folder given by the arguments; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.quickstart.creations", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args(argv).folder
    create(folder)
    scores = judge(folder)
    (folder / "creations" / "scores.json").write_text(json.dumps(scores, indent=1))
    print(json.dumps(scores, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
