"""The layouts that are enumerated, the memory that is counted, and the order in which they are ranked."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_anymal.config import (
    ConfigError,
    DistributedDataParallelConfig,
    EncoderConfig,
    ModalityConfig,
    ModelConfig,
    ProjectorConfig,
    RunConfig,
)
from megatron_anymal.config.validation import check
from megatron_anymal.dry_run.simulate import examine
from megatron_anymal.model.llama import check_model
from megatron_anymal.model.llama_shape import layers_of_stages, read_llama_config
from megatron_anymal.model.memory.rank_memory import held
from megatron_anymal.model.memory.recompute import candidates
from megatron_anymal.model.memory.sizes import Recompute
from megatron_anymal.planning.layouts.config_file import planned_config
from megatron_anymal.planning.layouts.enumeration import Layout
from megatron_anymal.planning.layouts.hardware import known_gpus, load_hardware, sources
from megatron_anymal.planning.layouts.problem import build_problem
from megatron_anymal.planning.layouts.report import nothing_fits
from megatron_anymal.planning.layouts.search import Candidate, LayoutProblem, Miss, _group, search
from megatron_anymal.planning.layouts.step_time import step_time

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def make_config(gpus: int, **model: Any) -> RunConfig:
    config = RunConfig()
    config.trainer.devices = gpus
    config.model = ModelConfig(global_batch_size=16, **model)
    config.model.language_model.config = dict(SHAPE)
    config.model.language_model.freeze = False
    config.data.tokenizer, config.data.seq_length = "none is needed", 64
    return config


def problem_of(config: RunConfig, memory: int = 10**12, gpu: str = "h100-80gb") -> LayoutProblem:
    problem, _ = build_problem(config, load_hardware(gpu), [])
    problem.memory = memory
    return problem


def works(config: RunConfig) -> bool:
    """Whether the checks of a run and megatron-core's configuration accept it."""
    try:
        check(config)
        check_model(config.model, config.trainer.precision, read_llama_config(config.model.language_model))
    except ConfigError:
        return False
    return True


def test_encoders_on_all_stages_leave_out_no_layout() -> None:
    shape = {"image_size": 28, "patch_size": 14, "hidden_size": 32, "num_attention_heads": 2}
    projector = ProjectorConfig(num_layers=1, num_tokens=4, num_attention_heads=4)
    image = ModalityConfig("image", EncoderConfig("clip", config=shape), projector, placeholder="<a>")
    first = make_config(4, modalities={"image": image})
    spread = make_config(4, modalities={"image": image}, encoder_placement="all_stages", pipeline_model_parallel_size=2)
    layouts = problem_of(spread).layouts()
    assert layouts == problem_of(first).layouts()
    for layout in layouts:
        planned = planned_config(spread, layout, Recompute())
        assert works(planned)
        assert (planned.model.encoder_placement == "first_stage") == (layout.pipeline_model_parallel_size == 1)


def test_all_layouts_that_work_are_enumerated() -> None:
    """Every combination of every key's values, through the checks that a run makes."""
    config = make_config(4)
    expected = set()
    sizes, edges = (1, 2, 4), range(6)
    formats = (("", False), ("hybrid", False))
    for values in itertools.product(sizes, (False, True), sizes, range(1, 6), sizes, edges, edges, formats):
        layout = Layout(*values[:7], *values[7])
        trial = make_config(4)
        trial.model = layout.applied(trial.model)
        if works(trial):
            stages = layers_of_stages(trial.model, read_llama_config(trial.model.language_model))
            middle = stages[1] if len(stages) > 2 else max(stages)
            # An even split has one spelling, and one of two stages sets the first.
            given = layout[5:7]
            spelled = all(not edge or edge != middle for edge in given) if len(stages) > 2 else not given[1]
            if len(stages) == 2 and given[0] * 2 == 6:
                spelled = False
            if spelled:
                expected.add(layout)
    layouts = problem_of(config).layouts()
    assert len(layouts) == len(set(layouts))
    # A trained Llama cannot be stored in FP8, so that format is absent on both sides.
    assert set(layouts) == expected and len(expected) > 40


def random_problem(dice: random.Random) -> LayoutProblem:
    """A model, a GPU and lengths that give computation, memory and communication different weights."""
    config = make_config(dice.choice((2, 4, 6, 8)), recompute_granularity="auto")
    hidden, ffn = dice.choice(((64, 160), (512, 1408), (4096, 14336)))
    shape = {"hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": 8, "num_key_value_heads": 2}
    vocabulary, layers = dice.choice((96, 128256)), dice.choice((2, 3, 4, 6, 7))
    config.model.language_model.config.update(shape, vocab_size=vocabulary, num_hidden_layers=layers)
    config.data.seq_length, config.model.global_batch_size = dice.choice((256, 2048, 8192)), dice.choice((8, 16, 64))
    if dice.random() < 0.4:
        config.model.language_model.freeze, config.model.lora.r = True, dice.choice((4, 64))
    if dice.random() < 0.3:
        config.model.ddp = DistributedDataParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True)
    gpu = load_hardware(dice.choice(("a100-80gb", "h100-80gb", "b200-180gb")))
    return build_problem(config, gpu, [], dice.choice((0, 128, config.data.seq_length // 2)))[0]


@pytest.mark.parametrize("seed", range(4))
def test_the_search_finds_what_all_layouts_with_all_recomputations_contain(seed: int) -> None:
    """Against the time and memory of every layout with every recomputation, with memory for some of them only."""
    dice = random.Random(seed)
    for _ in range(8):
        problem = random_problem(dice)
        layouts = problem.layouts()
        every = []
        for layout in layouts:
            inputs = problem.inputs(layout)
            stages = range(len(inputs.sizes.stages))
            for recompute in candidates(inputs.sizes):
                needed = max(held(inputs.sizes, stage, recompute).total for stage in stages)
                every.append((needed, step_time(inputs, recompute).seconds, (*layout[:5], *layout[7:])))
        needs = sorted(needed for needed, _, _ in every)
        problem.memory = needs[int(dice.random() ** 1.5 * len(needs))]
        fastest: dict[tuple[Any, ...], float] = {}
        for needed, seconds, sizes in every:
            if needed <= problem.memory:
                fastest[sizes] = min(fastest.get(sizes, seconds), seconds)
        result = search(problem, layouts, wanted=10)
        assert [candidate.step.seconds for candidate in result.ranked] == pytest.approx(
            sorted(fastest.values())[:10], rel=1e-9
        )
        assert all(candidate.choice.held[candidate.choice.worst].total <= problem.memory for candidate in result.ranked)
        assert result.allowed == len(layouts) >= result.examined >= result.simulated
        assert all(miss.held.total > problem.memory for miss in result.misses)


def test_the_search_leaves_layouts_out() -> None:
    """Otherwise the comparison above would say nothing about what it prunes."""
    problem = problem_of(make_config(8))
    layouts = problem.layouts()
    result = search(problem, layouts, wanted=10)
    assert result.examined < len(layouts) / 2


def test_the_configured_recomputation_restricts_no_layout() -> None:
    """Groups of four layers divide no stage of three, but the plan chooses the recomputation itself."""
    expected = problem_of(make_config(4)).layouts()
    configured = make_config(4, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=6)
    assert problem_of(configured).layouts() == expected


def test_no_step_is_faster_than_its_bound() -> None:
    config = make_config(8)
    config.data.seq_length = 512
    problem = problem_of(config)
    layouts = problem.layouts()
    result = search(problem, layouts, wanted=10**6)
    assert result.simulated > 50
    for layout in layouts[::5]:
        candidate = problem.examine(layout, 0.0)
        assert isinstance(candidate, Candidate)
        assert candidate.step.seconds >= _group(problem, layout).bound(layout)


# TP, SP, PP, VPP, CP, first, last, trains, recompute
COUNTED = [
    (1, False, 1, 1, 1, 0, 0),
    (2, False, 1, 1, 1, 0, 0),
    (2, True, 1, 1, 1, 0, 0),
    (1, False, 2, 1, 1, 0, 0),
    (1, False, 2, 1, 1, 2, 0),
    (1, False, 2, 3, 1, 0, 0),
    (1, False, 2, 2, 1, 2, 0),
    (1, False, 4, 1, 1, 1, 1),
    (1, False, 1, 1, 2, 0, 0),
    (2, True, 2, 3, 1, 0, 0),
    (2, True, 1, 1, 2, 0, 0),
    (1, False, 2, 1, 2, 4, 0),
]


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("values", COUNTED)
def test_memory_is_that_of_a_dry_run(values: tuple[Any, ...], trains: bool, tmp_path: Path) -> None:
    """A dry run builds every stage of the layout's configuration; the search does arithmetic on shared sizes."""
    config = make_config(8, recompute_granularity="auto")
    config.data.tokenizer = str(tmp_path / "none")
    if not trains:
        config.model.language_model.freeze, config.model.lora.r = True, 4
        config.model.modalities = {
            "image": ModalityConfig(
                "image",
                EncoderConfig(
                    "clip", config={"image_size": 28, "patch_size": 14, "hidden_size": 32, "num_attention_heads": 2}
                ),
                ProjectorConfig(num_layers=1, num_tokens=4, num_attention_heads=4),
                placeholder="<|reserved_special_token_0|>",
            )
        }
    layout = Layout(*values, "", False)
    plenty = problem_of(config)
    assert layout in plenty.layouts()
    most = plenty.examine(layout, 0.0)
    assert isinstance(most, Candidate) and not most.choice.recompute.granularity
    # Tight enough to need recomputation.
    problem = problem_of(config, memory=most.choice.held[most.choice.worst].total - 1)
    candidate = problem.examine(layout, 0.0)
    if isinstance(candidate, Miss):
        candidate = most
    planned = planned_config(config, layout, candidate.choice.recompute)
    memory = examine(planned).memory
    assert memory is not None and memory.choice.recompute == candidate.choice.recompute
    if memory.attention == "sdpa":
        pytest.skip("this machine's dry run assumes a CPU")
    assert memory.choice.held == candidate.choice.held


def test_what_does_not_fit_is_explained() -> None:
    config = make_config(2)
    problem = problem_of(config, memory=10**5)
    result = search(problem, problem.layouts())
    assert not result.ranked and result.misses
    text = str(nothing_fits(problem, result))
    least = min(result.misses, key=lambda miss: miss.held.total)
    assert str(least.layout) in text and f"{(least.held.total - 10**5) / 1e9:.1f} GB too much" in text
    assert "\n" not in text and "--gpus" in text


@pytest.mark.parametrize("gpu", ["a100-80gb", "h100-80gb", "h200-141gb", "b200-180gb", "gb200-186gb"])
def test_every_number_of_a_gpu_has_a_source(gpu: str) -> None:
    assert gpu in known_gpus() and load_hardware(gpu.upper()) == load_hardware(gpu)
    for key, (value, source) in sources(gpu).items():
        assert value is not None and len(source) > 5, key
    json.dumps(sources(gpu))


# Tensor cores, operations of one per clock, MHz; memory bits and MHz; NVLinks and GB/s of one per direction; Gb/s of
# the network adapters per GPU; GiB of the memory.
PARTS = {
    "a100-80gb": (432, 512, 1410, 5120, 1593, 12, 25, 200, 79.15),
    "h100-80gb": (528, 1024, 1830, 5120, 2619, 18, 25, 400, 79.11),
    "h200-141gb": (528, 1024, 1830, 6144, 3125, 18, 25, 400, 139.80),
    "b200-180gb": (None, None, None, 7680, 3996, 18, 50, 400, 178.35),
    "gb200-186gb": (None, None, None, None, None, 18, 50, 400, 184.31),
}


@pytest.mark.parametrize("name", PARTS)
def test_rates_follow_from_clocks_widths_and_links(name: str) -> None:
    """Dense operations, bytes instead of bits, one direction of a link, and no GB where GiB are meant."""
    gpu = load_hardware(name)
    cores, operations, clock, bits, memory_clock, links, link, network, gibibytes = PARTS[name]
    if cores:
        assert gpu.bf16_tflops == pytest.approx(cores * operations * clock * 1e-6, rel=1e-3)
    if bits:
        assert gpu.memory_gb_per_s == pytest.approx(bits / 8 * memory_clock * 2e-3, rel=2e-3)
    assert gpu.fp8_tflops == pytest.approx(0 if name.startswith("a100") else 2 * gpu.bf16_tflops, rel=1e-4)
    assert gpu.node_gb_per_s == links * link and gpu.network_gb_per_s == network / 8
    assert gpu.memory_gb == pytest.approx(gibibytes * 2**30 / 1e9, rel=1e-3)
