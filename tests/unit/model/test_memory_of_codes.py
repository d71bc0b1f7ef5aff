"""The memory estimate for rows of marks and codes, against built models and autograd."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from ranks import run_ranks
from sizes import sizes_of
from torch import Tensor

from benchmarks.measuring import saved_for_backward
from megatron_anymal.config import DiscreteConfig, RunConfig
from megatron_anymal.model.build import build_models
from megatron_anymal.model.llama_shape import read_llama_config
from megatron_anymal.model.lm_head import label_losses
from megatron_anymal.model.memory.activations import _norm, kept_by_head
from megatron_anymal.model.memory.sizes import Pack
from megatron_anymal.parallel import initialize

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 512,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENS = 48


@dataclass(frozen=True)
class Case:
    rows: str
    freeze: bool
    tied: bool


CASES = [
    Case(rows, freeze, tied)
    for rows, freeze in (("new", True), ("new", False), ("all", False), ("none", True), ("none", False))
    for tied in (False, True)
]


def config_of(case: Case, tp: int, pp: int) -> RunConfig:
    config = RunConfig()
    config.trainer.precision, config.trainer.devices = "bf16", 2
    model = config.model
    model.language_model.config = {**SHAPE, "tie_word_embeddings": case.tied}
    model.language_model.freeze, model.discrete_rows = case.freeze, case.rows
    # 13 marks and codes: not divisible by two.
    model.discrete = {"x": DiscreteConfig(codebooks=[6, 5])}
    model.tensor_model_parallel_size, model.pipeline_model_parallel_size = tp, pp
    config.data.tokenizer, config.data.seq_length = "none is needed", TOKENS
    return config


def counts(tp: int, pp: int) -> list[list[tuple[int, ...]]]:
    """In a rank, for each case: parameters, trainable ones and bytes kept by the head, built and estimated."""
    layout = initialize(config_of(CASES[0], tp, pp))
    table = []
    for case in CASES:
        config = config_of(case, tp, pp)
        hf = read_llama_config(config.model.language_model)
        [model] = build_models(config.model, "bf16", hf, layout, {}, lambda models: None)
        sizes = sizes_of(config, {})
        [chunk] = sizes.stages[layout.pipeline_rank]
        estimated = sizes.parameters(chunk)
        built = [(p.numel(), p.requires_grad) for p in model.parameters()]
        trainable = sum(number for number, trains in built if trains)
        row = [sum(number for number, _ in built), estimated.frozen + estimated.trainable]
        row += [trainable, estimated.trainable]
        if model.post_process:
            hidden = torch.randn(TOKENS, 1, hf.hidden_size).to(model.config.params_dtype).requires_grad_()
            labels = torch.arange(0, TOKENS, 2)

            def losses(
                model: object = model, hidden: Tensor = hidden, labels: Tensor = labels, vocabulary: int = hf.vocab_size
            ) -> Tensor:
                llama, rows = model.language_model, model.discrete  # type: ignore[attr-defined]
                return label_losses(llama, hidden, torch.ones(1, TOKENS).long(), labels, vocabulary, rows)

            kept, _ = saved_for_backward(losses, list(model.parameters()))
            load = Pack(TOKENS, len(labels), TOKENS, TOKENS)
            row += [sum(kept.values()), kept_by_head(sizes.llama, load) - _norm(sizes.llama, TOKENS)]
        table.append(tuple(row))
    return [table]


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_the_estimate_is_what_a_rank_holds(tp: int, pp: int) -> None:
    for [table] in run_ranks(2, counts, tp, pp):
        for case, (total, all_of_them, trainable, counted, *head) in zip(CASES, table, strict=True):
            assert (total, trainable) == (all_of_them, counted), case
            if head:
                assert head[0] == pytest.approx(head[1], rel=0.01), case
