"""Small folders in the layouts of published data sets, with real media and the flaws that such data have."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image
from tars import write_tar


def jpeg(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """A JPEG of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def wav(seed: int, seconds: float = 0.5, rate: int = 8000) -> bytes:
    """A WAV file of noise."""
    out = io.BytesIO()
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, int(seconds * rate))
    soundfile.write(out, noise, rate, format="WAV")
    return out.getvalue()


def mp4(seed: int, frames: int = 8) -> bytes:
    """A video of random frames."""
    import av

    out = io.BytesIO()
    draws = np.random.default_rng(seed)
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(frames):
            pixels = draws.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def put(path: Path, data: bytes | str) -> Path:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def llava(folder: Path, count: int = 12) -> Path:
    """LLaVA's mix: pictures of several data sets, and text only. Identifiers repeat, as in the original."""
    entries: list[dict[str, Any]] = []
    for n in range(count):
        name = f"{['coco/train2017', 'gqa/images', 'vg/VG_100K'][n % 3]}/{n:012d}.jpg"
        turns = [
            {"from": "human", "value": "<image>\nwhat is this" if n % 2 else "what is this\n<image>"},
            {"from": "gpt", "value": f"one {['two', 'three', 'four'][n % 3]}"},
            {"from": "human", "value": "what sound"},
            {"from": "gpt", "value": "five"},
        ]
        put(folder / "images" / name, jpeg(n))
        entries.append({"id": f"{n // 2:012d}", "image": name, "conversations": turns})
    text = [{"from": "human", "value": "what is a <video> of motion"}, {"from": "gpt", "value": "a sound"}]
    entries.append({"id": "text_only", "conversations": text})
    put(folder / "llava_v1_5_mix665k.json", json.dumps(entries, indent=2))
    return folder


def sharegpt(folder: Path, count: int = 6) -> Path:
    """LLaMA-Factory's multimodal layout: `messages` with `role` and `content`, and a column of paths per kind."""
    entries: list[dict[str, Any]] = []
    for n in range(count):
        put(folder / "mllm_demo_data" / f"{n}.jpg", jpeg(n))
        put(folder / "mllm_demo_data" / f"{n}.wav", wav(n))
        user = {"role": "user", "content": "<image>what is <image>this<audio>"}
        messages = [{"role": "system", "content": "a"}, user, {"role": "assistant", "content": "one two"}]
        images = [f"mllm_demo_data/{n}.jpg", f"mllm_demo_data/{(n + 1) % count}.jpg"]
        entries.append({"messages": messages, "images": images, "audios": [f"mllm_demo_data/{n}.wav"]})
    put(folder / "mllm_demo.json", json.dumps(entries))
    return folder


def coco(folder: Path, count: int = 4, captions: int = 5) -> Path:
    """COCO's captions: five for each image, in an order of their own."""
    images = [{"license": 3, "file_name": f"{n:012d}.jpg", "height": 30, "width": 40, "id": n} for n in range(count)]
    for image in images:
        put(folder / "train2017" / str(image["file_name"]), jpeg(int(str(image["id"]))))
    annotations = [
        {"image_id": n % count, "id": 48 + n, "caption": f"A one {' two' * (n // count)}.\n"}
        for n in range(count * captions)
    ]
    content = {"info": {"year": 2017}, "images": images, "licenses": [], "annotations": annotations}
    put(folder / "annotations" / "captions_train2017.json", json.dumps(content))
    return folder


def audiocaps(
    folder: Path, names: Sequence[str] = ("{youtube_id}_{start_time}",), count: int = 6, missing: int = 0
) -> Path:
    """AudioCaps: the table, and sounds named by `names` in turn; the first `missing` were not downloaded."""
    rows = []
    for n in range(count):
        row = {"audiocap_id": str(91_139 + n), "youtube_id": f"r1nicOVt-{n}", "start_time": str(30 * n)}
        row["caption"] = f"one, two and {n}"
        rows.append(row)
        name = names[n % len(names)].format(**row, ms=30_000 * n, end_ms=30_000 * n + 10_000)
        if n >= missing:
            put(folder / "audio" / f"{name}.wav", wav(n))
    write_table(folder / "train.csv", rows)
    return folder


def clotho(folder: Path, count: int = 3) -> Path:
    """Clotho: five captions of each sound."""
    rows = []
    for n in range(count):
        captions = {f"caption_{k}": f"a sound of {' '.join(['motion'] * k)}" for k in range(1, 6)}
        rows.append({"file_name": f"Distorted AM Radio {n}.wav", **captions})
        put(folder / "development" / f"Distorted AM Radio {n}.wav", wav(n))
    write_table(folder / "clotho_captions_development.csv", rows)
    return folder


def img2dataset(folder: Path, shards: int = 2, samples: int = 6) -> Path:
    """Shards of img2dataset: picture, caption and metadata; a file next to each shard counts failed downloads."""
    for shard in range(shards):
        members = []
        for n in range(samples):
            key = f"{shard:05d}{n:04d}"
            size = (40, 30) if n % 3 else (90, 30)
            known = {
                "url": f"https://images.invalid/{key}.jpg",
                "caption": "one two",
                "similarity": 0.2 + 0.05 * n,
                "NSFW": "UNLIKELY" if n else "UNSURE",
                "key": key,
                "status": "success",
                "error_message": None,
                # A column of the list of URLs, which does not make the file a sample of this package.
                "parts": 3,
                "width": size[0],
                "height": size[1],
                "exif": "{}",
            }
            members += [(f"{key}.jpg", jpeg(n, size)), (f"{key}.txt", b"one two"), (f"{key}.json", _json(known))]
        write_tar(folder / f"{shard:05d}.tar", members)
        put(folder / f"{shard:05d}.parquet", b"PAR1")
        stats = {"count": samples + 4, "successes": samples, "failed_to_download": 3, "failed_to_resize": 1}
        put(folder / f"{shard:05d}_stats.json", json.dumps(stats))
    return folder


def energon(folder: Path, kind: str, count: int = 6, fields: dict[str, str] | None = None) -> Path:
    """An energon data set of the given sample type, with its shards in a folder of their own."""
    for shard, split in enumerate(("train", "train", "val")):
        members = []
        for n in range(count):
            key = f"sample_{shard}{n:03d}"
            conversation = [{"from": "human", "value": "<image>\nwhat is"}, {"from": "gpt", "value": "one two"}]
            members += [(f"{key}.jpg", jpeg(n)), (f"{key}.txt", b"a sound"), (f"{key}.json", _json(conversation))]
        write_tar(folder / "shards" / f"{split}_{shard}.tar", members)
    maps = {
        "CaptioningSample": {"image": "jpg", "caption": "txt"},
        "VQASample": {"image": "jpg", "context": "json[0][value]", "answers": "json[1][value]"},
    }
    mapped = "".join(f"  {name}: {value}\n" for name, value in (fields or maps.get(kind, {})).items())
    described = f"sample_type:\n  __module__: megatron.energon\n  __class__: {kind}\nfield_map:\n{mapped}"
    put(folder / ".nv-meta" / "dataset.yaml", described)
    put(folder / ".nv-meta" / "split.yaml", SPLITS)
    return folder


SPLITS = """exclude: []
split_parts:
  train:
  - shards/train_{0..1}.tar
  val:
  - shards/val_2.tar
"""


def ego4d_imu(folder: Path, videos: int = 2, seconds: float = 20.0) -> Path:
    """Ego4D: an IMU file per video, some rows before the canonical video, and narrations of more videos than those."""
    passes: dict[str, Any] = {}
    for video in range(videos):
        rows = ["component_idx,component_timestamp_ms,canonical_timestamp_ms,gyro_x,gyro_y,gyro_z,accl_x,accl_y,accl_z"]
        for step in range(-20, int(seconds * 200)):
            time = step * 1000 / 201
            values = ",".join(f"{math.sin(step * k / 50 + video):.6f}" for k in range(1, 7))
            rows.append(f"0,{time + 100},{time if step >= 0 else ''},{values}")
        put(folder / "imu" / f"video-{video}.csv", "\n".join(rows) + "\n")
    for video in range(videos + 3):
        narrations = [
            {"timestamp_sec": float(t), "timestamp_frame": t * 30, "narration_text": text, "annotation_uid": f"u{t}"}
            for t, text in ((4, "#C C walk one"), (9, "#O man x run"), (15, "#C C is #unsure"))
        ]
        passes[f"video-{video}"] = {
            "narration_pass_1": {"narrations": narrations, "summaries": []},
            "status": "complete",
        }
    put(folder / "annotations" / "narration.json", json.dumps(passes))
    redacted = {
        video: {"narrations": [{"time": n["timestamp_sec"], "text": n["narration_text"]} for n in one["narrations"]]}
        for video, one in ((video, content["narration_pass_1"]) for video, content in passes.items())
    }
    put(folder / "annotations" / "all_narrations_redacted.json", json.dumps({"version": "2.0", "videos": redacted}))
    return folder


def write_table(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write a .csv as pandas does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=4).encode()
