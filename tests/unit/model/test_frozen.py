"""Frozen weights cost nothing extra: bytes stored by a rank and kept for the backward pass, checked by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import make_config
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import copies, saved_for_backward, storages, stored_bytes
from megatron_anymal.config import ProjectorConfig, RunConfig
from megatron_anymal.data.loader import steps
from megatron_anymal.data.micro_batch import MediaBatch, MicroBatch
from megatron_anymal.data.records import PlannedMicroBatch
from megatron_anymal.model.attention import document_pack
from megatron_anymal.model.build import build_models
from megatron_anymal.model.llama import build_gpt, transformer_config
from megatron_anymal.model.llama_shape import read_llama_config
from megatron_anymal.parallel import initialize
from megatron_anymal.train.build import TrainState, build, build_inputs
from megatron_anymal.train.step import train_step

# Sizes from tests/tiny.py; a vocabulary of 33 is padded to 34 for two ranks.
H, FFN, VOCAB, LAYERS, KEYS = 32, 48, 33, 4, 16

# Trainable components, as prefixes of parameter names.
PROJECTORS = {"projectors.image", "projectors.audio", "projectors.imu"}
TRAINABLE = {
    "frozen": PROJECTORS,
    "partial": {"projectors.audio", "projectors.imu", "encoders.imu"},
    "full": {"language_model", "encoders.image", "encoders.imu", *PROJECTORS},
}
# Number of processes, tensor-parallel size, distributed optimizer.
LAYOUTS = {"one": (1, 1, True), "plain": (1, 1, False), "dp2": (2, 1, True), "tp2": (2, 2, True)}


def sizes_by_hand(tp: int) -> dict[str, int]:
    """Parameters of each component on one tensor-parallel rank."""
    vocabulary = math.ceil(VOCAB / tp) * H
    layer = 2 * H + (H + 2 * KEYS) * H // tp + H * H // tp + 3 * FFN * H // tp
    # CLIP of width 16 for 8 x 8 pixels in patches of 4: class token, patches, five positions, a norm, one layer of
    # attention and an MLP of 32 with two norms; the last norm applies to the class token.
    attention = 4 * (16 * 16 + 16)
    clip = 16 + 16 * 3 * 4 * 4 + 5 * 16 + 32 + (2 * 32 + attention + (16 * 32 + 32) + (32 * 16 + 16))
    # Resampler of width 16, 5 - 1 features, 2 latents; rows or columns of its matrices are split, norms are not.
    resampler = 32 + (16 + 1) * 16 // tp + 4 * 16 + 2 * 16
    resampler += 3 * 32 + 4 * 16 * 16 // tp + (16 + 1) * 32 // tp + (32 * 16 // tp + 16)
    resampler += 32 + (16 + 1) * H // tp + 1
    # Six frames of 8 mel bands form one soft token; the single feature of the IMU encoder becomes two.
    audio, imu = (6 * 8 + 1) * H // tp + 1, (8 + 1) * 2 * H // tp + 1
    # Group norms of 6 and 8 channels, a convolution of 5 without bias, a GRU of three gates with two biases each.
    imu2clip = 2 * 6 + 6 * 8 * 5 + 2 * 8 + 3 * (2 * 8 * 8 + 2 * 8)
    return {
        "language_model": 2 * vocabulary + LAYERS * layer + H,
        "encoders.image": clip,
        "encoders.audio": 0,
        "encoders.imu": imu2clip,
        "projectors.image": resampler,
        "projectors.audio": audio,
        "projectors.imu": imu,
    }


@pytest.fixture(scope="module")
def config(mixed_shards: str, tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = make_config(mixed_shards, tokenizer_folder, tmp_path_factory.mktemp("frozen"))
    config.model.language_model.config["vocab_size"] = VOCAB
    return config


def after_steps(config: RunConfig, layout: str, cases: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Results of `after_a_step` for all cases, in order."""
    return [after_a_step(config, layout, *case) for case in cases]


def after_a_step(config: RunConfig, layout: str, trains: str, precision: str) -> dict[str, Any]:
    """Train one step and return the bytes that this rank then stores."""
    processes, tp, distributed = LAYOUTS[layout]
    config.trainer.devices, config.trainer.precision = processes, precision
    config.model.tensor_model_parallel_size = tp
    config.model.ddp.use_distributed_optimizer = distributed
    config.model.language_model.freeze = "language_model" not in TRAINABLE[trains]
    for name, section in config.model.modalities.items():
        section.encoder.freeze = f"encoders.{name}" not in TRAINABLE[trains]
        section.projector.freeze = f"projectors.{name}" not in TRAINABLE[trains]
    state = build(config, initialize(config))
    data = state.train_data
    replica = state.layout.data_rank
    for plan, micro_batches in steps(
        data.planner, data.reader, replica=replica, start=0, stop=1, num_workers=0, prefetch_steps=1
    ):
        train_step(state, plan, micro_batches)
    return measured(state)


def measured(state: TrainState) -> dict[str, Any]:
    model = state.models[0]
    named = dict(model.named_parameters())
    frozen = [p for p in named.values() if not p.requires_grad]
    return {
        "parts": {
            part: sum(p.numel() for name, p in named.items() if name.startswith(part + "."))
            for part in sizes_by_hand(1)
        },
        # In the order of the buffers.
        "trainable": [p.numel() for p in reversed(named.values()) if p.requires_grad],
        "frozen with a gradient": [name for name, p in named.items() if not p.requires_grad and copies(p)],
        "frozen weights": sum(storages(frozen).values()),
        **stored_bytes(model, state.wrapped[0], state.optimizer),
    }


def rounded(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


def bytes_by_hand(trainable: Sequence[int], frozen: int, layout: str, precision: str, rank: int) -> dict[str, int]:
    """Bytes that a rank should store, from its parameter counts.

    megatron-core's distributed optimizer pads in two places: before every weight in the buffers, up to a multiple of 64
    elements, and at the end of a bucket (only one here), up to a multiple of 128 and of the number of replicas.
    """
    processes, tp, distributed = LAYOUTS[layout]
    replicas, size = processes // tp, 4 if precision == "32" else 2
    offset, own = 0, 0
    buffer = rounded(sum(rounded(n, 64) for n in trainable), math.lcm(128, replicas)) if distributed else sum(trainable)
    for number in trainable:
        # Each replica updates an equal slice of the buffer: of every weight, the elements inside that slice.
        first, last = rank // tp * buffer // replicas, (rank // tp + 1) * buffer // replicas
        own += max(0, min(offset + number, last) - max(offset, first))
        offset += rounded(number, 64) if distributed else number
    return {
        "weights": size * (frozen + buffer),
        "frozen weights": size * frozen,
        "gradients": 4 * buffer,
        "moments": 2 * 4 * own,
        # bf16 weights have an fp32 copy.
        "others": 0 if precision == "32" else 4 * own,
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_of_a_rank(config: RunConfig, layout: str) -> None:
    processes, tp, _ = LAYOUTS[layout]
    cases = [(trains, precision) for trains in TRAINABLE for precision in ("32", "bf16")]
    by_hand = sizes_by_hand(tp)
    for rank, results in enumerate(run_ranks(processes, after_steps, config, layout, cases)):
        for (trains, precision), sizes in zip(cases, results, strict=True):
            where = f"{trains}, {precision}, rank {rank}"
            assert sizes.pop("parts") == by_hand, where
            trainable = sizes.pop("trainable")
            assert sum(trainable) == sum(by_hand[part] for part in TRAINABLE[trains]), where
            assert sizes.pop("frozen with a gradient") == [], where
            frozen = sum(by_hand.values()) - sum(trainable)
            assert sizes == bytes_by_hand(trainable, frozen, layout, precision, rank), where


@dataclass(frozen=True)
class LayerCase:
    """One Llama layer: frozen or not, its parallel layout, and the document lengths."""

    frozen: bool
    tp: int = 1
    sequence_parallel: bool = False
    documents: tuple[int, ...] = (20,)


# The layer for the counts below: heads, key/value groups, head size.
HEADS, GROUPS, D = 4, 2, 16


def layer_by_hand(case: LayerCase) -> dict[str, int]:
    """Elements (fp32) that a layer keeps for its backward pass, by purpose.

    A frozen layer keeps only what the gradient of its input needs. Cosines and sines belong to the pack, not the layer.
    """
    tokens = sum(case.documents)
    # Documents are stacked, padded to the longest.
    padded = max(case.documents) * len(case.documents)
    # Outside attention and MLP, sequence parallelism splits the tokens.
    own = tokens // case.tp if case.sequence_parallel else tokens
    queries, keys, ffn = HEADS * D // case.tp, GROUPS * D // case.tp, FFN // case.tp
    kept = {
        "inputs of the norms": 2 * own * H,
        "1 / rms of the norms": 2 * own,
        "queries": padded * queries,
        "keys and values": 2 * padded * keys,
        "attention's output and logsumexp": padded * queries + padded * HEADS // case.tp,
        "gate and up": 2 * tokens * ffn,
    }
    if not case.frozen:
        kept["inputs of the query-key-value and the gate-up linear"] = 2 * own * H
        kept["inputs of the output and the down linear"] = tokens * queries + tokens * ffn
    return kept


def run_layers(config: RunConfig, cases: Sequence[LayerCase]) -> list[dict[str, Any]]:
    """Bytes kept by each layer, and the linear layers whose input is kept."""
    config.model.language_model.config.update(num_hidden_layers=1, num_attention_heads=HEADS, head_dim=D)
    config.model.language_model.config.update(num_key_value_heads=GROUPS)
    return [run_layer(config, case) for case in cases]


def run_layer(config: RunConfig, case: LayerCase) -> dict[str, Any]:
    config.trainer.devices = config.model.tensor_model_parallel_size = case.tp
    config.model.sequence_parallel = case.sequence_parallel
    layout = initialize(config)
    hf = read_llama_config(config.model.language_model)
    gpt = build_gpt(hf, transformer_config(config.model, config.trainer.precision, hf), "local")
    for parameter in gpt.parameters():
        nn.init.normal_(parameter, std=0.1).requires_grad_(not case.frozen)
    layer = gpt.decoder.layers[0].train()
    inputs: dict[str, Tensor] = {}
    for name, module in layer.named_modules():
        if name.rpartition(".")[2].startswith("linear_"):
            module.register_forward_pre_hook(lambda m, given, name=name: inputs.update({name: given[0]}))
    pack = document_pack(case.documents, layout.device, gpt.inv_freq)
    tokens = sum(case.documents) // (case.tp if case.sequence_parallel else 1)
    hidden = torch.randn(tokens, 1, H, requires_grad=True)
    # All layers share the pack's index tensors.
    shared = [*pack.rotation, *(value for value in vars_within(pack.kernel) if isinstance(value, Tensor))]
    flops = FlopCounterMode(display=False)
    with flops:
        kept, (output, _) = saved_for_backward(
            lambda: layer(hidden, attention_mask=None, packed_seq_params=pack),
            [*layer.parameters(), *shared],
        )
        output.sum().backward()
    of_inputs = {name: storages([tensor]).keys() for name, tensor in inputs.items()}
    return {
        "bytes": sum(kept.values()),
        "products": flops.get_flop_counts()["Global"][torch.ops.aten.mm],
        "linears": len(inputs),
        "keep their input": {name.rpartition("_")[2] for name, places in of_inputs.items() if places & kept.keys()},
    }


def vars_within(kernel: Any) -> list[Any]:
    """The attributes of a kernel and of its buckets."""
    return [*vars(kernel).values(), *(value for bucket in kernel._buckets for value in vars(bucket).values())]


LAYER_CASES = [
    LayerCase(frozen, tp, sequence_parallel, documents)
    for frozen in (True, False)
    for tp, sequence_parallel in ((1, False), (2, False), (2, True))
    for documents in ((20,), (5, 8, 7))
]


@pytest.mark.parametrize("tp", [1, 2])
def test_a_layer_keeps_what_its_input_gradient_needs(config: RunConfig, tp: int) -> None:
    cases = [case for case in LAYER_CASES if case.tp == tp]
    for rank in run_ranks(tp, run_layers, config, cases):
        for case, measurement in zip(cases, rank, strict=True):
            assert measurement["linears"] == 4, case
            assert measurement["bytes"] == 4 * sum(layer_by_hand(case).values()), case
            # Two operations per weight and token for the output, for the input gradient, and if trainable for the
            # weight gradient.
            weights = (2 * HEADS * D + 2 * GROUPS * D + 3 * FFN) * H // tp
            assert measurement["products"] == 2 * weights * sum(case.documents) * (2 if case.frozen else 3), case
            assert measurement["keep their input"] == (set() if case.frozen else {"qkv", "proj", "fc1", "fc2"}), case


def soft_token_bytes(config: RunConfig, depths: Sequence[int], freeze: bool) -> list[int]:
    """Bytes kept by encoding and projecting seven pictures, per encoder depth."""
    sizes = []
    for depth in depths:
        image = config.model.modalities["image"]
        image.encoder.config["num_hidden_layers"], image.encoder.freeze = depth, freeze
        image.projector = ProjectorConfig(type="linear", num_layers=1, num_tokens=2)
        config.model.modalities = {"image": image}
        layout = initialize(config)
        hf = read_llama_config(config.model.language_model)
        _, modalities = build_inputs(config.model, config.data)
        [model] = build_models(config.model, config.trainer.precision, hf, layout, modalities, lambda models: None)
        media = MediaBatch(torch.randn(7, 3, 8, 8), ((7,),), torch.arange(14))
        nothing = torch.zeros(1, 14, dtype=torch.int64)
        micro_batch = MicroBatch(
            PlannedMicroBatch(0, 14, ()), (14,), nothing, nothing, nothing.float(), nothing, {"image": media}, {}
        )
        kept, soft = saved_for_backward(partial(model.soft_tokens, micro_batch), model.parameters())
        assert soft["image"].shape == (14, H) and soft["image"].requires_grad
        sizes.append(sum(kept.values()))
    return sizes


def test_a_frozen_encoder_keeps_nothing(config: RunConfig) -> None:
    # Features of 4 patches; per soft token its 1 / rms, and its value before and after the division (for the gain).
    projector = 7 * 4 * 16 + 7 * 2 + 2 * 7 * 2 * H
    assert run_ranks(1, soft_token_bytes, config, (1, 3), True) == [[4 * projector] * 2]
    [(shallow, deep)] = run_ranks(1, soft_token_bytes, config, (1, 3), False)
    assert 4 * projector < shallow < deep
