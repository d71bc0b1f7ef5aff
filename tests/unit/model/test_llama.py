"""Our Llama against transformers' LlamaForCausalLM: the same weights give the same logits and losses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_anymal.config import ConfigError, LanguageModelConfig, RunConfig
from megatron_anymal.data.micro_batch import MicroBatch
from megatron_anymal.data.records import PlannedMicroBatch
from megatron_anymal.model.anymal import AnyMALModel
from megatron_anymal.model.build import build_models
from megatron_anymal.model.llama import check_model
from megatron_anymal.model.llama_shape import layers_of_stages, read_llama_config
from megatron_anymal.parallel import initialize

BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
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
CASES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "llama31-rope": {"rope_parameters": LLAMA31},
    "linear-rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "odd-vocabulary": {"vocab_size": 97},
    "wide-heads": {"head_dim": 16},
}
LENGTHS = (5, 1, 70, 24)
LAYOUTS = {"tp1": (1, 1), "tp2": (2, 1), "pp2": (1, 2)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of saved transformers models, one of them sharded into several files."""
    paths = {}
    for number, (name, changes) in enumerate(CASES.items()):
        torch.manual_seed(number)
        model = LlamaForCausalLM(LlamaConfig(**{**BASE, **changes}))
        with torch.no_grad():
            # Norm weights start at 1, which would hide a missing or swapped norm.
            for weight_name, weight in model.named_parameters():
                if "norm" in weight_name:
                    weight.uniform_(0.5, 1.5)
        folder = tmp_path_factory.mktemp("llama") / name
        model.save_pretrained(folder, max_shard_size="50KB" if name == "gqa" else "5GB")
        paths[name] = str(folder)
    assert len(list(Path(paths["gqa"]).glob("*.safetensors"))) > 1
    return paths


def tokens_of(vocab_size: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def theirs(folders: dict[str, str]) -> dict[str, tuple[np.ndarray, list[float]]]:
    """transformers' logits of each document on its own, concatenated, and the mean loss of each document."""
    outputs = {}
    for name, folder in folders.items():
        model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        logits, losses = [], []
        for document in tokens_of(model.config.vocab_size)[0].split(LENGTHS):
            with torch.no_grad():
                out = model(document[None], labels=document[None] if len(document) > 1 else None)
            logits.append(out.logits[0].numpy())
            losses.append(float(out.loss) if len(document) > 1 else 0.0)
        outputs[name] = np.concatenate(logits), losses
    return outputs


def config_of(folder: str, tp: int, pp: int) -> RunConfig:
    config = RunConfig()
    config.trainer.precision, config.trainer.devices = "32", tp * pp
    config.model.tensor_model_parallel_size, config.model.pipeline_model_parallel_size = tp, pp
    config.model.language_model.path = folder
    config.data.tokenizer = "unused"
    return config


def built(folder: str, tp: int = 1, pp: int = 1) -> AnyMALModel:
    """In a rank: the model of a folder."""
    config = config_of(folder, tp, pp)
    layout = initialize(config)
    hf = read_llama_config(config.model.language_model)
    [model] = build_models(config.model, config.trainer.precision, hf, layout, {}, lambda models: None)
    return model.eval()


def run(model: AnyMALModel, tokens: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """Forward pass through all stages; returns the last stage's output on its ranks and an empty tensor on the
    others."""
    zeros, ones = torch.zeros_like(tokens), torch.ones(tokens.shape)
    plan = PlannedMicroBatch(0, tokens.size(1), ())
    every = torch.arange(tokens.size(1))
    batch = MicroBatch(
        plan, LENGTHS, tokens, labels if labels is not None else zeros, ones, zeros, {}, {}, label_index=every
    )
    if not model.pre_process:
        hidden = torch.empty(tokens.size(1), 1, model.config.hidden_size)
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor([hidden])
    with torch.no_grad():
        out = model(batch, labels=labels)
    if not model.post_process:
        dist.send(out.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        return torch.zeros(0)
    return out


def answers(folders: dict[str, str], layouts: list[str]) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """(case, layout) -> logits [T, V] and losses [T] of the packed documents, from a rank of the last stage."""
    outputs = {}
    for layout in layouts:
        tp, pp = LAYOUTS[layout]
        for name, folder in folders.items():
            if name == "mqa" and tp > 1:
                continue
            model = built(folder, tp, pp)
            tokens = tokens_of(model.vocab_size)
            local = run(model, tokens, None)
            losses = run(model, tokens, tokens.roll(-1, 1))
            if model.post_process:
                parts = [torch.empty_like(local) for _ in range(tp)]
                dist.all_gather(parts, local.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
                outputs[name, layout] = torch.cat(parts, -1)[0].numpy(), losses[0].numpy()
    return outputs


@pytest.fixture(scope="module")
def ours(folders: dict[str, str]) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """Results of all layouts."""
    return {**run_ranks(1, answers, folders, ["tp1"])[0], **run_ranks(2, answers, folders, ["tp2", "pp2"])[1]}


@pytest.mark.parametrize(
    ("case", "layout"), [(c, layout) for c in CASES for layout in LAYOUTS if (c, layout) != ("mqa", "tp2")]
)
def test_logits_and_losses_equal_transformers(case: str, layout: str, ours: Any, theirs: Any) -> None:
    logits, losses = ours[case, layout]
    expected, expected_losses = theirs[case]
    vocab_size = expected.shape[1]
    # Padding entries of the vocabulary are excluded from the softmax.
    assert np.isneginf(logits[:, vocab_size:]).all()
    np.testing.assert_allclose(logits[:, :vocab_size], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    start = 0
    for length, expected_loss in zip(LENGTHS, expected_losses):
        if length > 1:
            mean = losses[start : start + length - 1].mean()
            np.testing.assert_allclose(mean, expected_loss, rtol=1e-5)
        start += length


def test_the_cases_differ_from_plain_rope(folders: dict[str, str], theirs: Any) -> None:
    # Otherwise a RoPE scaling that is never applied would pass.
    plain = LlamaForCausalLM.from_pretrained(folders["llama31-rope"])
    scaled = torch.from_numpy(theirs["llama31-rope"][0][6:76])
    plain.config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    plain.model.rotary_emb = type(plain.model.rotary_emb)(plain.config)
    document = tokens_of(96)[0].split(LENGTHS)[2]
    with torch.no_grad():
        assert (F.mse_loss(plain(document[None]).logits[0], scaled)) > 1e-4


def message(folder: Path, tp: int = 1) -> str:
    try:
        built(str(folder), tp)
    except ConfigError as error:
        return str(error)
    return "no error"


def messages(folders: list[Path]) -> list[str]:
    return [message(folder) for folder in folders]


def test_folders_that_cannot_be_used(folders: dict[str, str], tmp_path: Path) -> None:
    def copy(name: str, case: str = "tied") -> Path:
        return Path(shutil.copytree(folders[case], tmp_path / name))

    def change(folder: Path, **keys: Any) -> None:
        body = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**body, **keys}))

    wanted = {}
    (copy("no-weights") / "model.safetensors").unlink()
    wanted["no-weights"] = ["no model.safetensors", "load_weights=false"]
    change(copy("mistral"), model_type="mistral")
    wanted["mistral"] = ["'mistral'", "not a Llama"]
    (tmp_path / "no-config").mkdir()
    wanted["no-config"] = ["no config.json"]
    file = copy("no-tensor") / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file)
    wanted["no-tensor"] = ["'model.layers.1.mlp.up_proj.weight'"]
    change(copy("other-size"), vocab_size=99)
    wanted["other-size"] = ["does not match its config.json", "embed_tokens"]
    next(copy("no-part", "gqa").glob("model-00002*")).unlink()
    wanted["no-part"] = ["model-00002"]
    (copy("cut-off") / "model.safetensors").write_bytes(b"12345")
    wanted["cut-off"] = ["model.safetensors"]
    change(copy("biases"), attention_bias=True)
    wanted["biases"] = ["biases"]
    change(copy("yarn"), rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0})
    wanted["yarn"] = ["'yarn'"]
    errors = run_ranks(1, messages, [tmp_path / name for name in wanted])[0]
    for (name, words), error in zip(wanted.items(), errors):
        assert "model.language_model" in error or "The Llama's" in error, (name, error)
        for word in words:
            assert word in error, (name, error)


def test_unknown_keys_and_sizes_that_do_not_divide(folders: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="hiden_size"):
        read_llama_config(LanguageModelConfig(config={"hiden_size": 3}))
    for error in run_ranks(2, message, Path(folders["mqa"]), 2):
        assert "num_key_value_heads=1" in error and "tensor_model_parallel_size=2" in error


@pytest.mark.parametrize(
    ("layers", "stages", "first", "last", "expected"),
    [
        (8, 1, 0, 0, [8]),
        (8, 4, 0, 0, [2, 2, 2, 2]),
        (8, 2, 2, 0, [2, 6]),
        (8, 2, 2, 6, [2, 6]),
        (80, 4, 17, 0, [17, 21, 21, 21]),
        (80, 4, 18, 20, [18, 21, 21, 20]),
    ],
)
def test_layers_of_pipeline_stages(layers: int, stages: int, first: int, last: int, expected: list[int]) -> None:
    assert layers_of_stages(staged(stages, first, last).model, LlamaConfig(num_hidden_layers=layers)) == expected


@pytest.mark.parametrize(
    ("layers", "stages", "first", "last", "parts", "says"),
    [
        (8, 3, 0, 0, 1, "pipeline_model_parallel_size=3 does not divide the Llama's 8 layers"),
        (2, 4, 0, 0, 1, "pipeline_model_parallel_size=4 does not divide the Llama's 2 layers"),
        (8, 4, 1, 0, 1, r"7 left for 3 stage\(s\)"),
        (8, 2, 2, 2, 1, r"4 left for 0 stage\(s\)"),
        (8, 4, 0, 0, 4, "virtual_pipeline_model_parallel_size=4 does not divide the 2 layers of pipeline stage 0 of 4"),
        (8, 2, 2, 0, 4, "does not divide the 2 layers of pipeline stage 0 of 2"),
    ],
)
def test_layers_that_do_not_divide(layers: int, stages: int, first: int, last: int, parts: int, says: str) -> None:
    config = staged(stages, first, last)
    config.model.virtual_pipeline_model_parallel_size = parts
    with pytest.raises(ConfigError, match=says):
        check_model(config.model, config.trainer.precision, LlamaConfig(num_hidden_layers=layers))


def staged(stages: int, first: int, last: int) -> RunConfig:
    config = RunConfig()
    config.model.pipeline_model_parallel_size = stages
    config.model.num_layers_in_first_pipeline_stage = first
    config.model.num_layers_in_last_pipeline_stage = last
    return config
