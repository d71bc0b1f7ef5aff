"""The HuggingFace-style model computes the same as the trainer's model with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_parts import make_config, make_model, prompts_about, sections, write_media
from ranks import run_ranks
from tiny import make_config as make_run
from torch import Tensor
from transformers import AutoTokenizer

from megatron_anymal.config import RunConfig
from megatron_anymal.data.micro_batch import MediaBatch, MicroBatch
from megatron_anymal.hf.modeling_anymal import AnyMALForConditionalGeneration
from megatron_anymal.hf.processing_anymal import AnyMALProcessor
from megatron_anymal.model.build import build_models
from megatron_anymal.model.llama_shape import read_llama_config
from megatron_anymal.parallel import initialize
from megatron_anymal.train.build import build_inputs


def native(config: RunConfig, rows: list[list[int]], media: dict[str, Tensor]) -> dict[str, Any]:
    """In a rank: logits of documents, and the weights of encoders and projectors."""
    layout = initialize(config)
    _, modalities = build_inputs(config.model, config.data)
    hf = read_llama_config(config.model.language_model)
    [model] = build_models(config.model, config.trainer.precision, hf, layout, modalities, lambda models: None)
    model.eval()
    # Buffers that a frozen encoder may come with.
    for name, buffer in model.encoders.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    # Norms, biases and gains at their initial values could hide swapped weights.
    generator = torch.Generator().manual_seed(5)
    for parameter in [*model.projectors.parameters(), *model.encoders.parameters()]:
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    tokens = torch.tensor([token for row in rows for token in row])
    placed = {}
    for name, pieces in media.items():
        placeholder = config.model.modalities[name].placeholder
        number = AutoTokenizer.from_pretrained(config.data.tokenizer).convert_tokens_to_ids(placeholder)
        placed[name] = MediaBatch(pieces, ((len(pieces),),), (tokens == number).nonzero().flatten())
    with torch.no_grad():
        logits = model(MicroBatch.unlabelled(rows, placed))[0]
    state = {
        name: tensor.numpy()
        for name, tensor in model.state_dict().items()
        # megatron-core's linears add an empty entry.
        if name.startswith(("encoders.", "projectors.")) and tensor is not None
    }
    return {"logits": logits.numpy(), "state": state}


@pytest.mark.parametrize("variant", ["towers", "others"])
def test_logits_are_the_native_models(variant: str, tokenizer_folder: str, tmp_path: Path) -> None:
    own = sections(variant)
    config = make_config(own, tokenizer_folder)
    # Larger weights would amplify rounding errors.
    model = make_model(config, std=0.15)
    processor = AnyMALProcessor(AutoTokenizer.from_pretrained(tokenizer_folder), config.modalities)
    inputs = processor(prompts_about(write_media(tmp_path)))
    assert set(inputs["media"]) == {"image", "video", "audio", "imu"}
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])]

    model.language_model.save_pretrained(tmp_path / "llama")
    run = make_run("not read", tokenizer_folder, tmp_path / "run")
    run.model.modalities = own
    run.model.language_model.config, run.model.language_model.path = {}, str(tmp_path / "llama")
    [reference] = run_ranks(1, native, run, rows, dict(inputs["media"]))

    # Under the names used in an export: nothing missing, nothing unknown.
    llama = {f"language_model.{name}": tensor for name, tensor in model.language_model.state_dict().items()}
    whole = {name: torch.from_numpy(array) for name, array in reference["state"].items()}
    model.load_state_dict({**llama, **whole}, strict=True)
    with torch.no_grad():
        logits = model(**inputs).logits[inputs["attention_mask"].bool()]
    expected = torch.from_numpy(reference["logits"])
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_projectors_reach_every_answer_token(tokenizer_folder: str, tmp_path: Path) -> None:
    model, inputs = _with_inputs(tokenizer_folder, tmp_path)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model.train()
    model(**inputs, labels=labels).loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None and not n.startswith("encoders.")]
    with_gradient = [n for n, p in model.encoders.named_parameters() if p.grad is not None]
    assert not without and not with_gradient
    assert not any(module.training for module in model.encoders.modules())


def test_the_loss_is_that_of_the_logits(tokenizer_folder: str, tmp_path: Path) -> None:
    model, inputs = _with_inputs(tokenizer_folder, tmp_path)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        out = model(**inputs, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)


def _with_inputs(tokenizer: str, folder: Path) -> tuple[AnyMALForConditionalGeneration, Any]:
    config = make_config(sections("towers"), tokenizer)
    processor = AnyMALProcessor(AutoTokenizer.from_pretrained(tokenizer), config.modalities)
    return make_model(config), processor(prompts_about(write_media(folder)))
