"""Slurm cluster fixture."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback import Cluster, missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Cluster of two nodes on loopback. Skips if Slurm is not installed and cannot be installed."""
    if why := missing():
        pytest.skip(why)
    # Not in pytest's temporary folder, whose path is too long for sockets.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    try:
        with Cluster(folder) as running:
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)
