"""The tiny classifiers, trained once for all tests of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def _made(factory: pytest.TempPathFactory, worker_id: str, name: str, make: Callable[[Path], Path]) -> Path:
    base = factory.getbasetemp()
    # pytest-xdist's processes have folders in a common one.
    folder = (base if worker_id == "master" else base.parent) / name
    with FileLock(folder.with_suffix(".lock")):
        return folder if folder.exists() else make(folder)


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Folder of the text classifier."""
    from integrity_classifiers import text_classifier

    return _made(tmp_path_factory, worker_id, "text_classifier", text_classifier)


@pytest.fixture(scope="session")
def image_model(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Folder of the image classifier."""
    from integrity_classifiers import image_classifier

    return _made(tmp_path_factory, worker_id, "image_classifier", image_classifier)
