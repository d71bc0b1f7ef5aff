"""docs/start/your-own-data.md, followed word for word: own images and captions to an exported model that answers."""

from __future__ import annotations

import random
import re
import shlex
from pathlib import Path

import pytest
from commands import PAGES, blocks, commands, run
from PIL import Image, ImageDraw

PAGE = PAGES["docs/start/your-own-data.md"]


def photos(folder: Path) -> None:
    """A reader's images, each with a caption in a file next to it."""
    draws = random.Random(0)
    for split, count in (("train", 48), ("held_out", 16)):
        (folder / split).mkdir(parents=True)
        for number in range(count):
            colour, shape = draws.choice(["red", "blue"]), draws.choice(["circle", "square"])
            picture = Image.new("RGB", (96, 72), "white")
            canvas = ImageDraw.Draw(picture)
            (canvas.ellipse if shape == "circle" else canvas.rectangle)((20, 10, 68, 58), fill=colour)
            picture.save(folder / split / f"{number:05d}.jpg")
            (folder / split / f"{number:05d}.txt").write_text(f"a {colour} {shape} on white\n")


@pytest.mark.timeout(600)
def test_the_page(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    [script] = blocks(PAGE, "python")
    run(f"python -c {shlex.quote(script)}", tmp_path)
    rehearsal, on_gpus = PAGE.split("## 3. Train on one GPU")
    said = {line: run(line, tmp_path) for line in commands(rehearsal)}
    prepared = next(text for line, text in said.items() if "--out data/image_text " in line)
    assert "48 samples, 48 media items, 0 left out" in prepared and "96 members = 96 used" in prepared
    trained = next(text for line, text in said.items() if line.startswith("anymal launch"))
    assert re.search(r"step 40/40  loss [\d.]+  \[image [\d.]+ of \d+\]  [\d,]+ tokens/s  data wait", trained)
    assert "exit code 0, the run is complete" in trained
    answers = [text.splitlines()[-1] for line, text in said.items() if line.startswith("anymal generate")]
    # The export answers what the checkpoint does.
    assert len(answers) == 2 and answers[0] == answers[1] != ""
    for line in commands(on_gpus):
        if verb := re.search(r" pretrain .*", line):
            # Jobs for GPUs: composed and checked.
            assert "model.global_batch_size" in run(f"anymal{verb[0]} --print-config", tmp_path)
