"""docs/guides/data-sets.md: its commands on small folders in the layouts of the data sets that they name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import source_folders as made
from commands import PAGES, commands, run
from engine import train
from ranks import run_ranks
from tars import write_tar
from tiny import SPECIAL, make_config, make_tokenizer

from megatron_anymal.config import DatasetConfig, EncoderConfig, ModalityConfig, ProjectorConfig
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.data.sources.registry import FORMATS

PAGE = PAGES["docs/guides/data-sets.md"]


def laion(folder: Path) -> None:
    """Pictures of 300 x 260 pixels, a wide one and a small one, with scores from 0.2 to 0.45."""
    made.img2dataset(folder)
    for shard in folder.glob("*.tar"):
        members = []
        for n in range(6):
            size = {1: (600, 250), 2: (300, 100)}.get(n, (300, 260))
            known = (
                f'{{"similarity": {0.2 + 0.05 * n}, "NSFW": "{"UNLIKELY" if n != 3 else "NSFW"}", "status": "success"}}'
            )
            parts = (("jpg", made.jpeg(n, size)), ("txt", b"one two"), ("json", known.encode()))
            members += [(f"{shard.stem}{n:04d}.{ending}", data) for ending, data in parts]
        write_tar(shard, members)


def webvid(folder: Path) -> None:
    """Clips of video2dataset; one has a caption of one word."""
    members = []
    for n, caption in enumerate((b"a motion of one", b"two words here", b"one")):
        clip = made.mp4(n)
        members += [(f"{n:09d}.mp4", clip), (f"{n:09d}.txt", caption), (f"{n:09d}.json", b'{"status": "success"}')]
    write_tar(folder / "00000.tar", members)
    made.put(folder / "00000_stats.json", '{"count": 4, "successes": 3}')


def hub(folder: Path) -> None:
    """Two splits of a data set of the Hub."""
    import datasets

    rows = [{"picture": {"bytes": made.jpeg(n), "path": f"{n}.jpg"}, "caption": f"one {n}"} for n in range(4)]
    features = datasets.Features(picture=datasets.Image(), caption=datasets.Value("string"))
    for split in ("train", "test"):
        data = datasets.Dataset.from_list(rows, features=features)
        (folder / "data").mkdir(parents=True, exist_ok=True)
        data.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))


# Folder that a command names -> how to make it, the folder that is indexed, and samples used, left out and filtered.
DATA: dict[str, tuple[Callable[[Path], object], str, tuple[int, int, int]]] = {
    "laion": (laion, "laion", (4, 0, 8)),
    "coco": (made.coco, "data/coco", (20, 0, 0)),
    "webvid": (webvid, "webvid", (2, 0, 1)),
    "audiocaps": (lambda folder: made.audiocaps(folder, missing=1), "data/audiocaps", (5, 1, 0)),
    "clotho": (made.clotho, "data/clotho", (15, 0, 0)),
    "ego4d": (made.ego4d_imu, "data/ego4d", (6, 0, 0)),
    "llava": (made.llava, "data/llava", (13, 0, 0)),
    "collected": (made.sharegpt, "data/collected", (6, 0, 0)),
    "hub": (hub, "data/hub", (4, 0, 0)),
    "energon": (lambda folder: made.energon(folder, "VQASample"), "data/energon", (12, 0, 0)),
}


def test_the_page(tmp_path: Path) -> None:
    """The counts of every command, and then ten steps of a run on all that the commands prepared."""
    tokenizer = make_tokenizer(tmp_path / "checkpoints" / "Llama-3.2-1B")
    for name, (make, _, _) in DATA.items():
        make(tmp_path / name)
    ran = set()
    for command in commands(PAGE):
        [name] = [word.partition("/")[0] for word in command.split()[4:5]]
        _, folder, (used, left_out, filtered) = DATA[name]
        output = run(command, tmp_path)
        assert len(ShardIndex(str(tmp_path / folder))) == used, command
        total = used + left_out + filtered
        counts = f"{total} samples in = {used} used + {left_out} left out + {filtered} filtered"
        assert counts in output, f"{command}\n{output}"
        ran.add(name)
    assert ran == DATA.keys()
    _train_ten_steps(tokenizer, {name: str(tmp_path / folder) for name, (_, folder, _) in DATA.items()}, tmp_path)


def _train_ten_steps(tokenizer: str, folders: dict[str, str], tmp_path: Path) -> None:
    config = make_config("", tokenizer, tmp_path / "run")
    config.data.train = {name: DatasetConfig(path=folder) for name, folder in folders.items()}
    config.model.modalities["video"] = ModalityConfig(
        encoder=EncoderConfig(type="identity"),
        projector=ProjectorConfig(type="linear", num_layers=1, num_tokens=2),
        options={"num_frames": 2, "resolution": 8},
        placeholder=SPECIAL[5],
    )
    config.data.seq_length, config.model.global_batch_size = 256, 20
    config.trainer.max_steps, config.exp_manager.checkpoint.every_n_train_steps = 10, 0
    [result] = run_ranks(1, train, config)
    assert len(result["losses"]) == 10 and np.isfinite(result["losses"]).all()
    assert result["losses"][-1] < result["losses"][0]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seen = set().union(*rows)
    assert {f"loss/{kind}" for kind in ("image", "video", "audio", "imu")} <= seen
    assert not (tmp_path / "run" / "skipped_samples.jsonl").exists()


def test_every_layout_has_a_command_and_a_row() -> None:
    named = {layout for command in commands(PAGE) for layout in re.findall(r"--from (\S+)", command)}
    assert named == FORMATS.keys()
    rows = re.findall(
        r"^\| `--from ([\w-]+)` \| ", PAGES["docs/guides/data.md"].partition("## Published data sets")[2], re.M
    )
    assert rows == list(FORMATS)
