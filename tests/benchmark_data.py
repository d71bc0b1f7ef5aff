"""Small data folders with the files, columns and answer formats of the public benchmarks, one per task."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from tiny import flac, png

COUNT = 5


def picture(seed: int) -> dict[str, Any]:
    """A cell of an image column."""
    return {"bytes": png(seed), "path": None}


def parquet(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as a parquet file, as the hub stores them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def vqav2(folder: Path) -> None:
    rows = [
        {
            "question_type": "what is" if n % 2 else "is this",
            "multiple_choice_answer": "two",
            "answers": [
                {"answer": "two" if m < 2 * n else "three", "answer_confidence": "yes", "answer_id": m + 1}
                for m in range(10)
            ],
            "image_id": 458752 + n,
            "answer_type": "other",
            "question_id": 458752000 + n,
            "question": f"what is this {'a ' * n}?",
            "image": picture(n),
        }
        for n in range(COUNT)
    ]
    parquet(folder / "data" / "validation-00000-of-00002.parquet", rows[:3])
    parquet(folder / "data" / "validation-00001-of-00002.parquet", rows[3:])


def _answers(folder: Path, file: str, **more: Any) -> None:
    rows = [
        {"question_id": n, "question": "what is this?", "image": picture(n), "answers": ["two"] * 4 + ["a"] * 6, **more}
        for n in range(COUNT)
    ]
    parquet(folder / "data" / file, rows)


def textvqa(folder: Path) -> None:
    _answers(folder, "validation-00000-of-00001.parquet", image_classes=["Sign"], ocr_tokens=["two"], set_name="val")


def okvqa(folder: Path) -> None:
    _answers(folder, "val2014-00000-of-00001.parquet", question_type="one", answer_type="other")


def vizwiz(folder: Path) -> None:
    _answers(folder, "val-00000-of-00001.parquet", category="unanswerable")


def coco_captions(folder: Path) -> None:
    rows = []
    for n in range(COUNT):
        name = f"COCO_val2014_{n:012d}.jpg"
        (folder / "val2014").mkdir(parents=True, exist_ok=True)
        (folder / "val2014" / name).write_bytes(png(n))
        sentences = [f"a walk of {word} motion" for word in ("two", "three", "four", "five", "six")[: n + 1]]
        rows.append({"filepath": "val2014", "filename": name, "imgid": n, "split": "test", "sentences": sentences})
    parquet(folder / "data" / "test-00000-of-00001-0123456789abcdef.parquet", rows)


def mmmu(folder: Path) -> None:
    rows = [
        {
            "id": f"validation_Art_{n}",
            "question": "what is <image 1> ?" + (" <image 2>" if n == 1 else ""),
            "options": "[]" if n == 4 else "['one', 'two <image 2>', 'three']",
            "answer": "['two', '2']" if n == 4 else "B",
            "question_type": "open" if n == 4 else "multiple-choice",
            "explanation": "",
            **{f"image_{m}": picture(m) if m < 3 else None for m in range(1, 8)},
        }
        for n in range(COUNT)
    ]
    parquet(folder / "data" / "validation-00000-of-00001.parquet", rows)


def mmbench(folder: Path) -> None:
    rows = [
        {
            "index": n,
            "question": "what is this?",
            "hint": "a sound of motion" if n else "nan",
            "answer": "AB"[n % 2],
            "A": "one",
            "B": "two",
            "C": "three" if n else "nan",
            "D": "nan",
            "category": "ocr",
            "image": picture(n),
            "source": "x",
            "L2-category": "coarse_perception" if n % 2 else "finegrained_perception",
            "comment": "nan",
            "split": "dev",
        }
        for n in range(COUNT)
    ]
    parquet(folder / "en" / "dev-00000-of-00001.parquet", rows)
    parquet(folder / "en" / "test-00000-of-00001.parquet", rows)


def ai2d(folder: Path) -> None:
    rows = [
        {
            "question": "what is this?",
            "options": ["one", "two", "run"],
            "answer": str(n % 3),
            "image": picture(n),
        }
        for n in range(COUNT)
    ]
    parquet(folder / "data" / "test-00000-of-00001.parquet", rows)


def mathvista(folder: Path) -> None:
    kinds = [
        ("multi_choice", ["one", "two"], "two", "text", None),
        ("free_form", None, "3", "integer", None),
        ("free_form", None, "1.5", "float", 1.0),
        ("free_form", None, "[1, 2]", "list", None),
    ]
    rows = [
        {
            "pid": str(n + 1),
            "question": "what is this?",
            "image": f"images/{n + 1}.jpg",
            "decoded_image": picture(n),
            "choices": choices,
            "unit": "m" if n == 2 else None,
            "precision": precision,
            "answer": answer,
            "question_type": question_type,
            "answer_type": answer_type,
            "metadata": {"category": "math-targeted-vqa", "grade": "high school"},
            "query": "",
        }
        for n, (question_type, choices, answer, answer_type, precision) in enumerate(kinds)
    ]
    parquet(folder / "data" / "testmini-00000-of-00001-725687bf7a18d64b.parquet", rows)


def chartqa(folder: Path) -> None:
    rows = [
        {
            "type": ("human_test", "augmented_test")[n % 2],
            "question": "what?",
            "answer": "12.5",
            "image": picture(n),
        }
        for n in range(COUNT)
    ]
    parquet(folder / "data" / "test-00000-of-00001-e2cd0b7a0f9eb20d.parquet", rows)


def hateful_memes(folder: Path) -> None:
    (folder / "img").mkdir(parents=True, exist_ok=True)
    lines = []
    for n in range(COUNT):
        (folder / "img" / f"{8000 + n}.png").write_bytes(png(n))
        row = {"id": 8000 + n, "img": f"img/{8000 + n}.png", "label": n % 2, "text": "what a sound " * (n + 1)}
        lines.append(json.dumps(row) + "\n")
    (folder / "dev_seen.jsonl").write_text("".join(lines))


def _captions_of_sounds() -> list[dict[str, Any]]:
    """Two captions per clip."""
    return [
        {
            "audiocap_id": 10 * n + m,
            "youtube_id": f"clip{n}",
            "start_time": 30 * n,
            "caption": f"a sound of {('two', 'three')[m]} motion",
        }
        for n in range(COUNT)
        for m in range(2)
    ]


def audiocaps(folder: Path) -> None:
    rows = [{**row, "audio": {"bytes": flac(row["start_time"]), "path": None}} for row in _captions_of_sounds()]
    parquet(folder / "data" / "test-00000-of-00001.parquet", rows)


def audiocaps_files(folder: Path) -> None:
    import soundfile

    (folder / "audio").mkdir(parents=True, exist_ok=True)
    rows = _captions_of_sounds()
    with (folder / "test.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for n in range(COUNT):
        out = io.BytesIO()
        soundfile.write(out, np.random.default_rng(n).uniform(-0.5, 0.5, 4000), 8000, format="WAV")
        (folder / "audio" / f"clip{n}.wav").write_bytes(out.getvalue())


def egoschema(folder: Path, video: bytes = b"") -> None:
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    rows = []
    for n in range(COUNT):
        (folder / "videos" / f"0074f737-{n}.mp4").write_bytes(video)
        options = [f"{letter}. a {word} walk" for letter, word in zip("ABCDE", ("one", "two", "three", "four", "five"))]
        row = {"question_idx": str(n), "question": "what is this?", "video_idx": f"0074f737-{n}", "option": options}
        rows.append({**row, "answer": str(n % 5)})
    parquet(folder / "Subset" / "test-00000-of-00001.parquet", rows)
    parquet(folder / "GENERATION" / "test-00000-of-00001.parquet", [{**row, "answer": None} for row in rows])


def mvbench(folder: Path, video: bytes = b"") -> None:
    for name, subfolder in (("action_sequence", "star/Charades_segment"), ("moving_count", "clevrer/video_validation")):
        (folder / "video" / subfolder).mkdir(parents=True, exist_ok=True)
        (folder / "video" / subfolder / "a.mp4").write_bytes(video)
        row = {"video": "a.mp4", "question": "what is this?", "candidates": ["a walk", "a run"], "answer": "a run"}
        (folder / "json").mkdir(exist_ok=True)
        (folder / "json" / f"{name}.json").write_text(json.dumps([row, row]))


def ego4d_imu(folder: Path) -> None:
    (folder / "v2" / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "v2" / "imu").mkdir(exist_ok=True)
    texts = ["#C C looks around", "#O man X walks", "#C C walks #unsure", "#c c runs", "#C C stands at the end"]
    times = (3.0, 3.5, 4.0, 6.25, 9.9)
    narrations = [
        {"timestamp_sec": seconds, "timestamp_frame": 0, "narration_text": text, "annotation_uid": "x"}
        for seconds, text in zip(times, texts)
    ]
    videos = {
        uid: {"status": "complete", "narration_pass_1": {"narrations": narrations, "summaries": []}}
        for uid in ("aaaa", "bbbb", "in-training")
    }
    (folder / "v2" / "annotations" / "narration.json").write_text(json.dumps({"version": "2", "videos": videos}))
    head = "component_idx,component_timestamp_ms,canonical_timestamp_ms,gyro_x,gyro_y,gyro_z,accl_x,accl_y,accl_z\n"
    for seed, uid in enumerate(("aaaa", "bbbb")):
        values = np.random.default_rng(seed).normal(size=(500, 6))
        lines = [f"0,{20 * n},{20 * n}," + ",".join(f"{value:.5f}" for value in row) for n, row in enumerate(values)]
        (folder / "v2" / "imu" / f"{uid}.csv").write_text(head + "\n".join(lines) + "\n")
    (folder / "test_videos.txt").write_text("aaaa\nbbbb\n")


MAKERS: dict[str, Callable[..., None]] = {
    maker.__name__: maker
    for maker in (
        vqav2,
        textvqa,
        okvqa,
        vizwiz,
        coco_captions,
        mmmu,
        mmbench,
        ai2d,
        mathvista,
        chartqa,
        hateful_memes,
        audiocaps,
        audiocaps_files,
        egoschema,
        mvbench,
        ego4d_imu,
    )
}
VIDEO_TASKS = ("egoschema", "mvbench")


def video_file() -> bytes:
    """Two seconds of noise as an mp4 file."""
    import av

    rng = np.random.default_rng(0)
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        with av.open(file.name, "w") as output:
            stream = output.add_stream("mpeg4", rate=8)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            for _ in range(16):
                frame = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            output.mux(stream.encode(None))
        return Path(file.name).read_bytes()


def make_all(root: Path, video: bytes) -> None:
    """A folder for every task."""
    for name, maker in MAKERS.items():
        (root / name).mkdir(parents=True)
        maker(root / name, *([video] if name in VIDEO_TASKS else []))
