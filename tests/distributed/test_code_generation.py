"""Media written by checkpoints: the grammar under every layout, the same codes from the export, and by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from discrete_runs import VOCABULARY, run_of, train_on_codes
from export_server import run_in_rank
from ranks import run_ranks
from transformers import AutoModelForCausalLM, AutoProcessor

from checkpoint_tools import export_hf
from megatron_anymal.data.records import TextPart
from megatron_anymal.generation.answers import Reply
from megatron_anymal.generation.checkpoint_generator import NativeGenerator
from megatron_anymal.generation.export_generator import ExportedGenerator
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.sampling import CodeSampling, Sampling

PROMPTS = [
    Prompt([TextPart(text)], []) for text in ("what is this", "a sound", "seven eight nine", "one", "walk of two")
]
DRAWN = Sampling(16, modalities=("text", "picture", "speech"), temperature=1.2, seed=5)
GREEDY = Sampling(14, modalities=("picture", "speech"), codes={n: CodeSampling(0.0) for n in ("picture", "speech")})
RUNS = {"drawn": DRAWN, "greedy": GREEDY}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folders(
    request: pytest.FixtureRequest, text_shards: str, tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A run that trained marks and codes on an imported Llama, and its export."""
    folder = tmp_path_factory.mktemp("codes")
    config = run_of(text_shards, tokenizer_folder, folder, tied=request.param)
    run_ranks(2, train_on_codes, config)
    run, out = config.exp_manager.explicit_log_dir, folder / "export"
    assert run_in_rank(export_hf.main, ["--checkpoint", run, "--out", str(out)]) == 0
    return run, out


def from_checkpoint(run: str, tensor: int, stages: int) -> dict[str, list[Reply]]:
    """In a rank: the answers of all runs."""
    generator = NativeGenerator.of_run(run, tensor, stages)
    return {name: generator.replies(PROMPTS, sampling, 3) for name, sampling in RUNS.items()}


def running(run: str) -> dict[str, list[Reply]]:
    """In a rank: the same from a running batch, which one prompt joins late."""
    generator, replies = NativeGenerator.of_run(run), {}
    for name, sampling in RUNS.items():
        batch = generator.running_batch()
        everyone = [batch.read(prompt, sampling) for prompt in PROMPTS]
        for number, one in enumerate(everyone):
            one.answer.number = number
        batch.join(everyone[:-1])
        batch.step()
        batch.join(everyone[-1:])
        while batch.running:
            batch.keep([row for row, one in enumerate(batch.running) if not one.answer.done])
            if batch.running:
                batch.step()
        replies[name] = [one.answer.reply for one in everyone]
    return replies


def from_export(folder: Path) -> dict[str, list[Reply]]:
    """In a rank: the answers of the export."""
    config = json.loads((folder / "config.json").read_text())
    generator = ExportedGenerator.of_folder(str(folder), config, "cpu", "auto", trust_remote_code=False)
    return {name: generator.replies(PROMPTS, sampling, 3) for name, sampling in RUNS.items()}


def test_checkpoints_and_exports_write_the_same(folders: tuple[str, Path]) -> None:
    run, out = folders
    [expected] = run_ranks(1, from_checkpoint, run, 1, 1)
    assert (
        all(reply.items for reply in expected["greedy"]) and sum(bool(reply.items) for reply in expected["drawn"]) > 1
    )
    assert run_ranks(2, from_checkpoint, run, 2, 1)[1] == expected
    assert run_ranks(2, from_checkpoint, run, 1, 2)[0] == expected
    assert run_ranks(1, running, run) == [expected]
    assert run_ranks(1, from_export, out) == [expected]


def with_transformers(folder: str) -> tuple[list[Any], list[Any], np.ndarray]:
    """In a rank: greedy media of the folder's own code with and without the key-value cache, and logits of a batch."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(text=[prompt.parts[0].text for prompt in PROMPTS])
    settings = {"modalities": ["picture", "speech"], "max_new_tokens": 14, "do_sample": False}
    written = []
    for cache in (True, False):
        media = processor.parts(model.generate(**inputs, **settings, use_cache=cache), inputs)
        processor.save_media(media[0], f"{folder}/media")
        assert np.array_equal(np.load(next(Path(folder, "media").glob("0-1.*.codes.npy"))), media[0][0].codes)
        written.append([[(item.name, item.codes.tolist()) for item in row] for row in media])
    with pytest.raises(ValueError, match="This model cannot generate 'sound'"):
        model.generate(**inputs, modalities=["sound"], max_new_tokens=20)
    assert type(model).__module__.startswith("transformers_modules")
    return written[0], written[1], model(VOCABULARY_IDS[None]).logits[0].detach().numpy()


VOCABULARY_IDS = torch.randint(VOCABULARY.total_size, (40,), generator=torch.Generator().manual_seed(1))


def native_logits(run: str) -> np.ndarray:
    """In a rank: the checkpoint's logits of the same tokens."""
    from megatron_anymal.data.micro_batch import MicroBatch

    model = NativeGenerator.of_run(run).model
    with torch.no_grad():
        return model.whole_logits(model(MicroBatch.unlabelled([VOCABULARY_IDS.tolist()], {}))[0]).numpy()


def test_the_folder_alone_writes_the_same(folders: tuple[str, Path]) -> None:
    run, out = folders
    [expected] = run_ranks(1, from_checkpoint, run, 1, 1)
    [(cached, plain, logits)] = run_ranks(1, with_transformers, str(out))
    assert cached == plain
    assert cached == [[(item.name, item.codes.tolist()) for item in reply.items] for reply in expected["greedy"]]
    [ours] = run_ranks(1, native_logits, run)
    assert np.abs(logits - ours).max() <= 1e-5 * max(1.0, np.abs(ours).max())
