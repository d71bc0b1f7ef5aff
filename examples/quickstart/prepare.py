"""Prepare the quickstart's inputs under one folder: media, text, tokenizer, image encoder and shards.

python -m examples.quickstart.prepare FOLDER
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.quickstart.corpus import text_lines, train_tokenizer, write_lines
from examples.quickstart.instructions import (
    chat_lines,
    instruction_lines,
    pairs_of,
    text_instruction_lines,
    writing_lines,
)
from examples.quickstart.media import SPLITS, QuickstartSizes, write_media
from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.index_folder import make_index
from megatron_anymal.data.manifest import write_shards

MODALITIES = ("image", "video", "audio", "imu")
# Held-out questions and held-out preference pairs per modality; the held-out media suffice for both.
HELD_OUT = 80
HELD_OUT_PAIRS = 32
# Training conversations without media.
TEXTS = 600


def prepare_quickstart(folder: Path, sizes: QuickstartSizes | None = None, encoder_steps: int = 500) -> None:
    """Create everything that the quickstart's configurations refer to, unless it exists already.

    FOLDER/media          files and manifests
    FOLDER/tokenizer      a small byte-pair tokenizer, trained on the texts
    FOLDER/image_encoder  a small CLIP vision tower, trained contrastively on the training images
    FOLDER/data/NAME      shards with an index: corpora text, writing and chats; MODALITY_train, MODALITY_held_out;
                          instructions_MODALITY and preferences_MODALITY of both ("text": without media)
    """
    finished = folder / "prepared"
    if finished.is_file():
        print(f"{folder} is already prepared; delete it to start over")
        return
    # It takes seconds to import.
    from examples.quickstart.vision import train_image_encoder

    media = folder / "media"
    manifests = write_media(media, sizes=sizes)
    sources = {
        "text": write_lines(media / "text.jsonl", text_lines(8000)),
        "writing": write_lines(media / "writing.jsonl", writing_lines(4000)),
        "chats": write_lines(media / "chats.jsonl", chat_lines(3000)),
    }
    tokenizer = str(folder / "tokenizer")
    train_tokenizer(list(sources.values()), tokenizer)
    train_image_encoder(manifests["image"]["train"], tokenizer, folder / "image_encoder", encoder_steps)
    for split in SPLITS:
        items = {name: _read(manifests[name][split]) for name in MODALITIES}
        sources.update({f"{name}_{split}": manifests[name][split] for name in MODALITIES})
        for name, lines in conversations(items, split).items():
            sources[f"{name}_{split}"] = write_lines(media / f"{name}_{split}.jsonl", lines)
    for name, manifest in sources.items():
        out = str(folder / "data" / name)
        write_shards(str(manifest), out, overwrite=True)
        make_index(out, IndexOptions(tokenizer))
    finished.touch()


def conversations(items: dict[str, list[dict[str, Any]]], split: str) -> dict[str, list[dict[str, Any]]]:
    """Manifest lines of instructions_MODALITY and preferences_MODALITY about a split's media.

    Args:
        items: manifest lines of the media by modality; conversations without media are returned as "text".
    """
    trained = split == "train"
    asked: dict[str, list[dict[str, Any]]] = {
        "text": text_instruction_lines(TEXTS if trained else HELD_OUT // 2, split),
    }
    compared = {"text": text_instruction_lines(TEXTS if trained else HELD_OUT_PAIRS, split, seed=1)}
    for name, lines in items.items():
        # There are few images, and those of one digit vary a lot.
        often = 2 if name == "image" and trained else 1
        asked[name] = instruction_lines(lines * often if trained else lines[:HELD_OUT], split)
        compared[name] = instruction_lines(lines[::2] if trained else lines[-HELD_OUT_PAIRS:], split, seed=1)
    return {
        **{f"instructions_{name}": lines for name, lines in asked.items()},
        **{f"preferences_{name}": pairs_of(lines) for name, lines in compared.items()},
    }


def _read(manifest: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]


def main(argv: Sequence[str]) -> int:
    """Prepare the inputs in the folder given by the arguments; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.quickstart.prepare", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    prepare_quickstart(parser.parse_args(argv).folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
