"""Read a run's samples step by step, without packing, padding or replicas."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from replicas import replica_data
from torch import Tensor
from transformers import AutoTokenizer

from megatron_anymal.config import RunConfig
from megatron_anymal.data.records import PlannedMicroBatch


@dataclass(frozen=True)
class Sample:
    """One sample, or one document of a preference pair; L is its length in LLM tokens."""

    # [L] int64, with placeholder tokens at the positions of soft tokens.
    tokens: Tensor
    # [L] int64: the next token of each position.
    labels: Tensor
    # [L]: 1 for target tokens, else 0.
    loss_mask: Tensor
    # Modality -> encoder inputs [pieces, *piece_shape] float32, in sample order.
    pieces: dict[str, Tensor]
    # Modality -> positions of its placeholder tokens, [pieces x soft tokens] int64.
    positions: dict[str, Tensor]
    step: int = 0
    # Index in the global batch: twice the sample's position, plus 1 for the rejected answer of a pair.
    document: int = 0


def read_steps(config: RunConfig, steps: int) -> Iterator[list[Sample]]:
    """Yield the global batches of the steps [0, steps) of a run, for any layout. Chosen documents come first.

    Raises:
        DataError: the data cannot be planned.
    """
    data = replica_data(_one_process(config))
    tokenizer = AutoTokenizer.from_pretrained(config.data.tokenizer)
    placeholders = {
        name: tokenizer.convert_tokens_to_ids(section.placeholder) for name, section in config.model.modalities.items()
    }
    for step in range(steps):
        batch = []
        for pack in data.planner.plan(step).of_replica(0):
            for planned in pack.samples:
                read = data.reader[PlannedMicroBatch(step, planned.length, (planned,))]
                assert not read.bad, read.bad
                whole = [tensor[0].split(planned.documents) for tensor in (read.tokens, read.labels, read.loss_mask)]
                # Every document of a sample contains all media of the sample.
                pieces = {name: media.pieces for name, media in read.media.items()}
                for branch, (tokens, labels, mask) in enumerate(zip(*whole)):
                    positions = {name: (tokens == placeholders[name]).nonzero().flatten() for name in pieces}
                    number = 2 * planned.position + branch
                    batch.append(Sample(tokens, labels, mask, pieces, positions, step, number))
        yield batch


def _one_process(config: RunConfig) -> RunConfig:
    config = copy.deepcopy(config)
    config.trainer.num_nodes = config.trainer.devices = 1
    model = config.model
    model.tensor_model_parallel_size, model.sequence_parallel = 1, False
    model.pipeline_model_parallel_size = model.virtual_pipeline_model_parallel_size = 1
    model.context_parallel_size = model.micro_batch_size = 1
    # Whole documents, whatever the engine packs.
    model.dpo.share_prompt = "never"
    return config
