"""Memory for the media of a micro-batch."""

from __future__ import annotations

import math
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

# Buffers that no tensor uses any more. One batch is read while the previous one is in use, each with a few modalities.
_free: deque[np.ndarray] = deque(maxlen=4)


def batch_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor, [*shape].

    In a loader process it lies in shared memory, so that handing it over copies nothing. Elsewhere it takes the memory
    of an earlier one whose storage has been freed: a virtual machine gives freed memory back to its host, and touching
    it again then takes up to a quarter of the time of reading a video.
    """
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    if get_worker_info() is None:
        return torch.from_numpy(_memory(size)).view(dtype).view(shape)
    # As torch's own collation of samples does.
    storage = torch.UntypedStorage._new_shared(size)
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)


def _memory(size: int) -> np.ndarray:
    """[size] uint8, which is free again when it is no longer referred to."""
    whole = _fitting(size)
    if whole is None:
        # Unlike torch, numpy asks for huge pages, whose first touch takes a third of the time.
        whole = np.empty(size, dtype=np.uint8)
    # A tensor's storage keeps this view alive, not the array itself.
    part = whole[:size]
    weakref.finalize(part, _free.append, whole).atexit = False
    return part


def _fitting(size: int) -> np.ndarray | None:
    """Take free memory of at least this size, and at most twice."""
    for _ in range(len(_free)):
        try:
            whole = _free.popleft()
        except IndexError:
            # Another thread has taken it.
            return None
        if size <= len(whole) <= 2 * size:
            return whole
        _free.append(whole)
    return None
