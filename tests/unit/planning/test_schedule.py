"""The order of a step on each stage against megatron-core's own schedules, recorded while they run over gloo."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from ranks import run_ranks
from torch import Tensor, nn

from megatron_anymal.config import RunConfig
from megatron_anymal.data.loader import steps
from megatron_anymal.parallel import initialize
from megatron_anymal.planning.layouts.schedule import Event, events_of_stage
from megatron_anymal.train.build import build
from megatron_anymal.train.step import train_step


def recorded_step(config: RunConfig) -> tuple[int, list[Event]]:
    """Number of micro-batches and, in order, the passes of this rank's chunks and its exchanges during one step."""
    state = build(config, initialize(config))
    events: list[Event] = []
    passes = [0] * len(state.models)

    def forwarded(chunk: int, module: nn.Module, given: Any, output: Tensor) -> None:
        number, passes[chunk] = passes[chunk], passes[chunk] + 1
        events.append(Event("forward", chunk, number))
        output.register_hook(lambda gradient: events.append(Event("backward", chunk, number)))

    original = P2PCommunicator._communicate

    def communicate(self: P2PCommunicator, **given: Any) -> Any:
        flags = (
            given["tensor_send_next"] is not None,
            given["recv_prev"],
            given["tensor_send_prev"] is not None,
            given["recv_next"],
        )
        if any(flags):
            events.append(Event("exchange", 0, 0, *flags, given.get("wait_on_reqs", True)))
        return original(self, **given)

    P2PCommunicator._communicate = communicate
    for number, model in enumerate(state.models):
        model.register_forward_hook(partial(forwarded, number))
    data = state.train_data
    replica = steps(data.planner, data.reader, replica=0, start=0, stop=1, num_workers=0, prefetch_steps=1)
    plan, batches = next(replica)
    train_step(state, plan, batches)
    return len(batches), events


@pytest.mark.parametrize(("stages", "chunks"), [(2, 1), (4, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("samples", [16, 2])
def test_events_are_megatron_cores(
    stages: int, chunks: int, samples: int, text_shards: str, tokenizer_folder: str, tmp_path: Path
) -> None:
    """With many micro-batches, and with so few that the warm-up holds all of them."""
    config = tiny.make_config(text_shards, tokenizer_folder, tmp_path / "run")
    config.trainer.devices = config.model.pipeline_model_parallel_size = stages
    config.model.virtual_pipeline_model_parallel_size = chunks
    config.model.language_model.config["num_hidden_layers"] = 8
    config.model.language_model.freeze = False
    config.model.modalities = {}
    config.model.global_batch_size, config.data.seq_length = samples, 12
    for stage, (micro_batches, events) in enumerate(run_ranks(stages, recorded_step, config)):
        assert (micro_batches > 2 * stages) == (samples == 16)
        assert events == list(events_of_stage(stage, stages, chunks, micro_batches, overlap=True)), stage
