"""Fixtures shared by several test folders."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import forks
import pytest
from filelock import FileLock

forks.watch()


def pytest_configure(config: pytest.Config) -> None:
    """Run before the tests are imported. The process that only distributes tests to others skips the slow imports."""
    if getattr(config.option, "dist", "no") != "no" and not hasattr(config, "workerinput"):
        return
    # Before anything that computes.
    import one_thread  # noqa: F401

    # Imported objects stay: collections would visit a million of them again and again.
    gc.disable()


def pytest_collection_finish() -> None:
    """Run after the tests are imported."""
    from megatron_anymal import lean_imports

    lean_imports.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def no_fork_beside_threads() -> Iterator[None]:
    """Fail a test during which this process was forked while it had threads, by the test or by the code under test."""
    yield
    assert not (unsafe := forks.unsafe()), "\n".join(unsafe)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny tokenizer."""
    from tiny import make_tokenizer

    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def mixed_shards(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> str:
    """Shards of forty samples: image, audio, IMU, text only, and image with audio."""
    from tiny import make_shards

    folder = tmp_path_factory.mktemp("shards") / "mixed"
    return make_shards(folder, tokenizer_folder, 40, ("image", "audio", "imu", "text", "mixed"))


@pytest.fixture(scope="session")
def text_shards(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> str:
    """Shards of text-only samples."""
    from tiny import make_shards

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
    import fork_server
    from engine import train_as_configured
    from ranks import run_ranks

    from examples.quickstart.__main__ import tokenize
    from examples.quickstart.any_to_any import AnyToAnyAmounts, prepare_any_to_any
    from examples.quickstart.media import QuickstartSizes
    from examples.quickstart.prepare import prepare_quickstart

    sizes = QuickstartSizes(
        train_videos=80, held_out_videos=40, train_audio=48, held_out_audio=24, train_imu=48, held_out_imu=24
    )
    prepare_quickstart(folder, sizes, encoder_steps=3)
    few = AnyToAnyAmounts(60, 1, 20, 10, 24, 4, 4, 40, 4, picture_steps=60, sound_steps=20)
    prepare_any_to_any(folder, few)
    for split in ("train", "held_out"):
        done = fork_server.python("-m", "megatron_anymal", *tokenize(split), cwd=folder.parents[1])
        assert done.returncode == 0, done.stderr
    for name in ("quickstart_llama", "quickstart", "quickstart_video", "quickstart_any_to_any"):
        run_ranks(2, train_as_configured, folder.parents[1], name, "trainer.max_steps=3")
