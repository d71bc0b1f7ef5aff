"""Fixtures that several folders use."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tiny import make_shards, make_tokenizer  # noqa: E402 (the path is set above)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny tokenizer."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def mixed_shards(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> str:
    """Forty samples of image, audio, IMU, text alone, and image with audio."""
    folder = tmp_path_factory.mktemp("shards") / "mixed"
    return make_shards(folder, tokenizer_folder, 40, ("image", "audio", "imu", "text", "mixed"))


@pytest.fixture(scope="session")
def text_shards(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> str:
    """Samples of text alone."""
    return make_shards(tmp_path_factory.mktemp("shards") / "text", tokenizer_folder, 24, ("text",))
