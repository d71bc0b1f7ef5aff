"""Generation with the HuggingFace-style model: cache, padding, several answers to one prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_parts import make_config, make_model, prompts_about, sections, write_media
from transformers import AutoTokenizer

from megatron_anymal.hf.modeling_anymal import AnyMALForConditionalGeneration
from megatron_anymal.hf.processing_anymal import AnyMALProcessor

NEW = 12


@pytest.fixture(scope="module")
def model(tokenizer_folder: str) -> AnyMALForConditionalGeneration:
    return make_model(make_config(sections("towers"), tokenizer_folder))


@pytest.fixture(scope="module")
def processor(model: AnyMALForConditionalGeneration, tokenizer_folder: str) -> AnyMALProcessor:
    return AnyMALProcessor(AutoTokenizer.from_pretrained(tokenizer_folder), model.config.modalities)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return prompts_about(write_media(tmp_path_factory.mktemp("media")))


def by_hand(model: AnyMALForConditionalGeneration, inputs: Any) -> list[int]:
    """Greedy tokens for one prompt from full forward passes, with neither cache nor padding."""
    ids, answer = inputs["input_ids"], []
    assert len(ids) == 1
    while len(answer) < NEW:
        with torch.no_grad():
            logits = model(input_ids=ids, media=inputs["media"]).logits[0, -1]
        logits[model.generation_config.suppress_tokens] = float("-inf")
        answer.append(int(logits.argmax()))
        if answer[-1] in model.config.eos_token_id:
            break
        ids = torch.cat([ids, torch.tensor([[answer[-1]]])], dim=1)
    return answer


def cut(row: torch.Tensor, model: AnyMALForConditionalGeneration) -> list[int]:
    """Tokens of a row up to its first end token."""
    tokens = row.tolist()
    ends = [position for position, token in enumerate(tokens) if token in model.config.eos_token_id]
    return tokens[: ends[0] + 1] if ends else tokens


def test_greedy_answers_of_a_padded_batch_with_cache_are_those_of_whole_passes(
    model: AnyMALForConditionalGeneration, processor: AnyMALProcessor, prompts: list[dict[str, Any]]
) -> None:
    expected = [by_hand(model, processor(prompt)) for prompt in prompts]
    assert len({tuple(answer) for answer in expected}) == len(prompts), "the prompts must lead to different answers"
    inputs = processor(prompts)
    assert inputs["attention_mask"].sum(dim=1).unique().numel() > 2
    length = inputs["input_ids"].shape[1]
    for settings in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **settings)
        assert [cut(row[length:], model) for row in out] == expected, settings
    answers = processor.answers(out, inputs)
    words = processor.tokenizer
    assert answers == [words.decode(answer, skip_special_tokens=True).strip() for answer in expected]


def test_media_matter(
    model: AnyMALForConditionalGeneration, processor: AnyMALProcessor, prompts: list[dict[str, Any]]
) -> None:
    inputs = processor(prompts[0])
    with torch.no_grad():
        before = model(**inputs).logits[0, -1]
        for name in inputs["media"]:
            changed = {**inputs["media"], name: inputs["media"][name] + 1.0}
            assert not torch.allclose(model(input_ids=inputs["input_ids"], media=changed).logits[0, -1], before), name


def test_media_are_encoded_once_for_an_answer(
    model: AnyMALForConditionalGeneration,
    processor: AnyMALProcessor,
    prompts: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    encoder = model.encoders["image"]
    forward = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda pieces: calls.append(len(pieces)) or forward(pieces))
    inputs = processor(prompts[0])
    model.generate(**inputs, max_new_tokens=4, num_beams=3, use_cache=False, do_sample=False)
    # No more encoder inputs per call than the section allows.
    assert sum(calls) == len(inputs["media"]["image"]) > 2 and max(calls) == 2


def test_several_answers_to_a_prompt_see_its_media(
    model: AnyMALForConditionalGeneration, processor: AnyMALProcessor, prompts: list[dict[str, Any]]
) -> None:
    inputs = processor(prompts)
    rows = {name: tensor.repeat_interleave(2, dim=0) for name, tensor in inputs.items() if name != "media"}
    twice = processor([prompt for prompt in prompts for _ in range(2)])
    assert torch.equal(twice["input_ids"], rows["input_ids"])
    outputs = []
    for given, count in ((inputs, 2), (twice, 1)):
        torch.manual_seed(0)
        settings = {"do_sample": True, "top_k": 0, "num_return_sequences": count, "max_new_tokens": NEW}
        outputs.append(model.generate(**given, **settings))
    assert torch.equal(*outputs)
    assert any(not torch.equal(*pair) for pair in outputs[0].split(2)), "sampled answers must differ"


def test_beams_are_those_of_one_prompt_alone(
    model: AnyMALForConditionalGeneration, processor: AnyMALProcessor, prompts: list[dict[str, Any]]
) -> None:
    settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, "do_sample": False}
    inputs = processor(prompts)
    together = model.generate(**inputs, **settings)
    length = inputs["input_ids"].shape[1]
    for number, prompt in enumerate(prompts):
        alone_inputs = processor(prompt)
        alone = model.generate(**alone_inputs, **settings)[:, alone_inputs["input_ids"].shape[1] :]
        ours = together[2 * number : 2 * number + 2, length:]
        assert [cut(row, model) for row in ours] == [cut(row, model) for row in alone]


def test_placeholders_and_media_must_agree(
    model: AnyMALForConditionalGeneration, processor: AnyMALProcessor, prompts: list[dict[str, Any]]
) -> None:
    inputs = processor(prompts[0])
    fewer = {**inputs["media"], "image": inputs["media"]["image"][1:]}
    with pytest.raises(ValueError, match=r"20 placeholders of image but media\['image'\] gives 18 soft tokens \(9 p"):
        model(input_ids=inputs["input_ids"], media=fewer)
    with pytest.raises(ValueError, match=r"placeholders of image .* gives 0 soft tokens"):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match=r"placeholders of image .* gives 18"):
        model.generate(input_ids=inputs["input_ids"], media=fewer, num_beams=2)
    with pytest.raises(ValueError, match=r"0 placeholders of imu .* gives"):
        model(input_ids=torch.tensor([[0, 7]]), media={"imu": inputs["media"]["imu"]})
    with pytest.raises(ValueError, match="no such modality; it has: audio, image, imu, video"):
        model(input_ids=inputs["input_ids"], media={**inputs["media"], "depth": fewer["image"]})
    with pytest.raises(ValueError, match=r"'image'\] has shape \[10, 24, 8\]; the encoder takes \[n, 3, 8, 8\]"):
        model(input_ids=inputs["input_ids"], media={"image": inputs["media"]["image"].flatten(1, 2)})
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="inputs_embeds do not have"):
        model(inputs_embeds=embeddings, media=inputs["media"])
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(input_ids=inputs["input_ids"], inputs_embeds=embeddings)
