"""What every rank's model chunks keep for the backward pass, against autograd, for 14 layouts of four processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from ranks import run_ranks
from sizes import sizes_of
from torch import Tensor

from benchmarks.measuring import saved_for_backward
from megatron_anymal.config import LoraConfig, RunConfig
from megatron_anymal.data.micro_batch import MicroBatch
from megatron_anymal.model.anymal import AnyMALModel
from megatron_anymal.model.build import build_models
from megatron_anymal.model.llama_shape import read_llama_config
from megatron_anymal.model.lm_head import label_losses
from megatron_anymal.model.memory.activations import kept_by_head, kept_by_layers
from megatron_anymal.model.memory.recompute import configured
from megatron_anymal.model.memory.sizes import Pack
from megatron_anymal.parallel import ParallelLayout, initialize

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
LENGTHS = (48, 32, 40, 8)
# Tensor, sequence parallel, pipeline, chunks, context, first and last stage.
LAYOUTS = [
    (1, False, 1, 1, 1, 0, 0),
    (2, False, 1, 1, 1, 0, 0),
    (2, True, 1, 1, 1, 0, 0),
    (1, False, 2, 2, 1, 0, 0),
    (1, False, 2, 4, 1, 0, 0),
    (1, False, 2, 1, 1, 3, 0),
    (1, False, 2, 2, 1, 2, 0),
    (1, False, 4, 1, 1, 1, 1),
    (1, False, 4, 2, 1, 0, 0),
    (2, True, 2, 2, 1, 0, 0),
    (2, False, 2, 1, 1, 0, 3),
    (1, False, 1, 1, 2, 0, 0),
    (1, False, 2, 2, 2, 0, 0),
    (1, False, 2, 1, 2, 3, 0),
]


@dataclass(frozen=True)
class Case:
    layout: tuple[int, bool, int, int, int, int, int]
    granularity: str
    trains: bool


def make_config(case: Case) -> RunConfig:
    config = RunConfig()
    config.trainer.precision, config.trainer.devices = "bf16", 4
    model = config.model
    model.language_model.config, model.language_model.freeze = dict(SHAPE), not case.trains
    model.lora = LoraConfig() if case.trains else LoraConfig(r=4, targets=["q_proj", "layers.3.mlp.up_proj"])
    model.tensor_model_parallel_size, model.sequence_parallel = case.layout[:2]
    model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size = case.layout[2:4]
    model.context_parallel_size = case.layout[4]
    model.num_layers_in_first_pipeline_stage, model.num_layers_in_last_pipeline_stage = case.layout[5:]
    model.recompute_granularity = case.granularity
    if case.granularity == "full":
        model.recompute_method = "block"
    config.data.tokenizer, config.data.seq_length = "none is needed", sum(LENGTHS)
    return config


def kept_by_ranks_chunks(cases: Sequence[Case]) -> list[list[tuple[int, int]]]:
    """For each case of one layout and each chunk of this rank, the bytes kept, measured and counted."""
    layout = initialize(make_config(cases[0]))
    return [kept_and_counted(make_config(case), layout) for case in cases]


def kept_and_counted(config: RunConfig, layout: ParallelLayout) -> list[tuple[int, int]]:
    hf = read_llama_config(config.model.language_model)
    models = build_models(config.model, "bf16", hf, layout, {}, lambda models: None)
    return [of_chunk(config, layout, model, number) for number, model in enumerate(models)]


def of_chunk(config: RunConfig, layout: ParallelLayout, model: AnyMALModel, number: int) -> tuple[int, int]:
    hf = read_llama_config(config.model.language_model)
    model.train()
    tokens = sum(LENGTHS) // config.model.context_parallel_size
    pack = model._packing(MicroBatch.unlabelled([[1] * length for length in LENGTHS], {}))
    own = tokens // (config.model.tensor_model_parallel_size if config.model.sequence_parallel else 1)
    hidden = torch.randn(own, 1, hf.hidden_size).to(model.config.params_dtype).requires_grad_()
    labels = torch.arange(0, tokens, 2)
    decoder: Any = model.language_model.decoder
    decoder.set_input_tensor(hidden)

    def forward() -> Tensor:
        out = decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=pack)
        if not model.post_process:
            return out
        targets = torch.ones(1, tokens, dtype=torch.int64)
        return label_losses(model.language_model, out, targets, labels, hf.vocab_size)

    buckets = pack.kernel._buckets
    shared = [*pack.rotation, *(v for b in buckets for v in vars(b).values() if isinstance(v, Tensor))]
    shared += [t for t in (pack.kernel._from_buckets, pack.from_gathered) if t is not None]
    kept, _ = saved_for_backward(forward, [*model.parameters(), *shared])
    sizes = sizes_of(config, {})
    chunk = sizes.stages[layout.pipeline_rank][number]
    padded = sum(b.queries.numel() for b in buckets), sum(b.keys.numel() for b in buckets)
    load = Pack(tokens, len(labels), *padded)
    counted = kept_by_layers(sizes.llama, load, chunk.layers, configured(config.model))
    return sum(kept.values()), counted + (kept_by_head(sizes.llama, load) if chunk.last else 0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_chunks_keep_what_is_counted(layout: Any) -> None:
    """Not counted: a few index tensors and, with context parallelism on CPUs, masks converted to floats."""
    cases = [Case(layout, granularity, trains) for granularity in ("", "full") for trains in (True, False)]
    for rank, measurements in enumerate(run_ranks(4, kept_by_ranks_chunks, cases)):
        wrong = [
            f"rank {rank}, chunk {number}: {measured} kept, {counted} counted: {case}"
            for case, chunks in zip(cases, measurements, strict=True)
            for number, (measured, counted) in enumerate(chunks)
            if counted != pytest.approx(measured, rel=0.01 if layout[4] == 1 else 0.05)
        ]
        assert not wrong, "\n".join(wrong)
