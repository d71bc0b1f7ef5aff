"""Tensors for a micro-batch's media take memory that nothing uses any more; in loader processes, shared memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_anymal.data import batch_memory
from megatron_anymal.data.batch_memory import batch_tensor

SHAPE = (3, 40, 50)


@pytest.fixture(autouse=True)
def nothing_free() -> Iterator[None]:
    batch_memory._free.clear()
    yield
    batch_memory._free.clear()


def test_only_loader_processes_use_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not batch_tensor((2, 3), torch.float32).is_shared()
    monkeypatch.setattr(batch_memory, "get_worker_info", lambda: object())
    batch = batch_tensor((2, 3), torch.float32)
    assert batch.is_shared() and batch.shape == (2, 3) and batch.dtype == torch.float32 and batch.is_contiguous()
    assert batch_tensor((0, 3), torch.float32).shape == (0, 3)


def test_memory_is_taken_again() -> None:
    batch = batch_tensor(SHAPE, torch.float32)
    at = batch.data_ptr()
    del batch
    # Smaller, of another type.
    assert batch_tensor((3, 50, 60), torch.bfloat16).data_ptr() == at


@pytest.mark.parametrize(
    "kept",
    [
        lambda batch: batch[1:, ::2],
        lambda batch: batch.numpy()[2],
        lambda batch: batch.permute(2, 0, 1).view(torch.int32),
        lambda batch: torch.utils.dlpack.from_dlpack(batch),
        lambda batch: (batch * torch.ones(50, requires_grad=True)).grad_fn,
        lambda batch: batch.untyped_storage(),
        lambda batch: memoryview(batch.numpy().reshape(-1)[5:]),
    ],
    ids=["slice", "array", "view", "dlpack", "saved for backward", "storage", "buffer"],
)
def test_memory_in_use_is_not(kept: Callable[[Tensor], Any]) -> None:
    batch = batch_tensor(SHAPE, torch.float32)
    at, kept_part = batch.data_ptr(), kept(batch)
    del batch
    gc.collect()
    others = [batch_tensor(SHAPE, torch.float32) for _ in range(3)]
    assert at not in [other.data_ptr() for other in others] and not batch_memory._free
    del kept_part
    gc.collect()
    assert batch_tensor(SHAPE, torch.float32).data_ptr() == at


def test_much_larger_memory_is_kept_for_others() -> None:
    large = batch_tensor((3, *SHAPE), torch.float32)
    at = large.data_ptr()
    del large
    assert batch_tensor(SHAPE, torch.float32).data_ptr() != at
    assert batch_tensor((2, *SHAPE), torch.float32).data_ptr() == at


def test_little_is_kept() -> None:
    batches = [batch_tensor(SHAPE, torch.float32) for _ in range(20)]
    del batches
    assert len(batch_memory._free) == 4
