"""Sizes of a run, for tests of the memory estimate."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_anymal.config import RunConfig
from megatron_anymal.data.planner import BatchLayout
from megatron_anymal.modalities import Modality
from megatron_anymal.model.llama_shape import read_llama_config
from megatron_anymal.model.memory.sizes import RunSizes
from megatron_anymal.train.auto_recompute import sizes_of_run


def sizes_of(config: RunConfig, modalities: Mapping[str, Modality]) -> RunSizes:
    """Return the sizes of a run whose Llama is a folder or a shape."""
    model = config.model
    batches = BatchLayout.of(model, config.data.seq_length, config.data_parallel_size)
    hf = read_llama_config(model.language_model)
    return sizes_of_run(model, config.trainer.precision, batches, hf, modalities, reference=config.job == "dpo")
