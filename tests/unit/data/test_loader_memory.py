"""Loader processes that grow are restarted, and the data do not change."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine import train
from ranks import run_ranks
from replicas import replica_data
from tiny import make_config, make_shards, png
from torch.utils.data._utils.pin_memory import pin_memory

from megatron_anymal.config import ConfigError, LoraConfig, RunConfig
from megatron_anymal.config.validation import check
from megatron_anymal.data.loader import steps
from megatron_anymal.data.loader_workers import LoaderMemory, ReadMicroBatch, WorkerMemory
from megatron_anymal.data.micro_batch import MicroBatch
from megatron_anymal.modalities import load_plugins
from megatron_anymal.processes.process_memory import GIB, resident_bytes

MIB = 2**20
LIMIT = 1 / 32
# Images, each of which leaks 8 MiB when it is decoded.
PLUGIN = """
from megatron_anymal.modalities import register
from megatron_anymal.modalities.image import ImageModality

left_behind = []


@register("leaky")
class LeakyImage(ImageModality):
    extensions = ("leaky",)

    def decode(self, data, extension, attributes, pieces):
        left_behind.append(bytearray(b"x" * 2**23))
        return super().decode(data, extension, attributes, pieces)
"""


def leaking_run(folder: Path, tokenizer: str) -> RunConfig:
    """In a rank: a run of two loader processes on images that leak, with dropout."""
    (folder / "leaky.py").write_text(PLUGIN)
    load_plugins([str(folder / "leaky.py")])
    shards = make_shards(folder / "leaky", tokenizer, 24, ("leaky", "text"), makers={"leaky": ("leaky", png, {})})
    config = make_config(shards, tokenizer, folder / "run")
    config.model.plugins = [str(folder / "leaky.py")]
    config.model.modalities = {"leaky": config.model.modalities["image"]}
    config.model.lora = LoraConfig(r=2, dropout=0.2)
    config.data.num_workers, config.data.prefetch_steps, config.trainer.max_steps = 2, 1, 10
    return config


def tensors(config: RunConfig, workers: int, memory: LoaderMemory | None) -> list[torch.Tensor]:
    """All tensors of the run's steps, in order."""
    data = replica_data(config)
    clones: list[torch.Tensor] = []
    for _, batches in steps(
        data.planner,
        data.reader,
        replica=0,
        start=0,
        stop=config.trainer.max_steps,
        num_workers=workers,
        prefetch_steps=1,
        memory=memory,
    ):
        for batch in batches:
            batch.with_tensors(lambda tensor: clones.append(tensor.clone()) or tensor)  # type: ignore[func-returns-value]
    return clones


def read_with_and_without(folder: Path, tokenizer: str) -> dict[str, Any]:
    config = leaking_run(folder, tokenizer)
    drawn = torch.get_rng_state()
    limited, watched = LoaderMemory(LIMIT), LoaderMemory()
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        limited_tensors = tensors(config, 2, limited)
    untouched = torch.equal(drawn, torch.get_rng_state())
    tensors(config, 2, watched)
    expected = tensors(config, 0, None)
    same = len(limited_tensors) == len(expected) and all(map(torch.equal, limited_tensors, expected))
    return {
        "same": same,
        "untouched": untouched,
        "said": stderr.getvalue(),
        "limited": limited.largest(),
        "watched": watched.largest(),
    }


@pytest.fixture(scope="module")
def read(tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(1, read_with_and_without, tmp_path_factory.mktemp("leak"), tokenizer_folder)[0]


def test_restarted_processes_read_the_same(read: dict[str, Any]) -> None:
    assert read["same"]
    # Neither a start nor a restart draws from the training process's random numbers.
    assert read["untouched"]
    pids = re.findall(r"\(pid (\d+)\)", read["said"])
    assert len(pids) == len(set(pids)) >= 3
    # About 40 images of 8 MiB over two processes, against a limit of 32 MiB and at most two steps that are in flight.
    assert read["watched"][1] > 120 * MIB > read["limited"][1] > 0


def test_the_log_names_the_growth(read: dict[str, Any]) -> None:
    lines = re.findall(
        r"^warning: loader process [01] \(pid \d+\) of rank \S+ on \S+ grew from ([\d.]+) to ([\d.]+) GiB in (\d+) "
        r"micro-batch\(es\), more than data\.worker_memory_limit_gib=0\.03125 allows\.",
        read["said"],
        re.MULTILINE,
    )
    assert len(lines) == read["said"].count("warning") >= 3
    for start, now, count in lines:
        assert 0.02 < float(now) - float(start) < 0.12 and 1 <= int(count) <= 10


def leak(folder: Path, tokenizer: str, limit: float) -> dict[str, Any]:
    config = leaking_run(folder, tokenizer)
    config.data.worker_memory_limit_gib = limit
    return train(config)


def test_a_run_with_restarts_ends_like_one_without(tokenizer_folder: str, tmp_path: Path) -> None:
    outcome, rows = [], []
    for name, limit in (("free", 0.0), ("limited", LIMIT)):
        (tmp_path / name).mkdir()
        outcome += run_ranks(1, leak, tmp_path / name, tokenizer_folder, limit)
        lines = (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()
        rows.append([json.loads(line) for line in lines])
    free, limited = outcome
    assert free["losses"] == limited["losses"] and len(free["losses"]) == 10
    for name, weight in free["weights"].items():
        np.testing.assert_array_equal(weight, limited["weights"][name])
    grown, held = (max(row["loader_growth_gib"] for row in of_run) for of_run in rows)
    assert grown > 0.12 > held > 0
    for row in rows[0]:
        assert row["host_memory_gib"] > 0.05 and row["loader_memory_gib"] > row["loader_growth_gib"] >= 0


def test_the_pinning_thread_finds_the_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = MicroBatch.unlabelled([[2]], {})
    # Without CUDA there is no pinned memory.
    monkeypatch.setattr(MicroBatch, "pin_memory", lambda micro_batch: pinned)
    memory = WorkerMemory(0, 10, 1, 2, 3)
    assert pin_memory(ReadMicroBatch(MicroBatch.unlabelled([[1]], {}), memory)) == (pinned, memory)


def test_only_more_than_the_limit_counts(capsys: pytest.CaptureFixture[str]) -> None:
    memory = LoaderMemory(1.0)
    assert not memory.note(WorkerMemory(0, 10, 5 * GIB, 6 * GIB, 4))
    assert memory.note(WorkerMemory(1, 11, 2 * GIB, 3 * GIB + 1, 4))
    assert memory.largest() == (6 * GIB, GIB + 1)
    # Once for each process.
    assert memory.note(WorkerMemory(1, 11, 2 * GIB, 4 * GIB, 5)) and memory.note(WorkerMemory(1, 12, 0, 2 * GIB, 1))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "(pid 11)" in lines[0] and "from 2.00 to 3.00 GiB in 4 micro-batch" in lines[0]
    assert not LoaderMemory().note(WorkerMemory(0, 10, 0, 900 * GIB, 1)) and not capsys.readouterr().err
    assert LoaderMemory().largest() == (0, 0)


def test_a_limit_needs_processes(mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> None:
    config = make_config(mixed_shards, tokenizer_folder, tmp_path / "run")
    config.data.worker_memory_limit_gib = 2.0
    with pytest.raises(ConfigError, match=r"data\.worker_memory_limit_gib=2\.0 .* data\.num_workers=0 the training"):
        check(config)
    config.data.num_workers = 1
    check(config)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="without /proc, file pages count too")
def test_memory_is_the_process_s_own(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.write(os.urandom(64 * MIB))
    before = resident_bytes()
    pages = np.memmap(tmp_path / "file", mode="r")
    assert pages.any() and int(pages[::4096].sum()) > 0
    of_files = resident_bytes() - before
    filled = bytearray(b"x" * (64 * MIB))
    heap = resident_bytes() - before - of_files
    assert of_files < 16 * MIB and 48 * MIB < heap < 80 * MIB and len(filled) == 64 * MIB
