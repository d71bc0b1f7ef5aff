"""Sizes of a run, for tests of the memory estimate."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_anymal.config import RunConfig
from megatron_anymal.modalities import Modality
from megatron_anymal.model.llama_shape import read_llama_config
from megatron_anymal.model.memory.sizes import RunSizes
from megatron_anymal.train.auto_recompute import sizes_of_run
from megatron_anymal.train.build import batch_layout


def sizes_of(config: RunConfig, modalities: Mapping[str, Modality]) -> RunSizes:
    """Return the sizes of a run whose Llama is a folder or a shape."""
    model = config.model
    hf = read_llama_config(model.language_model)
    return sizes_of_run(
        model, config.trainer.precision, batch_layout(config), hf, modalities, reference=config.job == "dpo"
    )
