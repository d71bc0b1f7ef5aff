"""docs/start/your-own-data.md, followed word for word: own images and captions to an exported model that answers."""

from __future__ import annotations

import json
import random
import re
import shlex
from pathlib import Path

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


def flaws(folder: Path) -> dict[str, str]:
    """Files as users have them; what the script must report about those that it leaves out."""
    Image.new("L", (40, 60)).save(folder / "00048.PNG")
    (folder / "00048.txt").write_bytes(b"\xef\xbb\xbfein gr\xc3\xbcnes Quadrat,\nzweizeilig\n")
    for name in ("00049", "00050", "00051"):
        Image.new("RGB", (8, 8)).save(folder / f"{name}.jpg")
    (folder / "00050.txt").write_bytes("grün".encode("latin-1"))
    (folder / "00051.txt").write_text(" \n")
    (folder / "notes.md").write_text("mine")
    return {
        "00049.jpg": "No such file",
        "00050.jpg": "can't decode byte",
        "00051.jpg": "its caption is empty",
        "notes.md": "not an image",
    }


def test_the_page(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    left_out = flaws(tmp_path / "photos" / "train")
    [script] = blocks(PAGE, "python")
    made = run(f"python -c {shlex.quote(script)}", tmp_path)
    named = dict(re.findall(r"^left out: photos/train/(\S+): (.*)$", made, re.MULTILINE))
    assert named.keys() == left_out.keys() and all(why in named[name] for name, why in left_out.items())
    assert "photos/train.jsonl: 49 samples of 104 files" in made and "held_out.jsonl: 16 samples of 32 files" in made
    *_, last = (tmp_path / "photos" / "train.jsonl").read_text().splitlines()
    assert json.loads(last)["parts"][1] == {"text": " ein grünes Quadrat, zweizeilig"}
    rehearsal, on_gpus = PAGE.split("## 3. Train on one GPU")
    outputs = {line: run(line, tmp_path) for line in commands(rehearsal)}
    prepared = next(text for line, text in outputs.items() if "--out data/image_text " in line)
    assert "49 samples, 49 media items, 0 left out" in prepared and "98 members = 98 used" in prepared
    trained = next(text for line, text in outputs.items() if line.startswith("anymal launch"))
    assert re.search(r"step 40/40  loss [\d.]+  \[image [\d.]+ of \d+\]  [\d,]+ tokens/s  data wait", trained)
    assert "exit code 0, the run is complete" in trained
    answers = [text.splitlines()[-1] for line, text in outputs.items() if line.startswith("anymal generate")]
    # The export answers what the checkpoint does.
    assert len(answers) == 2 and answers[0] == answers[1] != ""
    for line in commands(on_gpus):
        if verb := re.search(r" pretrain .*", line):
            # Jobs for GPUs: composed and checked.
            assert "model.global_batch_size" in run(f"anymal{verb[0]} --print-config", tmp_path)
