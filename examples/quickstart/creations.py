"""Ask the quickstart's any-to-any model for pictures, videos and sounds, and judge what it makes.

python -m examples.quickstart.creations FOLDER
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from examples.quickstart.any_to_any import NEXT, PICTURE, SOUND
from examples.quickstart.judges import SIDE, DigitJudge, SoundJudge, centre, read_picture
from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.frozen_base import resolve_language_model
from megatron_anymal.checkpoint.trust import config_of
from megatron_anymal.config import DiscreteConfig
from megatron_anymal.discrete_vocabulary import DiscreteVocabulary

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
    # What an answer consists of is left to the model.
    sampling = Sampling(max_new_tokens=LONGEST, modalities=("text", PICTURE, SOUND))
    replies = generator.replies(read_prompts(str(requests)), sampling, BATCH)
    tokenizers = {
        PICTURE: PictureTokenizer(folder / "picture_tokenizer.safetensors"),
        SOUND: SoundTokenizer(folder / "sound_tokenizer.safetensors"),
    }
    out = folder / "creations"
    out.mkdir(exist_ok=True)
    files, rows = ItemFiles(out, tokenizers), []
    for number, (line, reply) in enumerate(zip(requests.read_text(encoding="utf-8").splitlines(), replies)):
        request = json.loads(line)
        rows.append({**request, "parts": files.write(str(number), reply.parts), "tokens": list(reply.tokens)})
    (out / "answers.json").write_text(json.dumps(rows))


def obeys_grammar(tokens: Sequence[int], vocabulary: DiscreteVocabulary, sections: Mapping[str, DiscreteConfig]) -> bool:
    """Whether every item of an answer has a begin mark, the right number of codes of each codebook in turn, and an end
    mark. Written apart from the trainer's own grammar, as a regular expression over one word per token."""
    words = []
    for token in tokens:
        if token < vocabulary.base_size:
            words.append("text ")
        else:
            found = vocabulary.lookup(token)
            words.append(f"{found.name}:{found.mark or found.codebook} ")
    items = []
    for name, section in sections.items():
        each = section.codes_per_item // len(section.codebooks)
        codes = "".join(f"({name}:{codebook} ){{{each}}}" for codebook in range(len(section.codebooks)))
        items.append(f"{name}:begin {codes}{name}:end ")
    return re.fullmatch(f"(text |{'|'.join(items)})*", "".join(words)) is not None


def judge(folder: Path) -> dict[str, Any]:
    """Judge the answers of `create`.

    Returns:
        "as_asked": kind of request -> share of the answers that show what was asked for: "digit", "two digits" (both, in
        this order), "video" (the same digit, moved on in its direction) and "sound". "answers": their number.
        "grammatical": share of them that obey the grammar. "judges": accuracy of the judges on the training media.
    """
    out, media = folder / "creations", folder / "media"
    rows = json.loads((out / "answers.json").read_text())
    digits, sounds = DigitJudge(media / "image_held_out.jsonl"), SoundJudge(media / "audio_held_out.jsonl")
    right: dict[str, list[bool]] = {}
    for row in rows:
        right.setdefault(row["asked"], []).append(_as_asked(folder, row, digits, sounds))
    vocabulary, sections = _vocabulary(folder / "any_to_any")
    return {
        "as_asked": {kind: sum(found) / len(found) for kind, found in right.items()},
        "answers": len(rows),
        "grammatical": sum(obeys_grammar(row["tokens"], vocabulary, sections) for row in rows) / len(rows),
        "judges": {
            "digits": digits.accuracy(media / "image_train.jsonl"),
            "sounds": sounds.accuracy(media / "audio_train.jsonl"),
        },
    }


def _vocabulary(run: Path) -> tuple[DiscreteVocabulary, Mapping[str, DiscreteConfig]]:
    """Marks and codes of a run."""
    folder = store.resolve(str(run))
    model = config_of(store.read_manifest(folder), folder, trust_plugins=False).model
    _, llama = resolve_language_model(model.language_model)
    return DiscreteVocabulary(llama.vocab_size, model.discrete), model.discrete


def _as_asked(folder: Path, row: Mapping[str, Any], digits: DigitJudge, sounds: SoundJudge) -> bool:
    """Whether an answer has the items that were asked for, and no others."""
    items = [part for part in row["parts"] if "media" in part]
    files = [folder / "creations" / part["media"] for part in items]
    if row["asked"] == "sound":
        return [part["modality"] for part in items] == [SOUND] and sounds.name(soundfile.read(files[0])[0]) == row["facts"][0]
    pictures = [read_picture(file) for file, part in zip(files, items) if part["modality"] == PICTURE]
    if row["asked"] == "video":
        return len(items) == len(pictures) == len(NEXT) and _goes_on(folder, row, pictures, digits)
    return len(items) == len(pictures) and [digits.name(picture) for picture in pictures] == row["facts"]


def _goes_on(folder: Path, row: Mapping[str, Any], pictures: Sequence[np.ndarray], digits: DigitJudge) -> bool:
    """Whether frames show the digit of a video, each further in its direction than the one before."""
    digit, direction = row["facts"]
    places = [centre(picture) for picture in (read_picture(folder / "media" / row["last"]), *pictures)]
    axis, sign = {"left": (1, -1), "right": (1, 1), "up": (0, -1), "down": (0, 1)}[direction]
    steps = sign * np.diff([place[axis] for place in places])
    return bool((steps > 0).all()) and all(digits.name(picture, SIDE) == digit for picture in pictures)


def main(argv: Sequence[str]) -> int:
    """Answer and judge in the quickstart's folder given by the arguments; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.quickstart.creations", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args(argv).folder
    create(folder)
    (folder / "creations" / "scores.json").write_text(json.dumps(judge(folder), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
