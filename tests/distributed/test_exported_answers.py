"""A checkpoint and an export with the same weights give the same answers to all prompts and settings."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import fork_server
import pytest
import torch
from benchmark_data import MAKERS
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny import CHAT, LLAMA, SPECIAL, flac, make_config, make_conversations, npy, png
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, dynamic_module_utils

from megatron_anymal.checkpoint.store import CheckpointError
from megatron_anymal.cli import evaluate, generate
from megatron_anymal.config import ConfigError, RunConfig
from megatron_anymal.data.prompt_encoder import MediaFile, open_parts
from megatron_anymal.data.records import DataError, TextPart
from megatron_anymal.data.tokenizer import Tokenizer
from megatron_anymal.generation.answers import Stream
from megatron_anymal.generation.checkpoint_generator import NativeGenerator
from megatron_anymal.generation.evaluation import read_questions
from megatron_anymal.generation.export_generator import ExportedGenerator, _as_json
from megatron_anymal.generation.generator import Generator, PromptTooLong
from megatron_anymal.generation.prompts import Prompt, read_prompts
from megatron_anymal.generation.sampling import Sampling
from megatron_anymal.hf.configuration_anymal import AnyMALConfig as ExportedConfig
from megatron_anymal.hf.modality_configs import export_sections
from megatron_anymal.hf.modeling_anymal import AnyMALForConditionalGeneration
from megatron_anymal.hf.processing_anymal import AnyMALProcessor
from megatron_anymal.hf.remote_code import CONFIG_AUTO_MAP, PROCESSOR_AUTO_MAP, write_code
from megatron_anymal.parallel import initialize

RUNS: dict[str, tuple[Sampling, int]] = {
    "greedy": (Sampling(12), 64),
    "one by one": (Sampling(12), 1),
    "by sevens": (Sampling(12), 7),
    "penalty": (Sampling(12, repetition_penalty=1.4), 16),
    "stop": (Sampling(12, stop=("seven", "is two")), 16),
    "penalty and stop": (Sampling(12, repetition_penalty=1.2, stop=("walk",)), 16),
    "seed 1": (Sampling(12, temperature=1.0, seed=1), 64),
    "seed 1 by sevens": (Sampling(12, temperature=1.0, seed=1), 7),
    "seed 2": (Sampling(12, temperature=1.0, seed=2), 64),
    "narrow": (Sampling(12, temperature=1.5, top_k=6, top_p=0.8, repetition_penalty=1.1, seed=3), 16),
}


@pytest.fixture(scope="module")
def config(mixed_shards: str, tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A model with every modality, and a Llama whose weights are large enough for varied answers."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(5)
    LlamaForCausalLM(LlamaConfig(**{**LLAMA, "initializer_range": 0.4})).save_pretrained(folder / "llama")
    config = make_config(mixed_shards, tokenizer_folder, folder / "run")
    config.model.language_model.config, config.model.language_model.path = {}, str(folder / "llama")
    return config


def write_export(config: RunConfig, folder: Path) -> None:
    """In a rank: write the configuration's model, with its initial weights, as an exported folder."""
    native = NativeGenerator.of_checkpoint(config, initialize(config), None)
    path = config.model.language_model.path
    sections = export_sections(config.model.modalities, Tokenizer(config.data.tokenizer))
    tokenizer = AutoTokenizer.from_pretrained(config.data.tokenizer)
    begin, end, turn_end = tokenizer.convert_tokens_to_ids([*SPECIAL[:2], CHAT[2]])
    llama = LlamaConfig.from_pretrained(path).to_dict()
    model = AnyMALForConditionalGeneration(ExportedConfig(text_config=llama, modalities=sections))
    weights = {k: v for k, v in native.model.state_dict().items() if k.startswith(("encoders.", "projectors."))}
    hf = LlamaForCausalLM.from_pretrained(path).state_dict()
    wanted = model.state_dict().keys()
    weights.update({f"language_model.{name}": weight for name, weight in hf.items()})
    model.load_state_dict({name: weight for name, weight in weights.items() if name in wanted})
    model.generation_config = GenerationConfig(bos_token_id=begin, eos_token_id=[end, turn_end], pad_token_id=end)
    model.save_pretrained(folder)
    AnyMALProcessor(tokenizer, modalities=sections).save_pretrained(folder)


def as_transformers_does(source: Path, prompts: list[Prompt], penalty: float) -> list[str]:
    """In a rank: greedy answers of transformers' own `generate` in one batch, with media read from files."""
    model = AnyMALForConditionalGeneration.from_pretrained(source).eval()
    processor = AnyMALProcessor.from_pretrained(source)
    tokens = [section["placeholder_id"] for section in model.config.modalities.values()]
    inputs = processor([_as_json(prompt) for prompt in prompts])
    generated = model.generate(
        **inputs, max_new_tokens=12, do_sample=False, repetition_penalty=penalty, suppress_tokens=tokens
    )
    return processor.answers(generated, inputs)


@pytest.fixture(scope="module")
def export(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported folder of the same model."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    run_ranks(1, write_export, config, folder)
    return folder


@pytest.fixture(scope="module")
def prompts(mixed_shards: str, tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    """Samples of every kind of media, conversations of one and two turns, and all modalities in one prompt."""
    chats = make_conversations(tmp_path_factory.mktemp("chats") / "chats", tokenizer_folder, 16)
    asked = [question.prompt for folder in (mixed_shards, chats) for question in read_questions(folder)]
    content = [{"media": "a.png"}, {"text": "what is"}, {"media": "b.npy", "rate": 50}, {"media": "c.flac"}]
    system = {"role": "system", "content": "this is a sound"}
    files = [MediaFile(png(3, (20, 9)), "png"), MediaFile(npy(4, 80), "npy"), MediaFile(flac(5, 1.2), "flac")]
    parts = open_parts({"messages": [system, {"role": "user", "content": content}]}, "")
    return [*asked, Prompt(parts, files)]


def load(source: RunConfig | Path) -> Generator:
    """In a rank: load the native or exported model."""
    if isinstance(source, RunConfig):
        return NativeGenerator.of_checkpoint(source, initialize(source), None)
    config = json.loads((source / "config.json").read_text())
    return ExportedGenerator.of_folder(str(source), config, "cpu", "auto", trust_remote_code=False)


def answer(source: RunConfig | Path, prompts: list[Prompt], runs: dict[str, Any]) -> dict[str, list[str]]:
    """In a rank: return the answers of every run."""
    generator = load(source)
    return {name: generator.answer(prompts, sampling, batch) for name, (sampling, batch) in runs.items()}


@pytest.fixture(scope="module")
def native(config: RunConfig, prompts: list[Prompt]) -> dict[str, list[str]]:
    """Answers of the checkpoint."""
    return run_ranks(1, answer, config, prompts, RUNS)[0]


@pytest.fixture(scope="module")
def exported(export: Path, prompts: list[Prompt]) -> dict[str, list[str]]:
    """Answers of the exported folder."""
    return run_ranks(1, answer, export, prompts, RUNS)[0]


@pytest.mark.parametrize("run", RUNS)
def test_both_answer_the_same(run: str, native: dict[str, list[str]], exported: dict[str, list[str]]) -> None:
    assert exported[run] == native[run]
    assert len(set(native[run])) > 20, "too few distinct answers"


def test_each_setting_changes_answers_and_batches_do_not(exported: dict[str, list[str]]) -> None:
    assert exported["one by one"] == exported["by sevens"] == exported["greedy"]
    assert exported["seed 1 by sevens"] == exported["seed 1"]
    different = [exported[name] for name in ("greedy", "penalty", "stop", "penalty and stop", "seed 1", "seed 2")]
    assert all(one != other for n, one in enumerate(different) for other in different[:n])
    cut = [(whole, left) for whole, left in zip(exported["greedy"], exported["stop"]) if whole != left]
    assert cut
    for whole, left in cut:
        assert whole.startswith(left) and whole[len(left) :].startswith(("seven", "is two"))


@pytest.mark.parametrize(("run", "penalty"), [("greedy", 1.0), ("penalty", 1.4)])
def test_greedy_answers_are_those_of_transformers_generate(
    run: str, penalty: float, export: Path, prompts: list[Prompt], exported: dict[str, list[str]]
) -> None:
    expected = run_ranks(1, as_transformers_does, export, prompts, penalty)[0]
    assert [text.strip() for text in exported[run]] == expected


def with_other_media(source: Path, prompts: list[Prompt]) -> list[str]:
    """In a rank: greedy answers to the prompts with different media of the same kinds."""
    makers = {"png": png, "flac": flac, "npy": npy}
    others = [Prompt(p.parts, [MediaFile(makers[m.extension](99), m.extension) for m in p.media]) for p in prompts]
    return load(source).answer(others, RUNS["greedy"][0])


def test_media_are_seen(export: Path, prompts: list[Prompt], exported: dict[str, list[str]]) -> None:
    others = run_ranks(1, with_other_media, export, prompts)[0]
    changed = [old != new for old, new in zip(exported["greedy"], others)]
    assert not any(change for change, prompt in zip(changed, prompts) if not prompt.media)
    assert sum(changed) > 10


def stream(source: RunConfig | Path, prompts: list[Prompt], sampling: Sampling) -> list[tuple[str, list[str]]]:
    """In a rank: return each answer and the chunks of it that were streamed."""
    generator, answers = load(source), []
    for prompt in prompts:
        pieces: list[str] = []
        [whole] = generator.answer([prompt], sampling, watch=Stream(pieces.append))
        answers.append((whole, pieces))
    return answers


@pytest.mark.parametrize("kind", ["native", "exported"])
def test_what_is_streamed_is_what_is_answered(
    kind: str, config: RunConfig, export: Path, prompts: list[Prompt]
) -> None:
    source: Any = config if kind == "native" else export
    answers = run_ranks(1, stream, source, prompts[:10], Sampling(12, temperature=1.0, stop=("seven",)))[0]
    assert all("".join(pieces) == whole.strip() for whole, pieces in answers)
    assert max(len(pieces) for _, pieces in answers) > 4


def length_limit(source: RunConfig | Path) -> tuple[int, str]:
    """In a rank: number of words in an answer with three positions left, and the error for a prompt without room."""
    generator = load(source)
    limit = generator.max_positions
    assert limit is not None
    # One more position is taken by the begin token.
    [answer] = generator.answer([Prompt([TextPart("seven " * (limit - 4))], [])], Sampling(50, temperature=2.0))
    with pytest.raises(PromptTooLong) as error:
        generator.answer([Prompt([TextPart("seven " * (limit - 1))], [])], Sampling(50))
    return len(answer.split()), str(error.value)


@pytest.mark.parametrize("kind", ["native", "exported"])
def test_answers_end_where_the_positions_end(kind: str, config: RunConfig, export: Path) -> None:
    words, message = run_ranks(1, length_limit, config if kind == "native" else export)[0]
    assert words <= 3 and "512 tokens" in message and "512 positions" in message


def mistake(source: RunConfig | Path, prompt: Prompt) -> str:
    """In a rank: the error for a prompt that cannot be answered."""
    generator = load(source)
    with pytest.raises(ValueError) as error:
        generator.answer([prompt], Sampling(2))
    return str(error.value)


BROKEN = Prompt(
    open_parts({"parts": [{"media": "x/y.npy", "rate": 50}, {"text": "what"}]}, ""), [MediaFile(b"no", "npy")]
)


def test_both_refuse_a_broken_file_by_its_name(config: RunConfig, export: Path) -> None:
    messages = [run_ranks(1, mistake, source, BROKEN)[0] for source in (config, export)]
    assert messages[0] == messages[1] and "'x/y.npy'" in messages[0]


def verb(main: Any, argv: list[str], out: Path) -> int:
    """In a rank: run a command with its standard output redirected to a file."""
    with out.open("w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        sys.stdout = file
        return main(argv)


def said(main: Any, argv: list[str], tmp_path: Path) -> str:
    assert run_ranks(1, verb, main, argv, tmp_path / "stdout") == [0]
    return (tmp_path / "stdout").read_text()


def test_image_and_motion_in_one_prompt(export: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "walk.npy").write_bytes(npy(2))
    line = {"parts": [{"media": "a.png"}, {"media": "walk.npy", "rate": 50}, {"text": "what is this"}]}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line) + "\n")
    shared = [f"--checkpoint={export}", "--max-new-tokens=8"]
    files = [f"--media={tmp_path}/a.png", f"--media={tmp_path}/walk.npy", "--rate=50", "--text=what is this"]
    shown = said(generate.main, [*shared, *files], tmp_path)
    assert shown.strip() and said(generate.main, [*shared, *files, "--stream"], tmp_path) == shown
    asked = [*shared, f"--prompts={tmp_path}/prompts.jsonl"]
    assert said(generate.main, asked, tmp_path) == 2 * shown
    assert said(generate.main, [*asked, f"--out={tmp_path}/out.jsonl", "--batch-size=1"], tmp_path) == ""
    rows = [json.loads(row) for row in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows == [{"prompt": number, "answer": shown.strip()} for number in (0, 1)]
    assert read_prompts(f"{tmp_path}/prompts.jsonl")[0].media[1].extension == "npy"


def test_evaluate_takes_an_export(
    export: Path, mixed_shards: str, tmp_path: Path, exported: dict[str, list[str]]
) -> None:
    argv = [f"--checkpoint={export}", f"--data={mixed_shards}", "--max-new-tokens=12", f"--out={tmp_path}/scores.json"]
    assert "trained" in said(evaluate.main, [*argv, "--permute-media"], tmp_path)
    result = json.loads((tmp_path / "scores.json").read_text())
    assert [row["given"] for row in result["answers"]["trained"]] == [a.strip() for a in exported["greedy"][:40]]
    assert set(result["scores"]) == {"trained", "permuted"}


def test_talking_to_an_export(export: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    lines = ["/image a.png", "what is this", "/image none.png", "/audio a.png", "one", "two", "/quit"]
    words = ["-m", "megatron_anymal", "generate", f"--checkpoint={export}", "--interactive"]
    words += ["--max-new-tokens=6", "--temperature=1", "--seed=3", "--device=cpu"]
    done = fork_server.python(*words, cwd=tmp_path, given="\n".join(lines) + "\n", timeout=240)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.splitlines()
    assert len(shown) == 5 and shown[1] and shown[4]
    assert shown[2] == "error: There is no media file 'none.png'."
    assert shown[3].startswith("error: 'a.png")


def trusting(folder: Path, prompts: list[Prompt], cache: Path) -> tuple[str, list[str], str]:
    """In a rank: trust the folder's code; return the model's module, greedy answers, and a broken file's error."""
    dynamic_module_utils.HF_MODULES_CACHE = str(cache)
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"thermal\.py.*--trust-remote-code"):
        ExportedGenerator.of_folder(str(folder), config, "cpu", "auto", trust_remote_code=False)
    generator = ExportedGenerator.of_folder(str(folder), config, "cpu", "auto", trust_remote_code=True)
    with pytest.raises(DataError) as error:
        generator.answer([BROKEN], Sampling(2))
    return type(generator._model).__module__, generator.answer(prompts, RUNS["greedy"][0]), str(error.value)


def test_code_of_a_folder_runs_only_where_it_is_trusted(
    export: Path, prompts: list[Prompt], tmp_path: Path, exported: dict[str, list[str]]
) -> None:
    folder = tmp_path / "plugged"
    shutil.copytree(export, folder)
    write_code(folder)
    add: dict[str, dict[str, Any]] = {
        "config.json": {"plugins": ["thermal.py"], "auto_map": CONFIG_AUTO_MAP},
        "processor_config.json": {"auto_map": PROCESSOR_AUTO_MAP, "processor_class": "AnyMALProcessor"},
    }
    for name, keys in add.items():
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, **keys}))
    module, answers, message = run_ranks(1, trusting, folder, prompts, tmp_path / "cache")[0]
    assert module.startswith("transformers_modules.") and answers == exported["greedy"]
    assert "'x/y.npy'" in message


def damaged(source: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load(source)
    return str(error.value)


def test_a_folder_without_all_weights_is_refused(export: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(export, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["language_model.model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "lacks 1 weights, first 'language_model.model.norm.weight'" in run_ranks(1, damaged, folder)[0]
    (folder / "model.safetensors").write_bytes(b"no weights")
    assert "cannot be loaded" in run_ranks(1, damaged, folder)[0]
    (folder / "model.safetensors").unlink()
    assert "cannot be loaded" in run_ranks(1, damaged, folder)[0]
    shutil.copy(export / "model.safetensors", folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["hidden_size"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    assert "cannot be loaded" in run_ranks(1, damaged, folder)[0]


CANDIDATES = ("two", "seven is a walk", "motion")


def likelihoods(source: RunConfig | Path, prompts: list[Prompt], batch: int) -> list[list[float]]:
    """In a rank: log-likelihoods of the candidates as answers to all prompts."""
    return load(source).log_likelihoods(prompts, [CANDIDATES[: 2 + n % 2] for n in range(len(prompts))], batch)


def likelihoods_by_hand(export: Path, prompts: list[Prompt]) -> list[list[float]]:
    """In a rank: the same for prompts without media, one candidate at a time, by transformers' Llama alone."""
    model = AnyMALForConditionalGeneration.from_pretrained(export).eval().language_model
    tokenizer = Tokenizer(str(export))
    log_likelihoods = []
    for prompt in prompts:
        asked = tokenizer.document(prompt.parts, [], {}, closed=False).tokens
        scores = []
        for candidate in CANDIDATES[:2]:
            answer = tokenizer.encode(candidate)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*asked, *answer]])).logits[0].double()
            places = logits[len(asked) - 1 : -1].log_softmax(-1)
            scores.append(float(sum(row[token] for row, token in zip(places, answer))))
        log_likelihoods.append(scores)
    return log_likelihoods


def test_likelihoods_are_those_of_transformers(config: RunConfig, export: Path, prompts: list[Prompt]) -> None:
    plain = [prompt for prompt in prompts if not prompt.media]
    assert len(plain) > 5
    [expected] = run_ranks(1, likelihoods_by_hand, export, plain)
    for source in (config, export):
        [log_likelihoods] = run_ranks(1, likelihoods, source, plain, 4)
        assert [row[:2] for row in log_likelihoods] == [pytest.approx(row, abs=1e-3) for row in expected]


def test_both_have_the_same_likelihoods_with_media(config: RunConfig, export: Path, prompts: list[Prompt]) -> None:
    [native] = run_ranks(1, likelihoods, config, prompts, 16)
    [exported] = run_ranks(1, likelihoods, export, prompts, 16)
    assert native == [pytest.approx(row, abs=1e-3) for row in exported]
    assert len({round(row[0], 2) for row in native}) > 20


def test_benchmarks_take_exported_folders(export: Path, tmp_path: Path) -> None:
    """Tasks of every modality here, with likelihoods; a second run computes nothing."""
    for name in ("mmbench", "audiocaps", "ego4d_imu"):
        (tmp_path / name).mkdir()
        MAKERS[name](tmp_path / name)
    tasks = [f"{name}={tmp_path / name}" for name in ("mmbench", "audiocaps", "ego4d_imu")]
    words = ["--checkpoint", export, "--likelihood", "--without-metric", "spice", "spider", "--out", tmp_path / "out"]
    done = fork_server.python("-m", "megatron_anymal", "evaluate", "--task", *tasks, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]
    assert [len(task["answers"]) for task in results.values()] == [5, 5, 4]
    assert all(max(row["log_likelihoods"]) < 0 for row in results["mmbench"]["answers"])
    again = fork_server.python("-m", "megatron_anymal", "evaluate", "--task", *tasks, *words, cwd=tmp_path)
    assert again.returncode == 0 and "to answer" in done.stderr and "to answer" not in again.stderr
    assert again.stdout == done.stdout
