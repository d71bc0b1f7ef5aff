"""The terms of a step's time against values derived by hand, and their dependence on what they should depend on."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_anymal.config import (
    ConfigError,
    DistributedDataParallelConfig,
    EncoderConfig,
    ModalityConfig,
    ModelConfig,
    ProjectorConfig,
    RunConfig,
)
from megatron_anymal.data.planner import BatchLayout
from megatron_anymal.model.memory.media import EncoderSizes
from megatron_anymal.model.memory.sizes import Recompute
from megatron_anymal.planning.layouts import measurement
from megatron_anymal.planning.layouts.collectives import Link, link_of_group, links_of_layout
from megatron_anymal.planning.layouts.enumeration import Layout
from megatron_anymal.planning.layouts.hardware import Hardware, load_hardware
from megatron_anymal.planning.layouts.layer_time import PassTime, head_time, spared_time
from megatron_anymal.planning.layouts.problem import build_problem
from megatron_anymal.planning.layouts.rates import (
    attention_seconds,
    elementwise_seconds,
    matrix_rate,
    matrix_seconds,
    occupancy,
)
from megatron_anymal.planning.layouts.search import LayoutProblem
from megatron_anymal.planning.layouts.step_time import (
    StepInputs,
    first_chunk_extra,
    last_chunk_extra,
    layer_of,
    message_seconds,
    step_time,
)
from megatron_anymal.planning.layouts.workload import PackLoad, Workload, assumed_workload, pack_load

H100 = load_hardware("h100-80gb")
ONE = Layout(1, False, 1, 1, 1, 0, 0, "", False)
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


def problem_of(gpus: int = 8, **settings: Any) -> LayoutProblem:
    config = RunConfig()
    config.trainer.devices, config.trainer.num_nodes = min(gpus, 8), -(-gpus // 8)
    config.model = ModelConfig(global_batch_size=64)
    config.model.language_model.config = dict(LLAMA_8B)
    config.model.language_model.freeze = settings.pop("freeze", False)
    for name, value in settings.items():
        setattr(config.model, name, value)
    return build_problem(config, H100, [])[0]


def test_a_large_product_reaches_the_published_rate() -> None:
    """132 multiprocessors, tiles of 128 x 256: 12 x 11 tiles fill one wave."""
    m, n, k = 12 * 128, 11 * 256, 2**16
    assert occupancy(H100, m, n) == 1.0
    expected = 0.803 * 989.4e12 * k / (k + 256)
    assert matrix_rate(H100, m, n, k) == pytest.approx(expected)
    assert matrix_seconds(H100, m, n, k) == pytest.approx(2 * m * n * k / expected + 3e-6)


def test_edges_and_waves_cost() -> None:
    # One row too many: with the largest tiles a second wave, half of it empty; smaller tiles lose less.
    assert (1537 * 2816) / (2 * 132 * 128 * 256) < occupancy(H100, 12 * 128 + 1, 11 * 256) < 0.9
    # Few rows: bound by the bytes of the weights, not by operations.
    seconds = matrix_seconds(H100, 8, 4096, 4096)
    assert seconds == pytest.approx((2 * (8 * 4096 + 4096**2) + 2 * 8 * 4096) / (0.85 * 3.35e12) + 3e-6)


def test_attention_counts_half_of_the_square() -> None:
    """Llama-3 8B, one document of 4,096 tokens: 2 x 2 x 4096^2 / 2 operations for each of 4,096 channels."""
    inputs = problem_of().inputs(ONE)
    time = layer_of(inputs, 0).attention
    product = 2 * 4096**2 / 2 * 4096
    assert time.forward == pytest.approx(2 * product / (0.75 * 989.4e12) + 3e-6)
    assert time.backward == pytest.approx(5 * product / (0.65 * 989.4e12) + 3e-6)
    assert attention_seconds(H100, 1e12, 0.5, "fp32") > attention_seconds(H100, 1e12, 0.5, "bf16")


def test_documents_shorter_than_a_pack_need_less_attention() -> None:
    problem = problem_of()
    layout = BatchLayout(8, 1, 4096)
    long, short = (
        pack_load(Workload(64, 64 * 4096.0, squares, 4096, 64 * 4096.0), layout)
        for squares in (64 * 4096.0**2, 64 * 8 * 512.0**2)
    )
    assert long.tokens == short.tokens and short.squares == pytest.approx(long.squares / 8)
    inputs = problem.inputs(ONE)
    times = [layer_of(replace(inputs, load=load), 0) for load in (long, short)]
    assert times[0].attention.forward > 5 * times[1].attention.forward and times[0].mlp == times[1].mlp


def test_a_frozen_llama_has_no_weight_gradients() -> None:
    trained, frozen = (layer_of(problem_of(freeze=freeze).inputs(ONE), 0) for freeze in (False, True))
    assert frozen.mlp.forward == trained.mlp.forward
    # Two products back instead of one, on top of the same elementwise work.
    assert trained.mlp.backward - frozen.mlp.backward == pytest.approx(
        matrix_seconds(H100, 4096, 28672, 4096) + matrix_seconds(H100, 14336, 4096, 4096)
    )


def test_only_labels_go_through_the_head() -> None:
    inputs = problem_of().inputs(ONE)
    quarter = replace(inputs.load, labels=inputs.load.labels / 4)
    loads = inputs.load, quarter
    full, less = (head_time(H100, inputs.links, inputs.sizes.llama, load, "bf16") for load in loads)
    assert full.forward > 3 * less.forward and full == last_chunk_extra(inputs)
    frozen = last_chunk_extra(problem_of(freeze=True).inputs(ONE))
    # The frozen head computes the gradient of its input in the forward pass.
    assert frozen.backward < 0.1 * full.backward and frozen.forward > 1.5 * full.forward


def test_the_last_layer_computes_only_labels_after_its_attention() -> None:
    """Llama-3 8B, frozen, 1,024 labels among 4,096 tokens."""
    inputs = problem_of(freeze=True).inputs(ONE)
    load = replace(inputs.load, labels=1024.0)
    assert load.tokens == 4096

    def after_attention(rows: int) -> float:
        products = (matrix_seconds(H100, rows, n, k) for n, k in ((4096, 4096), (28672, 4096), (4096, 14336)))
        norm = elementwise_seconds(H100, 2 * rows * 4096 * 5, 2)
        return sum(products) + norm + elementwise_seconds(H100, 2 * rows * 3 * 14336)

    spared = after_attention(4096) - after_attention(1024)
    llama = inputs.sizes.llama
    assert spared_time(H100, inputs.links, llama, load, 31, "bf16").forward == pytest.approx(spared)
    head = head_time(H100, inputs.links, llama, load, "bf16")
    assert last_chunk_extra(replace(inputs, load=load)).forward == pytest.approx(head.forward - spared)
    assert spared_time(H100, inputs.links, llama, load, 31, "fp8") == PassTime()
    # On ranks that share the sequence, the selection takes one more gather, of the head's rows.
    shared = problem_of(freeze=True).inputs(ONE._replace(tensor_model_parallel_size=2, sequence_parallel=True))
    shared = replace(shared, load=replace(shared.load, labels=1024.0))
    saving = spared_time(H100, shared.links, shared.sizes.llama, shared.load, 31, "bf16")
    gather = shared.links.tensor.gather
    # Scattered output of proj and fc2, gathered input of fc1.
    hand = 3 * (gather(2.0 * 4096 * 4096) - gather(2.0 * 1024 * 4096)) - gather(2.0 * 1024 * 4096)
    assert saving.forward_wait == pytest.approx(hand)


def test_links_follow_the_order_of_the_ranks() -> None:
    links = links_of_layout(H100, 8, tensor=4, context=2, data=4)
    within, network = 0.8 * 450e9, 0.8 * 50e9
    assert links.tensor == Link(4, within, 1e-6 * 10) and links.context == Link(2, within, 1e-6 * 10)
    # Eight ranks, four apart: two on each of four nodes, which share their adapters.
    assert links.data == Link(8, 2 * network, 1e-6 * 15)
    assert links.pipeline == Link(2, network, 1e-6 * 15)
    assert link_of_group(H100, 8, 2, 1).rate == within


def test_collectives_move_what_the_ring_moves() -> None:
    link = Link(4, 1e9, 1e-3)
    assert link.gather(8e9) == pytest.approx(8 * 3 / 4 + 2e-3)
    assert link.reduce(8e9) == 2 * link.gather(8e9) and link.send(2e9) == pytest.approx(2.001)
    assert Link(1, 1e9, 1e-3).gather(8e9) == 0.0


def test_sequence_parallelism_moves_the_same_bytes_and_more_often_hidden() -> None:
    with_, without = (
        layer_of(problem_of().inputs(ONE._replace(tensor_model_parallel_size=4, sequence_parallel=on)), 0).whole
        for on in (True, False)
    )
    assert with_.forward_wait == pytest.approx(without.forward_wait, rel=0.1)
    assert with_.forward < without.forward


def test_recomputation_repeats_the_forward_pass() -> None:
    inputs = problem_of().inputs(ONE)
    plain = step_time(inputs, Recompute()).pipeline.seconds
    full = step_time(inputs, Recompute("full", (), "block", 32)).pipeline.seconds
    layer = layer_of(inputs, 0)
    number = inputs.load.number
    assert full - plain == pytest.approx(number * 32 * layer.whole.forward_total)
    attention = step_time(inputs, Recompute("selective", ("core_attn",))).pipeline.seconds
    assert attention - plain == pytest.approx(number * 32 * layer.attention.forward_total)


def overlapped(inputs: StepInputs, on: bool) -> StepInputs:
    return replace(inputs, ddp=DistributedDataParallelConfig(overlap_grad_reduce=on, overlap_param_gather=on))


def test_overlap_hides_gradients() -> None:
    inputs = problem_of(64).inputs(ONE)
    off, on = (step_time(overlapped(inputs, value), Recompute()) for value in (False, True))
    # 8.03e9 fp32 gradients over 64 ranks.
    assert off.reductions[0] == pytest.approx(inputs.links.data.gather(4 * 8.03e9), rel=0.01)
    # What is left is the last bucket: 64 million of the parameters.
    assert on.reductions[0] == pytest.approx(off.reductions[0] * 64e6 / 8.03e9, rel=0.01)
    assert on.update < off.update and on.seconds < off.seconds
    assert off.exposed > on.exposed > 0 and off.bubble == on.bubble == 0.0


def test_encoding_on_all_stages_costs_what_the_waits_cannot_take() -> None:
    layout = ONE._replace(pipeline_model_parallel_size=4)
    inputs = with_encoder(problem_of(8).inputs(layout), 1.0)
    nothing = replace(inputs, encoders=())
    first = step_time(inputs, Recompute())
    free = step_time(replace(inputs, all_stages_encode=True), Recompute())
    # All of it fits: as if encoders took no time.
    projectors = step_time(replace(with_encoder(inputs, 0.0), all_stages_encode=True), Recompute())
    assert step_time(nothing, Recompute()).seconds < free.seconds == projectors.seconds < first.seconds
    # A hundred times the work does not fit; the rest is shared by four stages.
    much = with_encoder(inputs, 100.0)
    number = inputs.load.number
    encoding = (first_chunk_extra(much).forward - first_chunk_extra(with_encoder(inputs, 0.0)).forward) * number
    busy = projectors.pipeline.busy
    late = (encoding - 6 * sum(busy) / 4 / number) / 4
    assert late > 0
    spread = step_time(replace(much, all_stages_encode=True), Recompute())
    assert spread.seconds == pytest.approx(projectors.seconds + late)
    assert spread.seconds < step_time(much, Recompute()).seconds / 2


def with_encoder(inputs: StepInputs, work: float) -> StepInputs:
    """Two images per micro-batch for an encoder with `work` times the operations of two layers on a pack."""
    section = ModalityConfig(encoder=EncoderConfig(type="clip"), projector=ProjectorConfig(type="linear"))
    operations = round(work * 2 * 2 * 4096 * 4096 * 14336)
    sizes = EncoderSizes(10**9, 576, 1024, 3 * 336 * 336, 0, operations)
    load = replace(inputs.load, pieces=(("image", 2.0),))
    return replace(inputs, encoders=(("image", section, sizes),), load=load)


def test_a_message_is_a_micro_batch_of_hidden_states() -> None:
    layout = ONE._replace(tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=2)
    inputs = problem_of(64).inputs(layout)
    assert message_seconds(inputs) == pytest.approx(2 * 4096 / 2 * 4096 / (0.8 * 50e9) + 15e-6)


@pytest.mark.parametrize("multiple", [1, 4])
def test_packs_hold_all_documents(multiple: int) -> None:
    work = Workload(1000, 1000 * 100.0, 1000 * 100.0**2, 128, 50_000.0, {"image": 1000.0})
    load = pack_load(work, BatchLayout(8, 2, 2048, length_multiple=16, micro_batches_multiple=multiple))
    assert load.number % multiple == 0 and load.tokens % 16 == 0 and load.tokens <= 2 * 2048
    assert load.number * 8 * load.tokens >= 100_000
    assert load.labels * load.number * 8 == pytest.approx(50_000)
    assert dict(load.pieces)["image"] * load.number * 8 == pytest.approx(1000)


def test_assumptions_are_said() -> None:
    work = assumed_workload(ModelConfig(global_batch_size=8), 4096)
    assert (work.tokens, work.longest, work.labels) == (8 * 4096, 4096, 8 * 4096) and "assumed" in work.origin
    given = assumed_workload(ModelConfig(global_batch_size=8), 4096, sample_tokens=100, label_share=0.2)
    assert given.tokens == 800 and given.labels == pytest.approx(160)


def test_measured_rates_replace_the_shape_model() -> None:
    rates = ((64, 64, 64, 1.0), (1024, 1024, 1024, 9.0), (4096, 4096, 4096, 10.0), (64, 4096, 4096, 3.0))
    measured = replace(H100, name="measured", matrix_rates=rates)
    assert matrix_rate(measured, 64, 64, 64) < matrix_rate(measured, 1024, 1024, 1024)
    assert 1e12 < matrix_rate(measured, 512, 512, 512) < 10e12


@pytest.mark.parametrize("text", ["- a list", "name: H100", "name: [H100, x]\nmemory_gb: 80"])
def test_a_file_without_numbers_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "gpu.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"gpu\.yaml: \w+ must be \[value, source\]"):
        load_hardware(str(tmp_path / "gpu.yaml"))


def test_a_port_in_demand_does_not_end_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    start, taken = measurement.mp.start_processes, socket.socket()

    def port_in_demand(function: Any, arguments: tuple[Any, ...], *others: Any, **more: Any) -> Any:
        """Start the processes while someone else listens at their port, if it can be had."""
        with contextlib.suppress(OSError):
            taken.bind(("127.0.0.1", arguments[1]))
            taken.listen()
        return start(function, arguments, *others, **more)

    monkeypatch.setattr(measurement.mp, "start_processes", port_in_demand)
    with taken:
        rate, latency = measurement.collective_rate(torch.device("cpu"))
    assert rate > 0 and latency > 0


def test_a_measurement_is_a_hardware_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "_SIZES", ((64, 256), (64,), (64, 256)))
    monkeypatch.setattr(measurement, "_SECONDS", 0.001)
    measurement.write_measurement(tmp_path / "here.yaml", measurement.measure_machine())
    hardware = load_hardware(str(tmp_path / "here.yaml"))
    assert isinstance(hardware, Hardware) and len(hardware.matrix_rates) == 4
    assert hardware.memory_gb_per_s > 0 and hardware.node_gb_per_s > 0 and hardware.node_latency_us > 0
    assert hardware.attention_forward_share > 0 and hardware.bf16_tflops == max(
        rate for *_, rate in hardware.matrix_rates
    )
    assert matrix_seconds(hardware, 64, 64, 64, "fp32") > 0


def test_pack_load_is_hashable() -> None:
    assert hash(PackLoad(1, 2, 3.0, 4.0, (("image", 1.0),)))
