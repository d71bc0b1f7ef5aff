"""Unusable samples in whole training steps: masked, counted, reported; too many of them stop the run."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import losses, train
from PIL import Image
from ranks import run_ranks
from tiny import WORDS, make_config, png

from megatron_anymal.config import RunConfig
from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.index_folder import make_index
from megatron_anymal.data.manifest import write_shards
from megatron_anymal.data.records import DataError


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> RunConfig:
    """Sixteen samples. The picture of s5 has an intact header but truncated pixels; its text is the longest."""
    source = tmp_path_factory.mktemp("bad")
    out = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "JPEG", quality=95)
    (source / "cut.jpg").write_bytes(out.getvalue()[:1500])
    lines = []
    for n in range(16):
        (source / f"{n}.png").write_bytes(png(n))
        media = {"media": "cut.jpg" if n == 5 else f"{n}.png", "modality": "image"}
        text = "seven " * 40 if n == 5 else f"{WORDS[n]} {WORDS[n % 3]}"
        lines.append({"key": f"s{n}", "parts": [media, {"text": text}] if n % 4 else [{"text": text}]})
    (source / "m.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    write_shards(str(source / "m.jsonl"), str(source / "shards"))
    make_index(str(source / "shards"), IndexOptions(tokenizer_folder))
    config = make_config(str(source / "shards"), tokenizer_folder, source / "run")
    config.trainer.max_steps = 4
    config.data.seq_length, config.data.max_bad_share = 128, 0.125
    config.model.optim.eps = 1e-4
    config.model.modalities = {"image": config.model.modalities["image"]}
    config.exp_manager.checkpoint.every_n_train_steps = 0
    return config


def run_in(folder: Path, config: RunConfig, **data: Any) -> RunConfig:
    config = copy.deepcopy(config)
    config.exp_manager.explicit_log_dir = str(folder)
    for name, value in data.items():
        setattr(config.data, name, value)
    return config


def ledger(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "skipped_samples.jsonl").read_text().splitlines()]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def refused(config: RunConfig) -> str:
    with pytest.raises(DataError) as error:
        train(config)
    return str(error.value)


def test_a_bad_sample_is_masked_as_if_it_had_been_left_out(config: RunConfig, tmp_path: Path) -> None:
    masked, dropped, two = (tmp_path / name for name in ("masked", "dropped", "two"))
    run_ranks(1, train, run_in(masked, config))
    # The same sample left out in another way: it is the only one longer than this limit.
    run_ranks(1, train, run_in(dropped, config, seq_length=60, too_long="drop"))
    of_two = run_in(two, config)
    of_two.trainer.devices = 2
    run_ranks(2, train, of_two)
    np.testing.assert_allclose(losses(masked), losses(dropped), rtol=1e-6)
    np.testing.assert_allclose(losses(masked), losses(two), rtol=1e-6)
    # Sixteen samples, four batches of eight: it occurs in two batches.
    for folder, reason in ((masked, "decoded"), (dropped, "longer than data.seq_length"), (two, "decoded")):
        lines = ledger(folder)
        assert [line["sample"] for line in lines] == ["mix/s5"] * 2
        assert len({line["step"] for line in lines}) == 2
        assert all(reason in line["reason"] for line in lines)
        assert metrics(folder)[-1]["skipped_samples"] == 2
    # Three targets (two words and the end token) per other sample; fewer in the steps with the bad one.
    counts = [sum(n for name, n in row.items() if name.startswith("targets/")) for row in metrics(masked)]
    steps = {line["step"] for line in ledger(masked)}
    assert counts == [21 if row["step"] in steps else 24 for row in metrics(masked)]


def test_more_than_the_allowed_share_stops_the_run(config: RunConfig, tmp_path: Path) -> None:
    strict = run_in(tmp_path / "run", config, max_bad_share=0.12)
    strict.trainer.devices = 2
    for message in run_ranks(2, refused, strict):
        assert (
            "1 of 8 samples" in message and "data.max_bad_share=0.12" in message and "skipped_samples.jsonl" in message
        )
    [line] = ledger(tmp_path / "run")
    assert line["sample"] == "mix/s5"


def test_steps_made_again_are_listed_once(config: RunConfig, tmp_path: Path) -> None:
    twice = run_in(tmp_path / "run", config)
    twice.exp_manager.checkpoint.every_n_train_steps = 1
    twice.exp_manager.checkpoint.keep_last = 0
    run_ranks(1, train, twice)
    listed, last = ledger(tmp_path / "run"), metrics(tmp_path / "run")[-1]
    # Go back to before the first of them.
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        if int(folder.name.rpartition("_")[2]) >= listed[0]["step"]:
            shutil.rmtree(folder)
    (tmp_path / "run" / "skipped_samples.jsonl").open("a").write('{"step": 4, "sam')
    run_ranks(1, train, twice)
    assert ledger(tmp_path / "run") == listed and len(listed) == 2
    assert metrics(tmp_path / "run")[-1]["skipped_samples"] == last["skipped_samples"] == 2


def test_a_list_that_cannot_be_written_ends_no_run(config: RunConfig, tmp_path: Path) -> None:
    run = run_in(tmp_path / "run", config)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "skipped_samples.jsonl").symlink_to("/dev/full")
    [output] = run_ranks(1, said_in_training, run)
    assert len(losses(tmp_path / "run")) == 4
    assert output.count("could not be recorded") == 2 and output.count("skipped mix/s5") == 2


def said_in_training(config: RunConfig) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        train(config)
    return out.getvalue()
