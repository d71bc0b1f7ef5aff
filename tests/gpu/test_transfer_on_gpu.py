"""Micro-batches are copied to the GPU from pinned memory, asynchronously and unchanged."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny import make_config

from megatron_anymal.config import RunConfig
from megatron_anymal.data.loader import steps
from megatron_anymal.data.micro_batch import MicroBatch
from megatron_anymal.parallel import initialize
from megatron_anymal.train.build import build
from megatron_anymal.train.device_prefetch import on_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none here"),
]


def tensors_of(micro_batch: MicroBatch) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = []
    micro_batch.with_tensors(lambda tensor: tensors.append(tensor) or tensor)
    return tensors


def read_and_send(config: RunConfig) -> dict[str, bool]:
    """In a rank: copy the micro-batches of two steps to the busy GPU, and compare them with the originals."""
    layout = initialize(config)
    data = build(config, layout).train_data
    pinned, equal, busy = True, True, torch.randn(2048, 2048, device=layout.device)
    for _, batches in steps(
        data.planner, data.reader, replica=0, start=0, stop=2, num_workers=2, prefetch_steps=1, pin=True
    ):
        assert batches
        pinned &= all(tensor.is_pinned() for one in batches for tensor in tensors_of(one))
        for one, sent in zip(batches, on_device(batches, layout.device), strict=True):
            # Memory allocated and written in the meantime must not overlap the copies in flight.
            for _ in range(20):
                busy = (busy @ busy).clamp(-1, 1)
                torch.empty_like(busy).fill_(7)
            pairs = list(zip(tensors_of(one), tensors_of(sent), strict=True))
            equal &= all(mine.is_cuda and torch.equal(mine.cpu(), theirs) for theirs, mine in pairs)
            equal &= dataclasses.replace(sent, media={}).plan == one.plan
    return {"pinned": pinned, "equal": equal}


def test_sent_as_read_from_pinned_memory(mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> None:
    config = make_config(mixed_shards, tokenizer_folder, tmp_path / "run")
    config.data.seq_length = 32
    assert run_ranks(1, read_and_send, config)[0] == {"pinned": True, "equal": True}
