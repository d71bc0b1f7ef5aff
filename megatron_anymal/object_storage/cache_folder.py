"""The folder of the cache on a node's local disk."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from megatron_anymal.object_storage.errors import StorageError


def cache_folder(configured: str) -> Path:
    """Create the cache's folder, with access for this user only.

    Args:
        configured: data.storage.cache_folder.

    Raises:
        StorageError: it cannot be created or written, or belongs to another user.
    """
    default = Path(tempfile.gettempdir()) / f"anymal-cache-{os.getuid()}"
    folder = Path(configured) if configured else default
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in ("locks", "partial", "indexes", "blocks"):
            (folder / name).mkdir(exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as error:
        raise StorageError(
            f"The cache cannot be created in {str(folder)!r} ({error}). Set data.storage.cache_folder to a folder on a "
            "local disk of each node."
        ) from None
    # In a folder that everybody can write, anybody could have prepared it.
    if not configured and owner != os.getuid():
        raise StorageError(
            f"The folder {str(folder)!r} belongs to another user. Set data.storage.cache_folder to one of your own."
        )
    return folder
