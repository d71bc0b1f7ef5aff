"""docs/start/your-own-data.md, followed word for word: own images and captions to an exported model that answers."""

from __future__ import annotations

import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "start" / "your-own-data.md").read_text()


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


def run(words: list[str], folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def command(line: str) -> list[str]:
    words = shlex.split(line)
    module = {"anymal": ["-m", "megatron_anymal"], "python": []}[words[0]]
    return [sys.executable, *module, *words[1:]]


@pytest.mark.timeout(600)
def test_the_page(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    [script] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    run([sys.executable, "-c", script], tmp_path)
    rehearsal, on_gpus = PAGE.split("## 3. Train on one GPU")
    lines = [x for block in re.findall(r"```bash\n(.*?)```", rehearsal, re.DOTALL) for x in block.splitlines()]
    said = {line: run(command(line), tmp_path) for line in lines}
    prepared = next(text for line, text in said.items() if "--out data/image_text " in line)
    assert "48 samples, 48 media items, 0 left out" in prepared and "96 members = 96 used" in prepared
    trained = next(text for line, text in said.items() if line.startswith("anymal launch"))
    assert re.search(r"step 40/40  loss [\d.]+  \[image [\d.]+ of \d+\]  [\d,]+ tokens/s  data wait", trained)
    assert "exit code 0, the run is complete" in trained
    answers = [text for line, text in said.items() if line.startswith("anymal generate")]
    # The export answers what the checkpoint does.
    assert len(answers) == 2 and answers[0].split() == answers[1].split() != []
    for line in [x for block in re.findall(r"```bash\n(.*?)```", on_gpus, re.DOTALL) for x in block.splitlines()]:
        if " pretrain " in line:
            # Jobs for GPUs: composed and checked.
            arguments = line[line.index(" pretrain ") :].split()
            shown = run(command(f"anymal {shlex.join(arguments)} --print-config"), tmp_path)
            assert "model.global_batch_size" in shown
