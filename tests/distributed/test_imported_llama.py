"""Imported HuggingFace Llamas of many shapes have the same bytes, and the same logits under any layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from ranks import run_ranks
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoint_tools.import_hf import main as import_hf
from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.frozen_base import load_base, resolve_language_model
from megatron_anymal.checkpoint.sharding import METADATA, sharded_weights
from megatron_anymal.checkpoint.store import Manifest
from megatron_anymal.checkpoint.tensor_stream import StreamReader
from megatron_anymal.config import RunConfig
from megatron_anymal.config.compose import from_dict
from megatron_anymal.data.micro_batch import MicroBatch
from megatron_anymal.data.records import PlannedMicroBatch
from megatron_anymal.hf_weights import HFWeights
from megatron_anymal.model.anymal import AnyMALModel
from megatron_anymal.model.build import build_models
from megatron_anymal.model.hf_llama import checkpoint_position, to_hf, whole_names
from megatron_anymal.parallel import initialize
from megatron_anymal.safetensors_io import raw_bytes

BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GQA_8_2, GQA_6_3 = {"num_key_value_heads": 2}, {"num_attention_heads": 6, "num_key_value_heads": 3}
# Case -> changes to BASE, and the layouts (TP, PP, layers of the first stage) to run it under.
CASES: dict[str, tuple[dict[str, Any], list[tuple[int, int, int]]]] = {
    "mha": ({}, [(2, 2, 0)]),
    "gqa-8-2": (GQA_8_2, [(2, 1, 0), (1, 2, 0), (2, 2, 0)]),
    "gqa-6-3": (GQA_6_3, [(1, 2, 0)]),
    "mqa": ({"num_key_value_heads": 1}, [(1, 2, 0)]),
    "tied": ({**GQA_8_2, "tie_word_embeddings": True}, [(2, 1, 0), (2, 2, 0)]),
    "odd-vocabulary": ({**GQA_8_2, "vocab_size": 1003}, [(2, 1, 0), (2, 2, 0)]),
    "llama31-rope": ({**GQA_8_2, "rope_parameters": LLAMA31}, [(1, 2, 0)]),
    "linear-rope": (
        {**GQA_8_2, "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        [(2, 1, 0)],
    ),
    "wide-heads": ({**GQA_8_2, "head_dim": 16}, [(2, 1, 0)]),
    "three-layers": ({**GQA_8_2, "num_hidden_layers": 3}, [(2, 1, 0)]),
    "five-layers": ({**GQA_8_2, "num_hidden_layers": 5}, [(1, 2, 2)]),
    "sharded-bf16": ({**GQA_8_2, "dtype": "bfloat16"}, [(2, 2, 0)]),
}
SAVED_AGAIN = ("gqa-8-2", "odd-vocabulary", "tied")
LENGTH = 60


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Case -> HuggingFace folder, checkpoint."""
    folders = {}
    for number, (name, (changes, _)) in enumerate(CASES.items()):
        folder = tmp_path_factory.mktemp("llamas") / name
        torch.manual_seed(number)
        hf = LlamaConfig(**{**BASE, **changes})
        model = LlamaForCausalLM(hf).to(hf.dtype or torch.float32)
        with torch.no_grad():
            # Norm weights start at 1, which would hide a missing or swapped norm.
            for weight_name, weight in model.named_parameters():
                if "norm" in weight_name:
                    weight.uniform_(0.5, 1.5)
        model.save_pretrained(folder, max_shard_size="30KB" if name.startswith("sharded") else "5GB")
        out = folder.with_name(f"{name}-checkpoint")
        assert import_hf(["--hf", str(folder), "--out", str(out), "--processes", "2"]) == 0
        folders[name] = folder, out
    assert len(HFWeights(folders["sharded-bf16"][0]).files) > 2
    return folders


def check_same_bytes(folder: Path, checkpoint: Path) -> None:
    """Assert that every tensor of a HuggingFace folder is bit-identical in the checkpoint."""
    hf = LlamaConfig.from_dict(store.read_manifest(checkpoint, verify=True).llama)
    theirs, reader = HFWeights(folder), StreamReader(checkpoint)
    tensors: dict[str, torch.Tensor] = {}
    keys = set()
    for name in whole_names(hf):
        key, layer = checkpoint_position(name)
        keys.add(key)
        tensors |= to_hf(name, hf, reader.read(key, layer=layer))
    assert keys == {key for key in reader.tensors if key.startswith("language_model.")}
    assert tensors.keys() == theirs.keys()
    for name, tensor in tensors.items():
        expected = theirs[name]
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape), name
        assert raw_bytes(tensor) == raw_bytes(expected), name


@pytest.mark.parametrize("case", CASES)
def test_the_bytes_are_those_of_the_source(case: str, imported: dict[str, tuple[Path, Path]]) -> None:
    check_same_bytes(*imported[case])


def test_the_manifest_is_that_of_a_trained_llama(imported: dict[str, tuple[Path, Path]]) -> None:
    for folder, out in imported.values():
        manifest = store.read_manifest(out)
        assert from_dict(manifest.config).to_dict() == manifest.config
        assert manifest.step == 0 and not manifest.base_hash
        source_config = LlamaConfig.from_pretrained(folder)
        assert LlamaConfig.from_dict(manifest.llama).to_diff_dict() == source_config.to_diff_dict()


def tokens_of(vocab_size: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(0))


def build_from(checkpoint: Path, tp: int, pp: int, first: int) -> tuple[RunConfig, LlamaConfig, AnyMALModel]:
    """In a rank: build a model with the checkpoint as its base."""
    config = RunConfig()
    config.trainer.precision, config.trainer.devices = "32", tp * pp
    config.model.tensor_model_parallel_size, config.model.pipeline_model_parallel_size = tp, pp
    config.model.num_layers_in_first_pipeline_stage = first
    config.model.language_model.checkpoint = str(checkpoint)
    config.data.tokenizer = "unused"
    layout = initialize(config)
    config.model.language_model, hf = resolve_language_model(config.model.language_model)
    load = partial(load_base, config.model.language_model.checkpoint)
    [model] = build_models(config.model, config.trainer.precision, hf, layout, {}, load)
    return config, hf, model.eval()


def logits_of(model: AnyMALModel) -> np.ndarray | None:
    """Return the logits [T, V] on the ranks of the last stage, None on others."""
    tokens = tokens_of(model.vocab_size)
    zeros = torch.zeros_like(tokens)
    plan = PlannedMicroBatch(0, LENGTH, ())
    batch = MicroBatch(plan, (LENGTH,), tokens, zeros, zeros.float(), zeros, {}, {})
    if not model.pre_process:
        hidden = torch.empty(LENGTH, 1, model.config.hidden_size)
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor([hidden])
    with torch.no_grad():
        out = model(batch, labels=None)
    if not model.post_process:
        dist.send(out.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        return None
    parts = [torch.empty_like(out) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
    dist.all_gather(parts, out.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, -1)[0, :, : model.vocab_size].numpy()


def save_again(model: AnyMALModel, folder: Path, manifest: Manifest) -> None:
    """Save a checkpoint as a run with a trainable Llama does. Collective."""
    weights = sharded_weights([model], lambda name, trains: True)
    staging = folder.with_name(f".{folder.name}")
    if dist.get_rank() == 0:
        staging.mkdir()
    dist.barrier()
    dist_checkpointing.save({"model": weights, "step": 1}, str(staging), content_metadata=dict(METADATA))
    dist.barrier()
    if dist.get_rank() == 0:
        store.commit(staging, folder, manifest)
    dist.barrier()


def answers(checkpoints: dict[str, Path], world: int, again: Path | None) -> dict[tuple[str, Any], np.ndarray]:
    """In a rank: (case, layout) -> logits, for all layouts of `world` processes. Saves some models to `again`."""
    logits_by_layout = {}
    for name, checkpoint in checkpoints.items():
        for layout in [(1, 1, 0), *CASES[name][1]]:
            if layout[0] * layout[1] != world:
                continue
            config, hf, model = build_from(checkpoint, *layout)
            logits = logits_of(model)
            if logits is not None:
                logits_by_layout[name, layout] = logits
            if again and name in SAVED_AGAIN and layout == (2, 2, 0):
                save_again(model, again / name, Manifest(1, 0, config.to_dict(), hf.to_dict(), "", "", {}))
    return logits_by_layout


@pytest.fixture(scope="module")
def ours(imported: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Logits of all cases and layouts, and the folder with the checkpoints saved again under TP2 x PP2."""
    again = tmp_path_factory.mktemp("again")
    checkpoints = {name: out for name, (_, out) in imported.items()}
    logits_by_layout: dict[Any, Any] = {}
    for world in (1, 2, 4):
        ranks = run_ranks(world, answers, checkpoints, world, again if world == 4 else None)
        for rank in ranks:
            logits_by_layout |= rank
    return logits_by_layout, again


@pytest.fixture(scope="module")
def theirs(imported: dict[str, tuple[Path, Path]]) -> dict[str, np.ndarray]:
    """Logits of transformers in fp32."""
    logits_by_case = {}
    for name, (folder, _) in imported.items():
        model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
        with torch.no_grad():
            logits_by_case[name] = model(tokens_of(model.config.vocab_size)).logits[0].numpy()
    return logits_by_case


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, ours: tuple[Any, Path], theirs: dict[str, np.ndarray]) -> None:
    expected = theirs[case]
    for layout in [(1, 1, 0), *CASES[case][1]]:
        np.testing.assert_allclose(
            ours[0][case, layout], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max(), err_msg=str(layout)
        )


@pytest.mark.parametrize("case", SAVED_AGAIN)
def test_saved_again_by_a_split_run_the_bytes_are_the_same(
    case: str, imported: dict[str, tuple[Path, Path]], ours: tuple[Any, Path]
) -> None:
    check_same_bytes(imported[case][0], ours[1] / case)


def test_an_imported_llama_is_not_replaced_unasked(
    imported: dict[str, tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = imported["mha"]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert import_hf(["--hf", str(folder), "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err
    assert import_hf(["--hf", str(folder), "--out", str(folder), "--overwrite"]) == 2
    assert "is not a checkpoint: it is not replaced" in capsys.readouterr().err
    assert import_hf(["--hf", str(folder), "--out", str(out), "--overwrite"]) == 0
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert after == before
    assert not list(out.parent.glob(".*"))
