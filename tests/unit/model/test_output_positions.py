"""The last layer at positions with a label only gives the losses and gradients of a last layer at all positions."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny import make_config, make_conversations, make_shards

from megatron_anymal.config import LoraConfig, RunConfig
from megatron_anymal.data.micro_batch import MicroBatch
from megatron_anymal.model import anymal
from megatron_anymal.model.key_value_cache import KeyValueCache
from megatron_anymal.parallel import initialize
from megatron_anymal.train.build import build
from megatron_anymal.train.step import train_step

# Adapters start with B = 0, so only the second step has gradients of A.
STEPS = 2
# Number of processes, and settings of `model`.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "all layers recomputed": (1, {"recompute_granularity": "full", "recompute_num_layers": 4}),
    "parts recomputed": (1, {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}),
    "tensor": (2, {"tensor_model_parallel_size": 2}),
    "sequence": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "sequence, recomputed": (
        2,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "recompute_granularity": "full",
            "recompute_num_layers": 4,
        },
    ),
    "context": (2, {"context_parallel_size": 2}),
    "pipeline": (2, {"pipeline_model_parallel_size": 2}),
    "virtual pipeline": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
}
KINDS = ("frozen", "adapters", "trained")


def steps(config: RunConfig, selected: bool) -> list[dict[str, Any]]:
    """In a rank: for every step the loss, this rank's gradients, how many rows the last layer's feed-forward got in
    each micro-batch, and how many labels and tokens the micro-batches had."""
    if not selected:
        anymal.output_positions = lambda *anything: None
    state = build(config, initialize(config))
    named = {f"{n}.{name}": p for n, m in enumerate(state.models) for name, p in m.named_parameters()}
    optimizer: Any = state.optimizer
    update, records, rows = optimizer.step, [], []
    last: Any = state.models[-1].language_model
    if last.post_process:
        last.decoder.layers[-1].mlp.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))

    def record() -> Any:
        gradients = {name: p.main_grad.numpy().copy() for name, p in named.items() if p.requires_grad}
        records.append({"gradients": gradients})
        return update()

    optimizer.step = record
    for step in range(STEPS):
        plan = state.train_data.planner.plan(step)
        batches = [state.train_data.reader[m] for m in plan.of_replica(0)]
        rows.clear()
        result = train_step(state, plan, batches)
        assert not result.skipped and len(batches) > 1
        sizes = [(int(b.loss_mask.sum()), b.tokens.size(1)) for b in batches]
        records[-1] |= {"loss": result.loss, "rows": list(rows), "sizes": sizes}
    return records


def both(configs: list[RunConfig]) -> list[Any]:
    """In a rank: the steps of every configuration, with all positions of the last layer and with some."""
    some = [steps(config, True) for config in configs]
    return list(zip([steps(config, False) for config in configs], some, strict=True))


@pytest.fixture(scope="module")
def configs(tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    """By kind, on one process."""
    folder = tmp_path_factory.mktemp("data")
    captions = make_shards(folder / "captions", tokenizer_folder, 24, ("image", "text"))
    chats = make_conversations(folder / "chats", tokenizer_folder, 24, ("image", "text"))
    by_kind = {}
    for kind in KINDS:
        config = make_config(chats if kind == "adapters" else captions, tokenizer_folder, folder / "run")
        config.model.modalities = {"image": config.model.modalities["image"]}
        if kind == "adapters":
            config.job, config.model.lora = "sft", LoraConfig(r=4, dropout=0.25)
        config.model.language_model.freeze = kind != "trained"
        by_kind[kind] = config
    return by_kind


@pytest.fixture(scope="module")
def results(configs: dict[str, RunConfig]) -> dict[tuple[str, str], list[Any]]:
    """By layout and kind: per rank the steps with all positions and with some."""
    by_case = {}
    for processes in (1, 2):
        cases = {}
        for layout, (number, settings) in LAYOUTS.items():
            for kind in KINDS if number == processes else ():
                config = cases[layout, kind] = copy.deepcopy(configs[kind])
                config.trainer.devices = processes
                for name, value in settings.items():
                    setattr(config.model, name, value)
        ranks = run_ranks(processes, both, list(cases.values()), timeout=300)
        by_case |= {case: [rank[number] for rank in ranks] for number, case in enumerate(cases)}
    return by_case


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradients_are_the_same(layout: str, kind: str, results: Any) -> None:
    for every, some in results[layout, kind]:
        for step, (expected, actual) in enumerate(zip(every, some, strict=True)):
            assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-6)
            assert actual["gradients"].keys() == expected["gradients"].keys()
            for name, gradient in expected["gradients"].items():
                # Adam's first update divides by the gradient's size, so that rounding in small gradients grows, which
                # depends on the CPU: 2.2e-5 was seen.
                rounding = (5e-5 if step else 1e-5) * np.abs(gradient).max()
                np.testing.assert_allclose(actual["gradients"][name], gradient, rtol=0, atol=rounding, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_positions_with_a_label_are_computed(layout: str, kind: str, results: Any) -> None:
    """On the last stage; under sequence parallelism a multiple of the ranks is, each half of them."""
    ranks = results[layout, kind]
    passes = 2 if "recomputed" in layout else 1
    for every, some in ranks[-1:] if "pipeline" in layout else ranks:
        for expected, actual in zip(every, some, strict=True):
            divisor = 2 if layout.startswith("sequence") else 1
            labels = [-(-labels // divisor) for labels, _ in actual["sizes"]]
            tokens = [tokens // divisor for _, tokens in actual["sizes"]]
            assert sum(labels) < sum(tokens) and len(actual["rows"]) == passes * len(labels)
            assert sum(actual["rows"]) == passes * sum(labels)
            assert sum(expected["rows"]) == passes * sum(tokens)


# Three documents, an odd number, and their lengths.
DOCUMENTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14, 15, 16]]


def _answering(config: RunConfig, selected: bool) -> tuple[Any, list[int]]:
    """In a rank: logits after prompts, then after one more token each; rows of the last layer's feed-forward."""
    if not selected:
        anymal.output_positions = lambda *anything: None
    [model] = build(config, initialize(config)).models
    rows: list[int] = []
    model.language_model.decoder.layers[-1].mlp.register_forward_pre_hook(
        lambda module, given: rows.append(len(given[0]))
    )
    cache, logits = KeyValueCache(len(DOCUMENTS)), []
    for documents in (DOCUMENTS, [document[:1] for document in [*DOCUMENTS, [0]]]):
        with torch.no_grad():
            local_logits = model(MicroBatch.unlabelled(documents, {}), soft={}, cache=cache)
        logits.append(model.whole_logits(local_logits).numpy())
    return logits, rows


def _both_answering(config: RunConfig) -> Any:
    some = _answering(config, True)
    return some, _answering(config, False)


@pytest.mark.parametrize("layout", ["one", "tensor", "sequence"])
def test_answers_need_the_last_layer_at_the_last_tokens_only(layout: str, configs: dict[str, RunConfig]) -> None:
    config = copy.deepcopy(configs["frozen"])
    config.trainer.devices, settings = LAYOUTS[layout]
    for name, value in settings.items():
        setattr(config.model, name, value)
    for (some, rows), (every, all_rows) in run_ranks(config.trainer.devices, _both_answering, config):
        for actual, expected in zip(some, every, strict=True):
            np.testing.assert_allclose(
                actual, expected, rtol=0, atol=1e-5 * np.abs(expected[np.isfinite(expected)]).max()
            )
        assert (rows, all_rows) == (([2, 2], [6, 2]) if layout == "sequence" else ([3, 3], [12, 4]))
