"""Damaged lists of samples: each is read, or refused in one line; no sample is lost without being named."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import source_folders as made
from fuzz.mutations import damage

from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_writer import pack
from megatron_anymal.data.source_records import Source
from megatron_anymal.data.sources.registry import open_source
from megatron_anymal.data.sources.source_format import SourceOptions

FEW = 60
# Layout -> how to make a folder, its file to damage, and further options.
DATA: dict[str, tuple[Callable[[Path], Path], str, dict[str, str]]] = {
    "llava": (lambda folder: made.llava(folder, 4), "llava_v1_5_mix665k.json", {"media": "images"}),
    "sharegpt": (lambda folder: made.sharegpt(folder, 4), "mllm_demo.json", {}),
    "coco": (made.coco, "annotations/captions_train2017.json", {"media": "train2017"}),
    "audiocaps": (made.audiocaps, "train.csv", {"media": "audio"}),
    "clotho": (made.clotho, "clotho_captions_development.csv", {"media": "development"}),
    "energon": (lambda folder: made.energon(folder, "VQASample", 3), "shards/train_0.tar", {}),
    "ego4d-imu": (lambda folder: made.ego4d_imu(folder, 1, 5.0), "annotations/narration.json", {}),
    "ego4d-imu signal": (lambda folder: made.ego4d_imu(folder, 1, 5.0), "imu/video-0.csv", {}),
}
ODD: list[Any] = [None, 3, -1.5, True, "", "x", [], {}, ["x"], {"x": 1}, [None], "../..", "\0", "x" * 500]


def changed(rng: random.Random, value: Any) -> Any:
    """A copy of a JSON value with one value inside it replaced, or one key removed."""
    value = copy.deepcopy(value)
    holders = list(containers(value))
    holder, key = rng.choice(holders)
    if isinstance(holder, dict) and rng.random() < 0.3:
        del holder[key]
    else:
        holder[key] = copy.deepcopy(rng.choice(ODD))
    return value


def containers(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each container inside a value with each of its keys."""
    keys = range(len(value)) if isinstance(value, list) else list(value) if isinstance(value, dict) else ()
    for key in keys:
        yield value, key
        yield from containers(value[key])


def options_of(layout: str, folder: Path, file: str, further: dict[str, str]) -> SourceOptions:
    if layout == "energon":
        return SourceOptions(folder)
    if layout == "ego4d-imu":
        return SourceOptions(folder / "imu", narrations=folder / "annotations" / "narration.json")
    return SourceOptions(folder / file, **{name: folder / value for name, value in further.items()})


@pytest.mark.parametrize("name", DATA)
def test_damage_is_named_or_refused(name: str, tmp_path: Path) -> None:
    make, file, further = DATA[name]
    folder = make(tmp_path / "data")
    layout, path = name.partition(" ")[0], folder / file
    original = path.read_bytes()
    outcomes = set()
    for number in range(FEW):
        rng = random.Random(f"{name} {number}")
        if path.suffix == ".json" and number % 3:
            path.write_text(json.dumps(changed(rng, json.loads(original))))
        else:
            path.write_bytes(damage(rng, original).data)
        out = tmp_path / "out"
        try:
            source = open_source(layout, options_of(layout, folder, file, further))
            assert isinstance(source, Source)
            # The writer checks that all samples are accounted for.
            pack(source, str(out), samples_per_shard=4, max_bad_share=1.0)
            outcomes.add("read")
        except DataError as error:
            assert len(" ".join(str(error).split())) < 1000, str(error)
            assert not list(out.glob("*.part"))
            outcomes.add("refused")
        shutil.rmtree(out, ignore_errors=True)
    assert "read" in outcomes
