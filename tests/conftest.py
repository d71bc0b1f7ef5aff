"""Fixtures shared by several test folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import forks

# Before anything that computes.
import one_thread  # noqa: F401
import pytest
from engine import train_as_configured
from filelock import FileLock
from ranks import run_ranks
from tiny import make_shards, make_tokenizer

forks.watch()


@pytest.fixture(autouse=True)
def no_fork_beside_threads() -> Iterator[None]:
    """Fail a test during which this process was forked while it had threads, by the test or by the code under test."""
    yield
    assert not (unsafe := forks.unsafe()), "\n".join(unsafe)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny tokenizer."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def mixed_shards(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> str:
    """Shards of forty samples: image, audio, IMU, text only, and image with audio."""
    folder = tmp_path_factory.mktemp("shards") / "mixed"
    return make_shards(folder, tokenizer_folder, 40, ("image", "audio", "imu", "text", "mixed"))


@pytest.fixture(scope="session")
def text_shards(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> str:
    """Shards of text-only samples."""
    return make_shards(tmp_path_factory.mktemp("shards") / "text", tokenizer_folder, 24, ("text",))


@pytest.fixture(scope="session")
def quickstart_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The runs/quickstart folder of a small quickstart: its inputs, and a few steps of each of its runs. Not to be
    changed: the processes that run tests share it."""
    base = tmp_path_factory.getbasetemp()
    # pytest-xdist's processes have folders in a common one.
    base = (base if worker_id == "master" else base.parent) / "quickstart"
    with FileLock(base.with_suffix(".lock")):
        if not (base / "complete").exists():
            _make_quickstart(base / "runs" / "quickstart")
            (base / "complete").touch()
    return base / "runs" / "quickstart"


def _make_quickstart(folder: Path) -> None:
    from examples.quickstart.media import Sizes
    from examples.quickstart.prepare import prepare_quickstart

    sizes = Sizes(train_videos=80, held_out_videos=40, train_audio=48, held_out_audio=24, train_imu=48, held_out_imu=24)
    prepare_quickstart(folder, sizes, encoder_steps=20)
    for name in ("quickstart_llama", "quickstart", "quickstart_video"):
        run_ranks(2, train_as_configured, folder.parents[1], name, "trainer.max_steps=3", timeout=240)
