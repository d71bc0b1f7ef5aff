"""The dry run: counts against hand counts and built models, refusals, and the state it must not touch."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from engine import train
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, get_cuda_rng_tracker
from ranks import run_ranks
from tiny import LLAMA, make_config
from transformers import CLIPVisionConfig

from megatron_anymal.__main__ import main
from megatron_anymal.config import ConfigError, DatasetConfig, DiscreteConfig, RunConfig, StageConfig
from megatron_anymal.config.compose import compose, default_config_dir
from megatron_anymal.data.records import DataError
from megatron_anymal.dry_run.report import render
from megatron_anymal.dry_run.simulate import Stage, examine
from megatron_anymal.parallel import ParallelLayout, initialize
from megatron_anymal.train.build import TrainState, build

ROOT = Path(__file__).parents[3]


@pytest.fixture
def tiny(mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> RunConfig:
    """Three modalities on a four-layer Llama; the IMU encoder and the projectors are trainable."""
    return make_config(mixed_shards, tokenizer_folder, tmp_path / "run")


def laid_out(config: RunConfig, world: int, **options: Any) -> RunConfig:
    config = copy.deepcopy(config)
    config.trainer.devices = world
    for name, value in options.items():
        setattr(config.model, name, value)
    return config


def llama_layers(count: int, tp: int) -> int:
    """Hand count: 4 heads and 2 groups of size 8, hidden size 32, gate, up and down projections of width 48."""
    attention = (4 + 2 + 2) * 8 * 32 + 4 * 8 * 32
    return count * ((attention + 3 * 48 * 32) // tp + 2 * 32)


def table(rows: int, tp: int) -> int:
    """Hand count of the embedding or the head, with the vocabulary padded to a multiple of the tensor-parallel size."""
    return -(-rows // tp) * 32


# Class token, patches, positions, norm; one layer: attention, two norms, MLP.
IMAGE_ENCODER = 16 + 16 * 3 * 4 * 4 + (4 + 1) * 16 + 32 + 4 * (16 * 16 + 16) + 2 * 32 + (16 * 32 + 32) + (32 * 16 + 16)
# Group norm, convolution, group norm, GRU.
IMU_ENCODER = 2 * 6 + 8 * 6 * 5 + 2 * 8 + 3 * 8 * (8 + 8) + 2 * 3 * 8


def image_projector(tp: int) -> int:
    """Hand count: width 16, 4 features, 2 latents, one layer with an MLP of 32; then a projection to 32."""
    outer = (16 * 16 + 16) // tp + (16 * 32 + 32) // tp + 4 * 16 + 2 * 16 + 2 * (2 * 16) + 1
    inner = 3 * (2 * 16) + 4 * 16 * 16 // tp + (16 * 32 + 32) // tp + 32 * 16 // tp + 16
    return outer + inner


def linear_projector(inputs: int, outputs: int, tp: int) -> int:
    return (inputs * outputs + outputs) // tp + 1


def media(tp: int) -> tuple[int, int]:
    """Hand count of encoders and projectors: total and trainable. 11 frames of 8 bands form groups of 6."""
    projectors = image_projector(tp) + linear_projector(6 * 8, 32, tp) + linear_projector(8, 2 * 32, tp)
    return IMAGE_ENCODER + IMU_ENCODER + projectors, IMU_ENCODER + projectors


def counts(stage: Stage) -> list[tuple[tuple[int, ...], int, int]]:
    return [(part.layers, part.parameters, part.trainable) for part in stage.parts]


def test_one_process(tiny: RunConfig) -> None:
    dry_run = examine(tiny)
    (stage,) = dry_run.stages
    (part,) = stage.parts
    everything, trains = media(1)
    whole = llama_layers(4, 1) + 2 * table(32, 1) + 32 + everything
    assert (part.layers, part.parameters, part.trainable) == ((0, 1, 2, 3), whole, trains)
    halves = [f"{name} {half}" for name in ("image", "audio", "imu") for half in ("encoder", "projector")]
    assert part.besides == ("embedding", *halves, "head")
    # fp32: two optimizer moments per trainable parameter, and nothing for frozen ones.
    assert (stage.weight_bytes, stage.gradient_bytes, stage.optimizer_bytes) == (4 * whole, 4 * trains, 8 * trains)
    assert sum(count for count, _ in dry_run.weights.values()) == whole
    assert sum(count for count, learns in dry_run.weights.values() if learns) == trains
    assert dry_run.notes == [] and dry_run.missing == []


def test_tensor_parallel_with_a_padded_vocabulary(tiny: RunConfig) -> None:
    tiny.model.language_model.config["vocab_size"] = 33
    dry_run = examine(laid_out(tiny, 4, tensor_model_parallel_size=2, sequence_parallel=True))
    everything, trains = media(2)
    local = llama_layers(4, 2) + 2 * table(33, 2) + 32 + everything
    assert counts(dry_run.stages[0]) == [((0, 1, 2, 3), local, trains)]
    assert dry_run.stages[0].ranks == range(4)
    # The counts of the whole model contain neither padding nor replicas.
    whole = llama_layers(4, 1) + 2 * 33 * 32 + 32 + media(1)[0]
    assert sum(count for count, _ in dry_run.weights.values()) == whole
    # Two replicas share the optimizer state.
    assert dry_run.stages[0].optimizer_bytes == 8 * trains // 2


def test_uneven_stages(tiny: RunConfig) -> None:
    layout = {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1}
    first, second = examine(laid_out(tiny, 6, **layout)).stages
    everything, trains = media(1)
    assert counts(first) == [((0,), llama_layers(1, 1) + table(32, 1) + everything, trains)]
    assert counts(second) == [((1, 2, 3), llama_layers(3, 1) + table(32, 1) + 32, 0)]
    assert (first.ranks, second.ranks) == (range(0, 3), range(3, 6))
    assert (second.gradient_bytes, second.optimizer_bytes) == (0, 0)
    assert second.parts[0].besides == ("head",)


def test_encoders_on_all_stages(tiny: RunConfig) -> None:
    tiny.model.modalities["imu"].encoder.freeze = True
    layout = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    one, spread = (examine(laid_out(tiny, 2, encoder_placement=of, **layout)) for of in ("first_stage", "all_stages"))
    assert spread.stages[0] == one.stages[0] and spread.weights == one.weights
    (first, _), (before, _) = spread.stages[1].parts, one.stages[1].parts
    assert first.parameters == before.parameters + IMAGE_ENCODER + IMU_ENCODER and first.trainable == before.trainable
    assert first.besides == ("image encoder", "imu encoder") and spread.stages[1].parts[1] == one.stages[1].parts[1]
    assert spread.stages[1].weight_bytes - one.stages[1].weight_bytes == 4 * (IMAGE_ENCODER + IMU_ENCODER)
    # The estimate counts the same weights, and a step's features.
    assert spread.memory is not None and one.memory is not None
    for number, (held, was) in enumerate(zip(spread.memory.choice.held, one.memory.choice.held)):
        assert held.weights == spread.stages[number].weight_bytes
        assert held.working > was.working


def test_virtual_stages_and_context(tiny: RunConfig) -> None:
    layout = {
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "context_parallel_size": 2,
    }
    tiny.trainer.precision = "bf16"
    first, second = examine(laid_out(tiny, 4, **layout)).stages
    everything, trains = media(1)
    layer = llama_layers(1, 1)
    assert counts(first) == [((0,), layer + table(32, 1) + everything, trains), ((2,), layer, 0)]
    assert counts(second) == [((1,), layer, 0), ((3,), layer + table(32, 1) + 32, 0)]
    assert first.weight_bytes == 2 * first.parameters
    # bf16: fp32 master weights in addition to the moments, sharded over the context-parallel ranks.
    assert first.optimizer_bytes == 12 * trains // 2
    assert (first.ranks, second.ranks) == (range(0, 2), range(2, 4))


def test_without_the_distributed_optimizer_every_rank_holds_all(tiny: RunConfig) -> None:
    tiny.model.ddp.use_distributed_optimizer = False
    assert examine(laid_out(tiny, 2)).stages[0].optimizer_bytes == 8 * media(1)[1]


def test_a_tied_head_counts_once(tiny: RunConfig) -> None:
    tiny.model.language_model.config["tie_word_embeddings"] = True
    tiny.model.language_model.freeze = False
    whole = llama_layers(4, 1) + table(32, 1) + 32 + media(1)[0]
    one = examine(tiny)
    assert one.stages[0].parameters == sum(count for count, _ in one.weights.values()) == whole
    # The last stage keeps a copy.
    two = examine(laid_out(tiny, 2, pipeline_model_parallel_size=2))
    assert sum(stage.parameters for stage in two.stages) == whole + table(32, 1)
    assert two.weights == one.weights


def held(config: RunConfig) -> dict[str, Any]:
    """In a rank: sizes of a built run after one step."""
    layout: ParallelLayout = initialize(config)
    state: TrainState = build(config, layout)
    layers = [
        tuple(layer.layer_number - 1 for layer in model.get_submodule("language_model.decoder.layers").children())
        for model in state.models
    ]
    parameters = [parameter for model in state.models for parameter in model.parameters()]
    state.optimizer.zero_grad()
    state.optimizer.step()
    optimizers: list[Any] = getattr(state.optimizer, "chained_optimizers", [state.optimizer])
    inner = [one.optimizer for one in optimizers if one.optimizer is not None]
    moments = [value for one in inner for kept in one.state.values() for value in kept.values()]
    # In fp32 the optimizer's weights are views of the model's.
    copies = [p for one in inner for group in one.param_groups for p in group["params"] if p.dtype == torch.float32]
    return {
        "stage": layout.pipeline_rank,
        "layers": layers,
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "learning": sum(1 for p in parameters if p.requires_grad),
        "weights": sum(p.numel() * p.element_size() for p in parameters),
        "gradients": sum(b.grad_data.numel() * b.grad_data.element_size() for w in state.wrapped for b in w.buffers),
        "optimizer": sum(t.numel() * t.element_size() for t in moments if t.dim())
        + (sum(p.numel() * 4 for p in copies) if config.trainer.precision == "bf16" else 0),
    }


BUILT: dict[str, tuple[int, str, dict[str, Any]]] = {
    "tp2-fp32": (2, "32", {"tensor_model_parallel_size": 2}),
    "pp2-vpp2-dp2-bf16": (
        4,
        "bf16",
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    ),
    "cp2-bf16": (2, "bf16", {"context_parallel_size": 2}),
    "tp2-codes-bf16": (
        2,
        "bf16",
        {"tensor_model_parallel_size": 2, "discrete": {"x": DiscreteConfig(codebooks=[6, 5])}},
    ),
}


@pytest.mark.parametrize("name", BUILT)
def test_a_built_run_holds_what_was_said(name: str, tiny: RunConfig) -> None:
    world, precision, options = BUILT[name]
    tiny.trainer.precision = precision
    config = laid_out(tiny, world, **options)
    stages = examine(config).stages
    ranks = run_ranks(world, held, config)
    for number, rank in enumerate(ranks):
        stage = stages[rank["stage"]]
        assert number in stage.ranks
        assert rank["layers"] == [part.layers for part in stage.parts]
        assert (rank["parameters"], rank["trainable"]) == (stage.parameters, stage.trainable)
        assert rank["weights"] == stage.weight_bytes
        # In megatron-core's buffer each weight starts at a multiple of 64, and the end is padded for the replicas.
        padding = 4 * (64 * rank["learning"] + 1024)
        assert stage.gradient_bytes <= rank["gradients"] < stage.gradient_bytes + padding
    for stage in stages:
        # The ranks of a stage shard the states of its trainable weights, cut at the boundaries of the padded buffers.
        states = sum(ranks[number]["optimizer"] for number in stage.ranks)
        assert states == stage.optimizer_bytes * len(stage.ranks)


def refusal(capsys: pytest.CaptureFixture[str], folder: Path, *overrides: str) -> str:
    assert main(["pretrain", f"--config-path={folder}", "--config-name=tiny", "--dry-run", *overrides]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert not dist.is_initialized()
    return captured.err


@pytest.fixture
def folder(tiny: RunConfig, tmp_path: Path) -> Path:
    """A configuration folder with tiny.yaml, as the command line reads it."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"defaults": ["anymal", "_self_"], **tiny.to_dict()}))
    return folder


REFUSALS = {
    "processes": (["trainer.devices=3", "model.context_parallel_size=2"], "trainer.num_nodes x trainer.devices = 3"),
    "heads": (
        ["trainer.devices=3", "model.tensor_model_parallel_size=3"],
        "model.tensor_model_parallel_size=3 does not divide model.modalities.image.projector.num_attention_heads=4",
    ),
    "llama heads": (
        [
            "trainer.devices=3",
            "model.tensor_model_parallel_size=3",
            "model.modalities.image.projector.num_attention_heads=3",
            "model.modalities.image.projector.hidden_size=24",
        ],
        "model.tensor_model_parallel_size=3 does not divide the Llama's num_attention_heads=4",
    ),
    "stages": (
        ["trainer.devices=5", "model.pipeline_model_parallel_size=5"],
        "model.pipeline_model_parallel_size=5 does not divide the Llama's 4 layers",
    ),
    "parts": (
        [
            "trainer.devices=2",
            "model.pipeline_model_parallel_size=2",
            "model.virtual_pipeline_model_parallel_size=3",
        ],
        "model.virtual_pipeline_model_parallel_size=3 does not divide the 2 layers",
    ),
    "chunks": (
        ["trainer.devices=2", "model.context_parallel_size=2", "data.seq_length=62"],
        "data.seq_length=62 must be a multiple of 4",
    ),
    "projector": (
        ["model.modalities.image.projector.num_attention_heads=3"],
        "model.modalities.image.projector: its width 16 must be divisible by num_attention_heads=3",
    ),
    "recompute": (
        ["model.recompute_granularity=selective", "model.recompute_modules=[everything]"],
        "megatron-core refuses the model's settings: Invalid choices for recompute_modules",
    ),
    "placeholder": (
        ["model.modalities.imu.placeholder=nothing", "data.train.mix.path=nowhere"],
        "model.modalities.imu.placeholder='nothing'",
    ),
    "vocabulary": (["model.language_model.config.vocab_size=8"], "the Llama's vocabulary has only 8 entries"),
    "initial-weights": (["model.restore_from_path=/usr"], "no checkpoint in '/usr'"),
    "long-samples": (["data.seq_length=8"], "longer than data.seq_length=8"),
    "loggers": (["exp_manager.create_wandb_logger=true"], "exp_manager.wandb_logger_kwargs.name"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_work_is_refused(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, words = REFUSALS[name]
    assert words in refusal(capsys, folder, *overrides)


def test_nothing_is_left_behind_or_written(
    folder: Path, tiny: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    state, device = torch.get_rng_state(), torch.cuda.current_device
    assert main(["pretrain", f"--config-path={folder}", "--config-name=tiny", "--dry-run", "trainer.devices=2"]) == 0
    assert "data.train.mix  40 samples" in capsys.readouterr().out
    assert not dist.is_initialized() and not parallel_state.model_parallel_is_initialized()
    assert torch.cuda.current_device is device and torch.empty(1).device.type == "cpu"
    assert torch.equal(torch.get_rng_state(), state)
    # megatron-core's own tracker, not the stand-in that keeps no random state.
    assert type(get_cuda_rng_tracker()) is CudaRNGStatesTracker
    assert not list((tmp_path / "here").iterdir()) and not Path(tiny.exp_manager.explicit_log_dir).exists()


def test_a_failed_build_leaves_nothing_behind(tiny: RunConfig) -> None:
    tiny.model.modalities["image"].projector.num_attention_heads = 3
    with pytest.raises(ConfigError, match="num_attention_heads=3"):
        examine(tiny)
    assert not dist.is_initialized() and torch.empty(1).device.type == "cpu"
    assert len(examine(make_config("data", "tokenizer", Path("run"))).stages) == 1


def test_it_plays_no_rank_of_a_real_job(tiny: RunConfig) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="cannot be a rank of a job"):
            examine(tiny)
        assert dist.get_backend() == "gloo"
    finally:
        dist.destroy_process_group()


def test_one_process_of_a_launcher_speaks(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["pretrain", f"--config-path={folder}", "--config-name=tiny", "--dry-run"]) == 0
    assert capsys.readouterr().out == ""


def test_a_machine_with_cuda_is_left_alone(tiny: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_run = examine(tiny)
    # This CPU build of torch rejects every real CUDA call.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    card = SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: card)
    cuda_run = examine(laid_out(tiny, 2, tensor_model_parallel_size=2))
    assert cuda_run.stages[0].trainable == media(2)[1] and cuda_run.notes == []
    assert cuda_run.weights == cpu_run.weights


def test_what_this_machine_lacks_is_a_note(tiny: RunConfig) -> None:
    tiny.trainer.precision = "bf16"
    plain = examine(tiny)
    tiny.model.fp8, tiny.model.transformer_impl = "hybrid", "transformer_engine"
    dry_run = examine(tiny)
    (note,) = dry_run.notes
    assert note.startswith("this machine cannot run it: model.transformer_impl=transformer_engine cannot run here")
    assert dry_run.stages == plain.stages and dry_run.weights == plain.weights
    assert note in render(dry_run)


def test_a_base_in_nf4_is_counted_by_its_bytes(tiny: RunConfig) -> None:
    tiny.trainer.precision, tiny.model.recompute_granularity = "bf16", ""
    tiny.model.language_model.config |= {"hidden_size": 128, "intermediate_size": 256}
    plain = examine(tiny)
    tiny.model.base_quantization = "nf4"
    dry_run = examine(tiny)
    # q and o, k and v, and the feed-forward's three, of four layers.
    matrices = 4 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256)
    assert plain.stages[0].weight_bytes - dry_run.stages[0].weight_bytes == matrices * (2 - 0.5 - 4 / 64)
    assert plain.memory is not None and dry_run.memory is not None
    before, after = (memory.choice.held[0] for memory in (plain.memory, dry_run.memory))
    assert before.weights - after.weights == matrices * (2 - 0.5 - 4 / 64)
    # One dequantized matrix at a time: gate and up together are the largest.
    assert after.working - before.working in (0, 2 * 128 * 512)
    assert "bf16, the Llama's matrices in NF4" in render(dry_run)


@pytest.mark.parametrize(
    ("sizes", "tensor", "says"),
    [
        ({"hidden_size": 96}, 1, r"hidden_size is 96 on each of 1 tensor-parallel rank"),
        ({}, 4, r"num_attention_heads x head_dim is 32 on each of 4 tensor-parallel rank"),
        ({"intermediate_size": 192}, 2, r"intermediate_size is 96 on each of 2 tensor-parallel rank"),
    ],
)
def test_rows_that_nf4_would_split_are_refused(tiny: RunConfig, sizes: Any, tensor: int, says: str) -> None:
    tiny.model.language_model.config |= {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_key_value_heads": 4,
        **sizes,
    }
    tiny.model.base_quantization = "nf4"
    tiny.trainer.devices = tiny.model.tensor_model_parallel_size = tensor
    with pytest.raises(ConfigError, match=f"base_quantization=nf4: the Llama's {says}.*not a multiple of 64"):
        examine(tiny)


def test_formats_of_products_are_shown_and_counted(tiny: RunConfig) -> None:
    tiny.trainer.precision = "bf16"
    tiny.model.language_model.config |= {"hidden_size": 128, "intermediate_size": 256}
    matrices = 4 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256)
    plain = examine(tiny)
    for keys, shown, copies in (
        ({"fp8": "e4m3", "fp8_recipe": "mxfp8"}, "bf16, MXFP8 e4m3", 2 + 2 / 32),
        ({"fp4": "e2m1"}, "bf16, NVFP4", 1 + 2 / 16),
    ):
        dry_run = examine(laid_out(tiny, 1, **keys))
        assert plain.memory is not None and dry_run.memory is not None and shown in render(dry_run)
        before, after = (memory.choice.held[0].weights for memory in (plain.memory, dry_run.memory))
        assert after - before == matrices * copies


def test_what_is_not_there_is_listed(tiny: RunConfig, tmp_path: Path, text_shards: str) -> None:
    tiny.data.tokenizer = "nowhere/tokenizer"
    tiny.data.train = {"mix": DatasetConfig("nowhere/mix"), "text": DatasetConfig(text_shards)}
    tiny.data.validation = {"far": DatasetConfig("s3://bucket/far")}
    tiny.model.restore_from_path = "nowhere/checkpoint"
    dry_run = examine(tiny)
    assert dry_run.missing == [
        ("model.restore_from_path", "nowhere/checkpoint"),
        ("data.tokenizer", "nowhere/tokenizer"),
        ("data.train.mix.path", "nowhere/mix"),
    ]
    assert dry_run.samples == {("train", "text"): 24}
    (note,) = dry_run.notes
    assert "s3://bucket/far was not checked" in note


def test_stages_are_shown_with_the_epochs_of_their_data(tiny: RunConfig, text_shards: str) -> None:
    tiny.data.train["text"] = DatasetConfig(text_shards)
    tiny.trainer.max_steps = 60
    tiny.data.schedule = [StageConfig("first", 40, {"mix": 1}), StageConfig(weights={"mix": 1, "text": 3})]
    text = render(examine(tiny))
    # 8 samples per step: 40 x 8 + 20 x 2 of the mix, 20 x 6 of the text.
    assert re.search(r"data\.train\.mix +40 samples +9\.00 epochs in the run \(75\.00% of its samples\)", text)
    assert re.search(r"data\.train\.text +24 samples +5\.00 epochs in the run \(25\.00% of its samples\)", text)
    assert "  stage 1 of 2, first: steps 1 to 40, mix 100.00% of the samples\n" in text
    assert "  stage 2 of 2: steps 41 to 60, mix 25.00%, text 75.00% of the samples" in text
    # By tokens, shares of samples are shown as well, if all data are here.
    tiny.data.schedule[1].by = "token"
    assert re.search(
        r"mix 25\.00%, text 75\.00% of the tokens \(mix [\d.]+%, text [\d.]+% of the samples\)", render(examine(tiny))
    )
    tiny.data.train["text"].path = "nowhere"
    text = render(examine(tiny))
    assert "mix 25.00%, text 75.00% of the tokens" in text and "epoch" not in text


def test_data_that_is_there_is_checked_and_counted(tiny: RunConfig, tmp_path: Path, text_shards: str) -> None:
    tiny.data.train["text"] = DatasetConfig(text_shards, weight=3.0)
    tiny.data.validation = {"text": DatasetConfig(text_shards)}
    dry_run = examine(tiny)
    assert dry_run.samples == {("train", "mix"): 40, ("train", "text"): 24, ("validation", "text"): 24}
    text = render(dry_run)
    # 8 samples per step, 2 of them from the mix.
    assert re.search(r"data\.train\.mix +40 samples +one epoch in 20\.0 steps \(25% of the mix\)", text)
    assert re.search(r"data\.train\.text +24 samples +one epoch in 4\.0 steps \(75% of the mix\)", text)
    # Media without a configured modality are reported even if another data set is missing.
    del tiny.model.modalities["audio"]
    tiny.data.train["missing"] = DatasetConfig("nowhere")
    with pytest.raises(DataError, match=r"Add model\.modalities\.audio"):
        examine(tiny)


def test_no_data_set_at_all_is_refused(tiny: RunConfig) -> None:
    tiny.data.train = {}
    with pytest.raises(DataError, match="No dataset is configured"):
        examine(tiny)


def test_folders_give_their_shape_without_their_weights(tiny: RunConfig, tmp_path: Path) -> None:
    plain = examine(tiny)
    lm, encoder = tiny.model.language_model, tiny.model.modalities["image"].encoder
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps({"model_type": "llama", **LLAMA}))
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "llama" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "llama" / "one.safetensors").touch()
    CLIPVisionConfig(**encoder.config).save_pretrained(tmp_path / "clip")
    lm.path, lm.config, encoder.path, encoder.config = str(tmp_path / "llama"), {}, str(tmp_path / "clip"), {}
    imu = tiny.model.modalities["imu"].encoder
    (tmp_path / "imu").mkdir()
    (tmp_path / "imu" / "config.json").write_text(json.dumps({"model_type": "imu2clip", **imu.config}))
    imu.path, imu.config = str(tmp_path / "imu"), {}
    dry_run = examine(tiny)
    assert dry_run.stages == plain.stages and dry_run.weights == plain.weights
    assert dry_run.missing == [
        ("model.language_model.path", str(tmp_path / "llama" / "two.safetensors")),
        ("model.modalities.image.encoder.path", str(tmp_path / "clip" / "model.safetensors")),
        ("model.modalities.imu.encoder.path", str(tmp_path / "imu" / "model.safetensors")),
    ]
    (tmp_path / "clip" / "pytorch_model.bin").touch()
    lm.load_weights = False
    assert [key for key, _ in examine(tiny).missing] == ["model.modalities.imu.encoder.path"]


PLUG_IN = """
import torch
from megatron_anymal.model.encoders import Encoder, register_encoder

@register_encoder("bands")
class Bands(Encoder):
    def __init__(self, config, piece_shape):
        super().__init__(config, piece_shape)
        self.feature_tokens, self.width = piece_shape
        # Wherever the code wants it.
        self.gains = torch.nn.Parameter(torch.ones(self.width, device="cuda"))

    def forward(self, pieces):
        return pieces * self.gains

    def flops_per_piece(self):
        return 0.0
"""


def test_an_encoder_of_a_plug_in(tiny: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "bands.py").write_text(PLUG_IN)
    (tmp_path / "weights").mkdir()
    tiny.model.plugins = [str(tmp_path / "bands.py")]
    encoder = tiny.model.modalities["audio"].encoder
    encoder.type, encoder.path = "bands", str(tmp_path / "weights")
    dry_run = examine(tiny)
    assert dry_run.weights["encoders.audio.gains"] == (8, False) and dry_run.missing == []
    encoder.path = "nowhere/weights"
    assert examine(tiny).missing == [("model.modalities.audio.encoder.path", "nowhere/weights")]


def test_a_checkpoint_gives_the_llamas_shape(tiny: RunConfig, tmp_path: Path, text_shards: str) -> None:
    first = copy.deepcopy(tiny)
    first.model.modalities, first.data.train = {}, {"text": DatasetConfig(text_shards)}
    first.model.language_model.freeze = False
    first.trainer.max_steps = first.exp_manager.checkpoint.every_n_train_steps = 1
    run_ranks(1, train, first)
    plain = examine(tiny)
    tiny.model.language_model.config, tiny.model.language_model.checkpoint = {}, str(tmp_path / "run")
    assert examine(tiny).stages == plain.stages


def test_clap_on_the_meta_device_counts_its_tokens() -> None:
    dry_run = examine(compose("pretrain_13b_audio", default_config_dir(), []).config)
    # 10 seconds give 64 features of width 768, two per soft token of width 5120.
    projector = {name: count for name, (count, _) in dry_run.weights.items() if name.startswith("projectors.")}
    assert sum(projector.values()) == 2 * 768 * 5120 + 5120 + 1
    assert sum(count for name, (count, _) in dry_run.weights.items() if name.startswith("language_model.")) == (
        13_015_864_320
    )


SEVENTY = """
import sys, time
from megatron_anymal.__main__ import main
from megatron_anymal.processes.process_memory import peak_resident_bytes
code = main(sys.argv[1:])
peak = peak_resident_bytes()
print("MEASURED", time.process_time(), peak, [name for name in ("nemo", "lightning") if name in sys.modules])
sys.exit(code)
"""


def test_70b_in_an_empty_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SEVENTY, "pretrain", "--config-name=pretrain_70b_image", "--dry-run"]
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    output = done.stdout
    # The Llama's published size; parameters per rank at tensor-parallel size eight; the paper's batch size.
    assert "26,880 samples per step, 840 per replica" in output
    assert re.search(r"language model +70,553,706,496 +70\.55 B +0 +0\n", output)
    assert re.search(
        r"\n +0 +0-255 +10,715,721,681 +52,580,305 +21\.43 GB .* 0-79 +embedding, image enc.*, head\n", output
    )
    for path in ("Meta-Llama-3-70B-Instruct", "CLIP-ViT-bigG-14"):
        assert f"checkpoints/{path} is not on this machine: taken as" in output
    assert "data.validation.image_text.path      data/image_text_held_out" in output
    seconds, peak = map(float, output.rpartition("MEASURED ")[2].split()[:2])
    assert seconds < 60 and peak < 2e9
    assert output.endswith("[]\n") and not list(tmp_path.iterdir())


def test_a_step_is_shown_for_a_card_that_is_not_here(tiny: RunConfig) -> None:
    tiny.trainer.precision, tiny.model.recompute_granularity = "bf16", "auto"
    unknown = examine(tiny)
    assert any("Give it with model.memory_gb" in note for note in unknown.notes)
    assert "recompute none:" in render(unknown)
    without = unknown.memory.choice.held[0].total
    tiny.model.memory_gb = without / 1e9
    report = render(examine(tiny))
    assert "on a GPU" in report and "recompute none, chosen: the cheapest that fits:" in report
    tiny.model.memory_gb = (without - 1) / 1e9
    tight = examine(tiny)
    assert tight.memory.choice.recompute.granularity and tight.memory.choice.without == without
    assert f"recompute {tight.memory.choice.recompute}, chosen" in render(tight) and "without recompute" in render(
        tight
    )
    tiny.model.memory_gb = 1e-9
    with pytest.raises(ConfigError, match="recompute_granularity=auto: nothing fits"):
        examine(tiny)


def test_a_named_recompute_is_judged(tiny: RunConfig) -> None:
    tiny.model.recompute_granularity, tiny.model.memory_gb = "full", 1e-6
    report = render(examine(tiny))
    assert "recompute full: uniform, 1 layer(s):" in report and "does NOT fit in" in report
