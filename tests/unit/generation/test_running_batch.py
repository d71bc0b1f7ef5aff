"""Prompts that join and leave a running batch get the answers that each gets alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from served_models import export_generator, mixed_prompts
from tiny import LLAMA, make_config
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_anymal.config import RunConfig
from megatron_anymal.data.records import TextPart
from megatron_anymal.generation.checkpoint_generator import NativeGenerator
from megatron_anymal.generation.export_generator import ExportedGenerator
from megatron_anymal.generation.generator import Generator
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.running_batch import RunningBatch, RunningPrompt
from megatron_anymal.generation.sampling import Sampling
from megatron_anymal.parallel import initialize

Asked = Sequence[tuple[Prompt, Sampling]]


def asked(prompts: Sequence[Prompt]) -> Asked:
    """Every fourth prompt is sampled, the others are greedy; answers have several lengths."""
    greedy = [Sampling(5 + 7 * (n % 5)) for n in range(len(prompts))]
    sampled = [
        Sampling(12, temperature=1.2, top_p=0.9, seed=3),
        Sampling(20, repetition_penalty=1.3),
        Sampling(9, temperature=1.0, top_k=5, stop=("seven",)),
    ]
    return [(p, sampled[n // 4 % 3] if n % 4 == 3 else greedy[n]) for n, p in enumerate(prompts)]


def together(batch: RunningBatch, asked: Asked, seed: int) -> list[str]:
    """Texts of the answers, with up to five prompts joining at random steps, and finished ones leaving late."""
    rng = random.Random(seed)
    waiting: list[RunningPrompt] = [batch.read(prompt, sampling) for prompt, sampling in asked]
    everyone = list(waiting)
    rng.shuffle(waiting)
    while waiting or batch.running:
        if waiting and (not batch.running or rng.random() < 0.4):
            batch.join([waiting.pop() for _ in range(min(len(waiting), rng.randint(1, 5)))])
        if batch.running and rng.random() < 0.8:
            batch.step()
        if rng.random() < 0.5:
            batch.keep([row for row, one in enumerate(batch.running) if not one.answer.done])
    return [one.answer.text for one in everyone]


def alone(generator: Generator, asked: Asked) -> list[str]:
    return [generator.answer([prompt], sampling)[0] for prompt, sampling in asked]


@pytest.fixture(scope="module")
def exported(tokenizer_folder: str) -> ExportedGenerator:
    return export_generator(tokenizer_folder)


@pytest.mark.parametrize("seed", [1, 2])
def test_answers_of_an_export_are_those_of_each_prompt_alone(exported: ExportedGenerator, seed: int) -> None:
    questions = asked(mixed_prompts())
    expected = alone(exported, questions)
    assert len(questions) >= 20 and len(set(expected)) > 18, "too few distinct answers"
    assert together(exported.running_batch(), questions, seed) == expected


def test_a_cache_shrinks_when_long_prompts_leave(exported: ExportedGenerator) -> None:
    batch = exported.running_batch()
    short, long = (batch.read(_words(n), Sampling(30)) for n in (2, 200))
    batch.join([long])
    batch.join([short])
    assert batch._cache.get_seq_length() == 201
    batch.keep([1])
    assert batch._cache.get_seq_length() == 3 == batch._cache.layers[0].keys.size(2)
    batch.keep([])
    assert batch._cache is None


def test_a_failing_prompt_leaves_the_others_running(
    exported: ExportedGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    [expected] = exported.answer([_words(3)], Sampling(6))
    batch = exported.running_batch()
    batch.join([good := batch.read(_words(3), Sampling(6))])
    bad = batch.read(_words(4), Sampling(6))
    with monkeypatch.context() as broken:
        broken.setattr(exported._model.language_model, "forward", _out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            batch.join([bad])
    while not good.answer.done:
        batch.step()
    assert batch.running == [good] and good.answer.text == expected


def test_cut_off_answers_are_told_from_finished_ones(exported: ExportedGenerator) -> None:
    batch = exported.running_batch()
    whole = exported.answer([_words(3)], Sampling(12))[0]
    # The second answer reaches its stop text with the last token that it may have.
    settings = [Sampling(12), Sampling(2, stop=(whole.split()[1],)), Sampling(1)]
    batch.join(read := [batch.read(_words(3), one) for one in settings])
    while not all(one.answer.done for one in read):
        batch.step()
    assert [one.answer.cut_off for one in read] == [True, False, True]


def in_a_rank(config: RunConfig, questions: Asked) -> tuple[list[str], list[list[str]]]:
    generator = NativeGenerator.of_checkpoint(config, initialize(config), None)
    batch = generator.running_batch()
    return alone(generator, questions), [together(batch, questions, seed) for seed in (1, 2)]


def test_answers_of_a_checkpoint_are_those_of_each_prompt_alone(
    mixed_shards: str, tokenizer_folder: str, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    LlamaForCausalLM(LlamaConfig(**{**LLAMA, "initializer_range": 0.4})).save_pretrained(tmp_path / "llama")
    config = make_config(mixed_shards, tokenizer_folder, tmp_path / "run")
    config.model.language_model.config, config.model.language_model.path = {}, str(tmp_path / "llama")
    questions = asked(mixed_prompts(with_video=False))
    [(expected, answers)] = run_ranks(1, in_a_rank, config, questions)
    assert len(set(expected)) > 15
    assert answers == [expected, expected]


def _words(count: int) -> Prompt:
    return Prompt([TextPart("seven " * (count - 1) + "zero")], [])


def _out_of_memory(*arguments: object, **kwargs: object) -> None:
    raise torch.OutOfMemoryError("no memory left")
