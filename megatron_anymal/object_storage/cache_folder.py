"""The folders of caches on a node's local disk."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from megatron_anymal.object_storage.errors import StorageError


def cache_folder(configured: str, key: str = "data.storage.cache_folder", name: str = "cache") -> Path:
    """Create a cache's folder, with access for this user only.

    Args:
        configured: value of the key.
        key: the configuration key that names the folder.
        name: the default is anymal-NAME-UID in the system's folder for temporary files.

    Raises:
        StorageError: it cannot be created or written, or belongs to another user.
    """
    default = Path(tempfile.gettempdir()) / f"anymal-{name}-{os.getuid()}"
    folder = Path(configured) if configured else default
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for inner in ("locks", "partial", "indexes", "blocks"):
            (folder / inner).mkdir(exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as error:
        raise StorageError(
            f"The cache cannot be created in {str(folder)!r} ({error}). Set {key} to a folder on a local disk of each "
            "node."
        ) from None
    # In a folder that everybody can write, anybody could have prepared it.
    if not configured and owner != os.getuid():
        raise StorageError(f"The folder {str(folder)!r} belongs to another user. Set {key} to one of your own.")
    return folder
